"""Mosaic GPU swizzles shared memory whose slices start at any row, and then stores and loads at wrong addresses.

    python repro_swizzle.py             # on a GPU of compute capability 9.0; JAX 0.11.2 and 0.12.0.1 have the defect

A tile of 16 rows is stored at row 0 and then at row 1 of a buffer; rows 0 to 15 are loaded. Row 0 must be row 0 of the
tile and row i + 1 must be row i. Of 1,024 values 960 are others: of the right row, from other columns. Cause and a
repair are told in docs/kernel_code.md. Nothing here is of this project but the file.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

X = jnp.arange(16 * 64, dtype=jnp.float32).reshape(16, 64)
EXPECTED = np.concatenate([X[:1], X[:-1]])
LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((4, 64), (2,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def body(x, y, shared):
    tile = plgpu.load(x, layout=LAYOUT, optimized=False)
    shared[pl.ds(0, 16), :] = tile
    shared[pl.ds(1, 16), :] = tile
    y[...] = plgpu.load(shared.at[pl.ds(0, 16)], layout=LAYOUT, optimized=False)


def shift_rows(*transforms):
    """The kernel, with a buffer that has these transforms: those that JAX infers, or plgpu.TilingTransform((64,))."""
    return plgpu.kernel(
        body, out_type=X, grid=(1,), grid_names=("block",), num_threads=1, thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((18, 64), jnp.float32, transforms=transforms)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup))  # fmt: skip


if __name__ == "__main__":
    for name, transforms in (("as JAX infers", []), ("row-major", [plgpu.TilingTransform((64,))])):
        wrong = int((np.asarray(jax.jit(shift_rows(*transforms))(X)) != EXPECTED).sum())
        print(f"JAX {jax.__version__}, {name}: {wrong} of {EXPECTED.size} values are wrong")
