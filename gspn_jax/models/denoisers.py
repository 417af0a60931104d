"""The denoiser: patches and condition in, a trunk of blocks, prediction out.

The trunk is the layout: `DiTTrunk` (adaLN-zero blocks in a row) or `GSPNTrunk` (blocks with long skips). Everything
around it is common to both.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from gspn_jax.models.attention import forward_mode
from gspn_jax.models.blocks import ZEROS, DiTBlock, GSPNBlock, Modulation, modulate, norm_of, prepared
from gspn_jax.models.drop_path import DropPath
from gspn_jax.models.embeddings import PatchEmbed, TimestepEmbed, sincos_positions, unpatchify
from gspn_jax.models.parameters import stack
from gspn_jax.models.presets import Architecture
from gspn_jax.models.stack import forward_only, run_stack, tensor_cores
from gspn_jax.models.width import pad_tokens, widths


class DiTTrunk(nnx.Module):
    """Blocks that each take the condition, on tokens to which positions are added where `arch.positions` says so."""

    def __init__(self, arch: Architecture, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.arch, self.dtype = arch, dtype
        self.blocks = stack(lambda rngs: DiTBlock(arch, dtype=dtype, rngs=rngs), arch.blocks, rngs)

    def __call__(
        self,
        x: Float[Array, "B H W D"],
        condition: Float[Array, "B D"],
        drop_path: DropPath | None,
        features: tuple[int, ...],
    ) -> tuple[Float[Array, "B H W D"], dict[int, Float[Array, "B H W D"]]]:
        mixer, remat = self.arch.options, self.arch.remat
        if self.arch.positions:
            x = x + sincos_positions(*x.shape[1:]).astype(x.dtype)
        if remat == "none" and jax.default_backend() == "cpu":
            remat = mixer.remat_on_cpu
        x, _, found = run_stack(
            self.blocks,
            x,
            condition,
            chunks=self.arch.chunks,
            remat=remat,
            unroll=self.arch.unroll,
            drop_path=drop_path,
            prepare=functools.partial(prepared, arch=self.arch, dtype=self.dtype),
            features=features,
        )
        return x, found


class GSPNTrunk(nnx.Module):
    """The condition is added to the tokens once; the i-th block from the start is joined to the i-th from the end.

    The middle block is the last of `in_blocks`: it has the same parameters, and one stack compiles faster than two.
    """

    def __init__(self, arch: Architecture, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.arch, self.dtype = arch, dtype
        half = arch.depth // 2
        self.in_blocks, self.out_blocks = (
            stack(lambda rngs, skip=skip: GSPNBlock(arch, long_skip=skip, dtype=dtype, rngs=rngs), count, rngs)
            for count, skip in ((half + 1, False), (half, True))
        )

    def __call__(
        self,
        x: Float[Array, "B H W D"],
        condition: Float[Array, "B D"],
        drop_path: DropPath | None,
        features: tuple[int, ...],
    ) -> tuple[Float[Array, "B H W D"], dict[int, Float[Array, "B H W D"]]]:
        arch, half = self.arch, self.arch.depth // 2
        drop_in, drop_out = (
            jax.tree.map(lambda a, part=part: a[part], drop_path)
            for part in (slice(None, half + 1), slice(half + 1, None))
        )
        x = x + condition[:, None, None].astype(x.dtype)
        if tensor_cores():
            x = pad_tokens(x, widths(arch)["hidden"])
        prepare = functools.partial(prepared, arch=arch, dtype=self.dtype)
        x, kept, found = run_stack(
            self.in_blocks,
            x,
            chunks=arch.chunks[: half + 1],
            remat=arch.remat,
            unroll=arch.unroll,
            drop_path=drop_in,
            keep=True,
            prepare=prepare,
            features=[i for i in features if i <= half],
        )
        x, _, later = run_stack(
            self.out_blocks,
            x,
            chunks=arch.chunks[half + 1 :],
            remat=arch.remat,
            unroll=arch.unroll,
            drop_path=drop_out,
            long_skips=kept,
            prepare=prepare,
            features=[i - half - 1 for i in features if i > half],
        )
        found |= {half + 1 + i: tokens for i, tokens in later.items()}
        return x[..., : arch.hidden], {i: tokens[..., : arch.hidden] for i, tokens in found.items()}


class FinalLayer(nnx.Module):
    """Normalise, modulate, project to patches of the output. float32, and zero at initialisation."""

    def __init__(self, arch: Architecture, features: int, *, rngs: nnx.Rngs):
        self.modulation = Modulation(arch.hidden, 2, dtype=jnp.float32, rngs=rngs)
        self.linear = nnx.Linear(arch.hidden, features, kernel_init=ZEROS, dtype=jnp.float32, rngs=rngs)
        self.norm = norm_of(arch, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w D"], condition: Float[Array, "B D"]) -> Float[Array, "B h w P"]:
        shift, scale = self.modulation(condition)
        return self.linear(modulate(self.norm(x), shift, scale))


class Denoiser(nnx.Module):
    """Predicts from a noised image, its time and a condition: its class, or what the embedder embeds.

    `channels` of the image; with `learn_sigma` the output has twice as many, the prediction and then the range of the
    variance; with `spans` it is told two times (`diffusion.objectives.MeanVelocity`). `dtype` is that of the
    computation; parameters, norms, softmax, scan state and output are float32.
    """

    def __init__(
        self, arch: Architecture, *, channels: int, embedder: Callable[..., nnx.Module], learn_sigma: bool,
        spans: bool = False, dtype: DTypeLike, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.arch = arch
        out_channels = 2 * channels if learn_sigma else channels
        trunk = {"dit": DiTTrunk, "paper": GSPNTrunk}[arch.layout]
        self.patch_embed = PatchEmbed(
            arch.patch, channels, arch.hidden, bottleneck=arch.bottleneck, dtype=dtype, rngs=rngs
        )
        self.time_embed = TimestepEmbed(arch.hidden, rngs=rngs)
        self.label_embed = embedder(arch.hidden, rngs=rngs)
        self.trunk = trunk(arch, dtype=dtype, rngs=rngs)
        self.final = FinalLayer(arch, arch.patch**2 * out_channels, rngs=rngs)
        self.span_embed = TimestepEmbed(arch.hidden, rngs=rngs) if spans else None

    def __call__(
        self, x: Float[Array, "B H W C"], t: Float[Array, "B"] | Float[Array, "B 2"], y: PyTree[Array], *,
        drop_path_key: Key[Array, ""] | None = None, features: tuple[int, ...] = (),
    ) -> Float[Array, "B H W O"] | tuple[Float[Array, "B H W O"], dict[int, Float[Array, "B h w D"]]]:  # fmt: skip
        """`t` is in 0..1000, or of a denoiser with `spans` a time and a span in 0..1. `y` is what the embedder embeds:
        a class in 0..num_classes (the last is "no class"), or a tree of arrays [B, ...]. O = 2C with learn_sigma, else
        C.

        H and W may be any multiples of the patch. With a `drop_path_key` blocks are dropped at random, the more the
        deeper (linearly up to `drop_path`); without one the function is deterministic.
        With `features`, numbers of blocks in the order of execution from 0, it gives (output, {i: tokens after block
        i}). Raises ValueError for other numbers, and if the patch does not divide H and W.
        """
        if not set(features) <= set(range(self.arch.blocks)):
            raise ValueError(f"features must be numbers of blocks in 0..{self.arch.blocks - 1}, found {features}")
        drop_path = None
        if drop_path_key is not None and self.arch.drop_path > 0:
            blocks = self.arch.blocks
            rates = jnp.linspace(0, self.arch.drop_path, blocks, dtype=jnp.float32)
            drop_path = DropPath(jax.random.split(drop_path_key, blocks), rates)
        if self.span_embed is None:
            condition = self.time_embed(t) + self.label_embed(y)
        else:
            condition = self.time_embed(t[:, 0]) + self.span_embed(t[:, 1]) + self.label_embed(y)
        with forward_mode(self.span_embed is not None and not forward_only()):
            tokens, found = self.trunk(self.patch_embed(x), condition, drop_path, features)
        output = unpatchify(self.final(tokens, condition), self.arch.patch)
        return (output, found) if features else output
