"""Shared memory of the GPU kernels, and how its bytes lie."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from gspn_jax.kernels import tiles

SWIZZLE = 64
"""Bytes of a row that are interleaved with those of other rows, so that the tensor cores read without conflicts."""
QUANTUM = SWIZZLE // 2
"""The width of a matrix of bfloat16 there is a multiple of this."""
COPIED = plgpu.Layout.TILED(
    plgpu.Tiling(((8, QUANTUM), (2, QUANTUM), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
"""Layout of such a matrix that the threads of a warpgroup copy."""


def filled_up(width: int) -> int:
    """The least multiple of QUANTUM that is not below `width`."""
    return width + -width % QUANTUM


def row_major(shape: tuple[int, ...]) -> Any:
    """float32 whose slices may start at any row.

    Without transforms JAX infers a swizzle, whose pattern repeats every 8 rows, and a slice that starts at another row
    is read and written at wrong addresses: a defect of JAX 0.10 to 0.12, see docs/kernel_code.md. Tiles of a row say
    that nothing is exchanged, and those of two channels do so in JAX 0.10 too, which swizzles tiles of 32, 64 or 128
    bytes.
    """
    return plgpu.SMEM(shape, jnp.float32, transforms=(plgpu.TilingTransform((tiles.VECTOR,)),))


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Matrices that tensor cores read, their rows as wide as a multiple of QUANTUM."""
    tiling = plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(SWIZZLE)))
