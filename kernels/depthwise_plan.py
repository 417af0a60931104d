"""Cuts of images and kernels by the depthwise convolution's GPU kernels, and work of a thread on rows of them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import compat, devices, instructions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The cut of an image [height, width, channels] and a kernel [kernel_height, kernel_width, channels]."""

    height: int
    width: int
    channels: int
    kernel_height: int
    kernel_width: int
    device: devices.Device

    @classmethod
    def of(cls, shape: tuple[int, int, int, int], size: tuple[int, int]) -> "Plan":
        """The cut of images [B, H, W, C] and a kernel of so many rows and columns, for `devices.current()`."""
        _, height, width, channels = shape
        return cls(
            height=height,
            width=width,
            channels=channels,
            kernel_height=size[0],
            kernel_width=size[1],
            device=devices.current(),
        )

    @property
    def vector(self) -> int:
        """Neighbouring channels of a thread: loads of two need an even number of channels."""
        return 2 if self.channels % 2 == 0 and self.channels >= 256 else 1

    @property
    def slab(self) -> int:
        """Channels of a block."""
        return 128 * self.vector

    @property
    def slabs(self) -> int:
        """Slabs of an image; the last one overlaps the one before it where slabs do not divide the channels."""
        return math.ceil(self.channels / self.slab)

    @property
    def length(self) -> int:
        """Columns of a segment: the most of those that leave the least to do twice."""
        segment = self.device.depthwise.segment
        if self.width <= segment:
            return self.width
        return min(range(segment, segment // 2, -1), key=lambda n: math.ceil(self.width / n) * n)

    @property
    def segments(self) -> int:
        """Pieces of a row; the last one overlaps the one before it where their length does not divide the width."""
        return math.ceil(self.width / self.length)

    @property
    def fits_at_once(self) -> bool:
        """True where a warpgroup has room for the sums of a row of pixels and of a whole kernel."""
        return self.segments == 1 and self.kernel_height * self.kernel_width <= 9

    @property
    def together(self) -> int:
        """Rows of sums of a warpgroup at a time, for which a row of x is loaded and widened once: two of larger
        kernels, where no halo takes the registers."""
        return 2 if self.kernel_height > 3 and self.segments == 1 else 1

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a block of the correlation, of whose registers a multiprocessor holds several blocks."""
        return 2 // self.together

    @property
    def passes(self) -> list[tuple[range, int, int]]:
        """(rows of sums, first and one past the last row of x that is added to them)"""
        edges = range(1, self.together)
        return [
            *((range(n), n - 1, n) for n in edges),
            (range(self.together), self.together - 1, self.kernel_height),
            *((range(n, self.together), self.kernel_height + n - 1, self.kernel_height + n) for n in edges),
        ]

    @property
    def blocks(self) -> int:
        """Blocks of each slab that keep a GPU busy."""
        return max(1, self.device.depthwise.blocks * self.device.multiprocessors // self.slabs)

    def strips(self, images: int) -> int:
        return math.ceil(self.height / self.rows(images))

    def rows(self, images: int) -> int:
        """Rows of a strip, fewer where there are few images; the last strip may have fewer."""
        strips = max(math.ceil(self.height / self.device.depthwise.strip), self.blocks // (images * self.segments))
        return math.ceil(self.height / strips / self.together) * self.together

    @property
    def layout(self) -> object:
        """Layout of the channels of a slab over the threads of a warpgroup."""
        tiles = plgpu.Tiling(((self.slab,), (self.slab // 4,), (self.vector,)))
        return plgpu.Layout.TILED(tiles, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def zeros(self) -> Float[Array, "slab"]:
        return compat.zeros((self.slab,), self.layout)

    def mine(self) -> Any:
        """The channels of this block."""
        start = lax.min(lax.axis_index("slab") * self.slab, self.channels - self.slab)
        return pl.ds(pl.multiple_of(start, self.vector), self.slab)

    def first_column(self, segment: Array) -> Array:
        return lax.min(segment * self.length, self.width - self.length)

    def row(self, ref: Any, row: tuple, first: Array, halo: int) -> list[Float[Array, "slab"] | None]:
        """Columns first - halo to first + length + halo of a row in float32; None for those that are always outside of
        the image, zeros for those that happen to be."""

        def read(begin: Array, count: int) -> list[Float[Array, "slab"]]:
            columns = ref.at[*row, pl.ds(begin, count)]
            return [self.read(columns, column) for column in range(count)]

        inside = read(first, self.length)
        if self.segments == 1:
            return [None] * halo + inside + [None] * halo

        def beyond(there: Array, begin: Array, instead: Array) -> list[Float[Array, "slab"]]:
            """The halo from `begin`, read at another place and replaced by zeros if it is not there."""
            found = read(jnp.where(there, begin, instead), halo)
            return [jnp.where(jnp.broadcast_to(there, a.shape), a, 0.0) for a in found]

        end = first + self.length
        return [*beyond(first > 0, first - halo, first), *inside, *beyond(end < self.width, end, end - halo)]

    def taps(self, kernel: Any, m: Array, turned: bool = False) -> list[Float[Array, "slab"]]:
        """Row m of the kernel, `turned` from its last column to its first."""
        return [self.read(kernel, m, n) for n in range(self.kernel_width)][:: -1 if turned else 1]

    def read(self, ref: Any, *index: Any) -> Float[Array, "slab"]:
        """The channels of this block, or all of a reference that has no more."""
        channels = self.mine() if ref.shape[-1] == self.channels else slice(None)
        return instructions.widened(compat.load(ref, (*index, channels), self.layout), self.layout)


def correlate_row(sums: tuple, inputs: list, taps: list) -> tuple:
    """Adds the products of a row of pixels, None if outside of the image, and of a row of taps to their sums."""
    sums = list(sums)
    for n, tap in enumerate(taps):
        for column in range(len(sums)):
            if (found := inputs[column + n]) is not None:
                sums[column] = sums[column] + tap * found
    return tuple(sums)


def correlate_gradient(taps: tuple, inputs: list, given: list) -> tuple:
    """Adds what a row of pixels and the cotangents of a row of sums give a row of taps."""
    taps = list(taps)
    for n in range(len(taps)):
        for column, a in enumerate(given):
            if (b := inputs[column + n]) is not None:
                taps[n] = taps[n] + a * b
    return tuple(taps)


def apply_if(condition: Array, function: Callable, values: Any) -> Any:
    """`function(values)` or `values`; a loop, for what layouts are inferred through."""
    return lax.fori_loop(0, jnp.where(condition, 1, 0), lambda _, values: function(values), values)
