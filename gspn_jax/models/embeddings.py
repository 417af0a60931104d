"""Inputs of the denoiser: patches of the image, their positions, the time and the class."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gspn_jax.models.parameters import logical

# Named once, so that two models built alike have equal graph definitions.
XAVIER = jax.nn.initializers.xavier_uniform()
NORMAL = jax.nn.initializers.normal(0.02)

TIME_FREQUENCIES = 256
MAX_PERIOD = 10_000.0


def patchify(x: Float[Array, "B H W C"], patch: int) -> Float[Array, "B h w P"]:
    """Cuts an image into patches; P runs over (row in the patch, column in the patch, channel).

    Raises ValueError if the patch does not divide the height and the width.
    """
    batch, height, width, channels = x.shape
    if height % patch or width % patch:
        raise ValueError(
            f"the image's height and width must be multiples of the patch size {patch}, found {height}x{width}"
        )
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, patch * patch * channels)


def unpatchify(x: Float[Array, "B h w P"], patch: int) -> Float[Array, "B H W C"]:
    """The inverse of `patchify`."""
    batch, rows, columns, _ = x.shape
    x = x.reshape(batch, rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * patch, columns * patch, -1)


def sincos_positions(rows: int, columns: int, hidden: int) -> Float[Array, "rows columns hidden"]:
    """Fixed two-dimensional sine-cosine positions: the column in the first half of the channels, the row in the second.

    Each half holds the sines and then the cosines of position * 10000^(-i / (hidden / 4)), as in DiT. Only the two
    one-dimensional tables are constants of the compiled program, so a large grid costs nothing.
    """
    rate = MAX_PERIOD ** -(np.arange(hidden // 4, dtype=np.float64) / (hidden // 4))

    def table(length: int) -> np.ndarray:
        angle = np.arange(length, dtype=np.float64)[:, None] * rate
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)

    grid = (rows, columns, hidden // 2)
    column = jnp.broadcast_to(table(columns)[None], grid)
    row = jnp.broadcast_to(table(rows)[:, None], grid)
    return jnp.concatenate([column, row], axis=-1)


def timestep_frequencies(t: Float[Array, "B"]) -> Float[Array, "B 256"]:
    """Cosines and then sines of t * 10000^(-i / 128), t in 0..1000, as in DiT."""
    half = TIME_FREQUENCIES // 2
    rate = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t.astype(jnp.float32)[:, None] * rate
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class PatchEmbed(nnx.Module):
    """A linear of each patch: the strided convolution of ViT. With a `bottleneck` one without bias to so many channels
    comes before it (JiT, arXiv 2511.13720)."""

    def __init__(
        self, patch: int, channels: int, hidden: int, *, bottleneck: int = 0, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.patch = patch
        pixels = patch * patch * channels
        self.proj = nnx.Linear(bottleneck or pixels, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.narrow = (
            nnx.Linear(pixels, bottleneck, use_bias=False, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
            if bottleneck
            else None
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        x = patchify(x, self.patch)
        return self.proj(x if self.narrow is None else self.narrow(x))


class TimestepEmbed(nnx.Module):
    """Frequencies of t through an MLP with SiLU. Always float32: a few vectors, and t counts to 1000."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(TIME_FREQUENCIES, hidden, kernel_init=NORMAL, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, hidden, kernel_init=NORMAL, rngs=rngs)

    def __call__(self, t: Float[Array, "B"]) -> Float[Array, "B D"]:
        return self.fc2(jax.nn.silu(self.fc1(timestep_frequencies(t))))


class LabelEmbed(nnx.Module):
    """A row for each class and, at index `num_classes`, one for "no class" (classifier-free guidance)."""

    def __init__(self, num_classes: int, hidden: int, *, rngs: nnx.Rngs):
        rows = NORMAL(rngs.params(), (num_classes + 1, hidden), jnp.float32)
        self.embedding = nnx.Param(rows, **logical(None, "embed"))

    def __call__(self, y: Int[Array, "B"]) -> Float[Array, "B D"]:
        return self.embedding[...][y]
