"""A hierarchy of residual blocks on maps of falling size: images in, the map of every stage out."""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from gspn_jax.config import Remat
from gspn_jax.models.blocks import MLP_RATIO
from gspn_jax.models.drop_path import DropPath
from gspn_jax.models.embeddings import NORMAL
from gspn_jax.models.parameters import cast, logical, stack
from gspn_jax.models.remat import named
from gspn_jax.models.scan_mixer import CONVOLUTION, LayerNorm
from gspn_jax.models.stack import run_stack

KERNEL = 3
STRIDE = 2
STEM_STRIDE = STRIDE**2


class MixerOptions(Protocol):
    """Needs of a stage in its mixer: a frozen dataclass of its choices, which builds it and counts its work."""

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """A module that maps [B, H, W, width] to the same with the keyword `chunk`, lines of a local scan or None."""

    def multiply_adds(self, width: int, tokens: int) -> int:
        """Multiply-adds of one map of so many tokens, without those of `scan_multiply_adds`."""

    def scan_multiply_adds(self, width: int, tokens: int) -> int:
        """Multiply-adds of line scans, which counts of other networks' tables leave out or name apart."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks that are alike: `chunks` has one entry a block, lines of its local scans or None for global ones."""

    width: int
    chunks: tuple[int | None, ...]
    mixer: MixerOptions


@dataclasses.dataclass(frozen=True)
class Hierarchy:
    """The stages of a network; `drop_path` is the rate of its last block, that of its first is 0."""

    stages: tuple[Stage, ...]
    drop_path: float = 0.0
    remat: Remat = "none"
    unroll: bool | None = None

    def __post_init__(self):
        if not self.stages or not all(stage.chunks for stage in self.stages):
            raise ValueError(
                "stages must have at least one entry, each of at least one block, "
                f"found {[len(stage.chunks) for stage in self.stages]} blocks"
            )
        if self.stages[0].width % 2:
            raise ValueError(
                f"the width of the first stage must be even, for its stem passes through half of it, "
                f"found {self.stages[0].width}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, found {self.drop_path}")

    @property
    def blocks(self) -> int:
        return sum(len(stage.chunks) for stage in self.stages)


def map_sizes(hierarchy: Hierarchy, height: int, width: int) -> list[tuple[int, int]]:
    """(rows, columns) of the map of every stage, for an image [height, width, C] of any size from 1."""
    strides = [STEM_STRIDE * STRIDE**i for i in range(len(hierarchy.stages))]
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


