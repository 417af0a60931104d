"""Terms of a narrow proxy, expanded in registers: the plain kernel computes them tile by tile and reads none.

A tile is one product a kind on tensor cores (mma.sync): factors [slab, d] times proxy [d, positions]. The factors of a
slab stay in registers for all lines; a tile of the proxy comes with one of x. A product leaves a thread two positions
of channels n and n + 8 of every 16; rows of the factors are in an order that makes them neighbours (`channels`).
"""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import compat, instructions, tiles
from gspn_jax.kernels.terms import LAM, OUT_GATE, Inputs
from gspn_jax.kernels.walk import Walk

RANK = 16
"""What proxies are filled up to: the depth of one product. The factors of wider ones would take too many registers."""


def channels(slab: int) -> np.ndarray:
    """The channel of a slab that each row of its factors has."""
    row = np.arange(slab)
    return row // 16 * 16 + row % 8 * 2 + row % 16 // 8


def by_slab(plan: tiles.Plan, up: Float[Array, "K N C d"], dtype: Any) -> Float[Array, "K slabs N slab d"]:
    """Factors as `Inputs.up` has them, the last slab overlapping the one before it."""
    starts = jnp.minimum(jnp.arange(plan.slabs) * plan.slab, plan.channels - plan.slab)
    return up.astype(dtype)[:, :, starts[:, None] + channels(plan.slab)].swapaxes(1, 2)


def load_factors(inputs: Inputs, walk: Walk) -> list[Float[Array, "slab d"]]:
    """Those of each kind, for the slab and direction of a walk."""
    layout = _layouts(walk.plan.slab)[0]
    place, whole = (walk.k, lax.axis_index("slab")), (slice(None),) * 2
    return [compat.load(inputs.up, (*place, kind, *whole), layout) for kind in range(inputs.up.shape[2])]


def load_proxy(inputs: Inputs, walk: Walk, t: Array, position: Any) -> Float[Array, "P d"]:
    """A tile's."""
    index = (walk.image, *walk.pixels(t, position), slice(None))
    return compat.load(inputs.proxy, index, _layouts(walk.plan.slab)[1])


def term(factors: list[Float[Array, "slab d"]], proxy: Float[Array, "P d"], kind: int) -> Float[Array, "P slab"]:
    """One of the terms of a tile, in `tiles.product_layout`; lam and out_gate are 1 more than the product."""
    product = _product(factors[kind], proxy)
    return 1.0 + product if kind in (LAM, OUT_GATE) else product


def _product(factors: Float[Array, "slab d"], proxy: Float[Array, "P d"]) -> Float[Array, "P slab"]:
    (slab, _), (positions, _) = factors.shape, proxy.shape
    if compat.interpreting():
        wide = jnp.dot(proxy, factors.T, preferred_element_type=jnp.float32, precision="highest")
        return wide.reshape(positions, slab // 16, 2, 8).swapaxes(2, 3).reshape(positions, slab)
    left, right = _layouts(slab)
    found = plgpu.ShapeDtypeStruct((positions, slab), jnp.float32, layout=tiles.product_layout(slab))
    return plgpu.inline_mgpu(arg_types=(left, right), return_type=found)(_multiply)(factors, proxy)


def _multiply(_: Any, factors: mgpu.FragmentedArray, proxy: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """What registers hold is named anew, twice, and nothing moves: a proxy is read as the right operand lies, and the
    products of two rows are pairs of channels."""
    (slab, _), (positions, rank) = factors.shape, proxy.shape
    right_layout, sum_layout = (
        layout(jnp.bfloat16, m_warps=slab // 16).to_mgpu() for layout in (plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
    )
    right = _fragmented(np.asarray(proxy.registers), right_layout, (rank, positions))
    total = mgpu.FragmentedArray.splat(instructions.zero(), (slab, positions), sum_layout)
    rows = np.asarray(mgpu.mma(total, factors, right).registers).reshape(-1, 2)
    pairs = [instructions.crossed(*both) for both in rows]
    return _fragmented(np.array(pairs, object), tiles.product_layout(slab).to_mgpu(), (positions, slab))


def _fragmented(registers: np.ndarray, layout: Any, shape: tuple[int, int]) -> mgpu.FragmentedArray:
    registers = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _layouts(slab: int) -> tuple[Any, Any]:
    """Layouts of factors [slab, d] and a proxy [positions, d] that are to be multiplied; None where the interpreter
    runs under a JAX without such products."""
    if not compat.HAS_MMA:
        return None, None
    warps, positions, tiling = slab // 16, tiles.PRODUCT // slab, ((8, RANK), (8, 8), (2,))
    spread = (plgpu.Replicated(warps),)
    if positions > 8:  # some warps have other positions
        tiling, spread = ((positions, RANK), *tiling), (*spread, -7)
    columns = plgpu.Layout.TILED(plgpu.Tiling(tiling), warp_dims=spread, lane_dims=(-3, -2), vector_dim=-1)
    return plgpu.Layout.MMA_LHS(jnp.bfloat16, m_warps=warps), columns