def convolution(inputs: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    """3x3, stride 2, padding 1; kernel and bias start uniform in +-1/sqrt(9 inputs), PyTorch's default."""
    conv = nnx.Conv(
        inputs, features, (KERNEL, KERNEL), STRIDE, padding=1, kernel_init=CONVOLUTION, dtype=dtype, rngs=rngs
    )
    bound = (KERNEL**2 * inputs) ** -0.5
    conv.bias[...] = jax.random.uniform(rngs.params(), (features,), jnp.float32, -bound, bound)
    return conv


class Stem(nnx.Module):
    """Two convolutions of stride 2, each normalised, with GELU between them: a quarter of the image's size."""

    def __init__(self, channels: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = convolution(channels, width // 2, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(width // 2, rngs=rngs)
        self.conv2 = convolution(width // 2, width, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        x = self.norm1(self.conv1(images))
        return self.norm2(self.conv2(jax.nn.gelu(x, approximate=False)))


class Downsample(nnx.Module):
    """A convolution of stride 2, normalised: half the size."""

    def __init__(self, inputs: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = convolution(inputs, width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B h w E"]:
        return self.norm(self.conv(x))


class Mlp(nnx.Module):
    """Two linears around an exact GELU."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        wide, into, out = MLP_RATIO * width, logical("embed", "mlp"), logical("mlp", "embed")
        self.fc1 = nnx.Linear(width, wide, kernel_init=NORMAL, dtype=dtype, rngs=rngs, kernel_metadata=into)
        self.fc2 = nnx.Linear(wide, width, kernel_init=NORMAL, dtype=dtype, rngs=rngs, kernel_metadata=out)

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        return self.fc2(jax.nn.gelu(named(self.fc1(x), "fc1"), approximate=False))


class Block(nnx.Module):
    """Mixer and MLP, each normalised before it and added to what came in."""

    def __init__(self, stage: Stage, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(stage.width, rngs=rngs)
        self.mixer = stage.mixer.build(stage.width, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(stage.width, rngs=rngs)
        self.mlp = Mlp(stage.width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W D"], condition: None = None, *,
        chunk: int | None, drop_path: DropPath | None = None, long_skip: None = None,
    ) -> Float[Array, "B H W D"]:  # fmt: skip
        """`condition` and `long_skip` are there for `run_stack`, which gives blocks of other networks some."""
        branches = (lambda h: self.mixer(self.norm1(h), chunk=chunk), lambda h: self.mlp(self.norm2(h)))
        for index, branch in enumerate(branches):
            y = branch(x)
            x = x + (y if drop_path is None else drop_path(y, index))
        return x


class StageOfBlocks(nnx.Module):
    """Change of the map to the stage's size and width, then its blocks, in one scan a stretch of equal chunks."""

    def __init__(self, stage: Stage, inputs: int, *, number: int, within: Hierarchy, dtype: DTypeLike, rngs: nnx.Rngs):
        self.chunks, self.remat, self.unroll, self.dtype = stage.chunks, within.remat, within.unroll, dtype
        self.down = (Stem if number == 1 else Downsample)(inputs, stage.width, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(stage, dtype=dtype, rngs=rngs), len(stage.chunks), rngs)

    def __call__(self, x: Float[Array, "B H W D"], drop_path: DropPath | None) -> Float[Array, "B h w E"]:
        x, _, _ = run_stack(
            self.blocks,
            self.down(x),
            chunks=self.chunks,
            remat=self.remat,
            unroll=self.unroll,
            drop_path=drop_path,
            prepare=functools.partial(cast, dtype=self.dtype),
        )
        return x


class Backbone(nnx.Module):
    """Images to the maps of all stages. `dtype` is that of the computation; norms and scan states are float32."""

    def __init__(self, hierarchy: Hierarchy, *, channels: int = 3, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.hierarchy, self.channels, self.dtype = hierarchy, channels, dtype
        widths = [channels, *(stage.width for stage in hierarchy.stages)]
        for number, (stage, inputs) in enumerate(zip(hierarchy.stages, widths, strict=False), start=1):
            setattr(
                self,
                f"stage{number}",
                StageOfBlocks(stage, inputs, number=number, within=hierarchy, dtype=dtype, rngs=rngs),
            )

    def __call__(
        self, images: Float[Array, "B H W C"], *, drop_path_key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B h w D"], ...]:
        """Maps at 1/4, 1/8, ... of the image's size, rounded up; any height and width from 1.

        With a `drop_path_key` branches of blocks are dropped at random, sample by sample, at rates that rise linearly
        over the blocks up to `drop_path`; without one the function is deterministic.
        Raises ValueError for images of another rank or number of channels.
        """
        if images.ndim != 4 or images.shape[3] != self.channels or 0 in images.shape:
            raise ValueError(
                f"images must have shape [B, H, W, {self.channels}] with no empty axis, found {list(images.shape)}"
            )
        x, maps, start = images.astype(self.dtype), [], 0
        drop_path = self._drop_path(drop_path_key)
        for i, stage in enumerate(self.hierarchy.stages):
            stop = start + len(stage.chunks)
            part = jax.tree.map(lambda a, start=start, stop=stop: a[start:stop], drop_path)
            x = getattr(self, f"stage{i + 1}")(x, part)
            maps.append(x)
            start = stop
        return tuple(maps)

    def _drop_path(self, key: Key[Array, ""] | None) -> DropPath | None:
        blocks, rate = self.hierarchy.blocks, self.hierarchy.drop_path
        if key is None or rate == 0:
            return None
        return DropPath(jax.random.split(key, blocks), jnp.linspace(0, rate, blocks, dtype=jnp.float32))


def multiply_adds(hierarchy: Hierarchy, channels: int, height: int, width: int) -> dict[str, int]:
    """Multiply-adds of one image by part: "stem", "down2", "stage1", ... and all "scans" together.

    Linears, convolutions and merges, as the usual tables count; norms, activations and what makes logits weights of
    neighbours are left out.
    """
    counts, inputs, scans = {}, channels, 0
    for i, (stage, (rows, columns)) in enumerate(
        zip(hierarchy.stages, map_sizes(hierarchy, height, width), strict=True)
    ):
        tokens, d = rows * columns, stage.width
        if i == 0:
            half = -(-height // STRIDE) * -(-width // STRIDE)
            counts["stem"] = KERNEL**2 * (half * inputs * (d // 2) + tokens * (d // 2) * d)
        else:
            counts[f"down{i + 1}"] = KERNEL**2 * tokens * inputs * d
        block = stage.mixer.multiply_adds(d, tokens) + 2 * tokens * d * MLP_RATIO * d
        counts[f"stage{i + 1}"] = len(stage.chunks) * block
        scans += len(stage.chunks) * stage.mixer.scan_multiply_adds(d, tokens)
        inputs = d
    return counts | {"scans": scans}
