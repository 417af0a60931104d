"""Terms from a proxy, expanded in registers: the plain kernel computes them tile by tile and reads none.

A tile is one product a kind on tensor cores (mma.sync): factors [slab, d] times proxy [d, positions]. The factors of a
narrow proxy stay in registers for all lines, those of a wider one in shared memory; a tile of the proxy comes with one
of x. A product leaves a thread two positions of channels n and n + 8 of every 16; rows of the factors are in an order
that makes them neighbours (`channels`).
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import compat, instructions, shared_memory, tiles
from gspn_jax.kernels.terms import LAM, OUT_GATE, Inputs
from gspn_jax.kernels.walk import Walk


def filled_up(rank: int) -> int:
    """The width to which a proxy of `rank` is filled up."""
    return tiles.DEPTH if rank <= tiles.DEPTH else shared_memory.filled_up(rank)


def channels(slab: int) -> np.ndarray:
    """The channel of a slab that each row of its factors has."""
    row = np.arange(slab)
    return row // 16 * 16 + row % 8 * 2 + row % 16 // 8


def scratch(plan: tiles.Plan, inputs: Inputs) -> Any:
    """Shared memory for factors [K or 1, N, slab, d]."""
    directions, _, kinds, slab, rank = inputs.up.shape
    return shared_memory.swizzled((directions if plan.joint else 1, kinds, slab, rank), inputs.x.dtype)


class FromProxy(NamedTuple):
    """Terms of a walk's tiles."""

    inputs: Inputs
    walk: Walk
    factors: Any
    """Factors [slab, d] of each kind in registers, or `scratch`."""

    @classmethod
    def begin(cls, inputs: Inputs, walk: Walk, scratch: Any) -> "FromProxy":
        """Brings the factors for the slab and direction of a walk; in shared memory they are seen once a line began."""
        sources = [inputs.up.at[walk.k, lax.axis_index("slab"), kind] for kind in range(inputs.up.shape[2])]
        whole = (slice(None),) * 2
        if not walk.plan.keeps_factors:
            layout = _layouts(walk.plan.slab)[0]
            return cls(inputs, walk, [compat.load(source, whole, layout) for source in sources])

        def copy(kind: int) -> None:
            compat.store(scratch.at[held, kind], whole, compat.load(sources[kind], whole, shared_memory.COPIED))

        held = walk.k if walk.plan.joint else 0
        for kind in range(len(sources)):
            if walk.plan.sharing == 1:
                copy(kind)
            else:
                pl.when(walk.warpgroup == kind % walk.plan.sharing)(functools.partial(copy, kind))
        return cls(inputs, walk, scratch.at[held])

    def load(self, t: Array, position: Any, _kinds: Iterable[int]) -> Float[Array, "P d"]:
        """A tile of the proxy, which all kinds of terms are made of."""
        index = (self.walk.image, *self.walk.pixels(t, position), slice(None))
        return compat.load(self.inputs.proxy, index, _layouts(self.walk.plan.slab)[1])

    def term(self, proxy: Float[Array, "P d"], kind: int) -> Float[Array, "P slab"]:
        """One of the terms of a tile, in `tiles.product_layout`; lam and out_gate are 1 more than the product."""
        if self.walk.plan.keeps_factors:
            index = (kind, slice(None), slice(None))
            factors = compat.load(self.factors, index, _layouts(self.walk.plan.slab)[0])
        else:
            factors = self.factors[kind]
        product = _product(factors, proxy)
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
    """Multiplies, and names registers anew before and afterwards, so that nothing moves: a proxy is read as the right
    operand lies, and the products of two rows are pairs of channels."""
    (slab, _), (positions, rank) = factors.shape, proxy.shape
    right_layout, sum_layout = (
        layout(jnp.bfloat16, m_warps=slab // 16).to_mgpu() for layout in (plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
    )
    right = _fragmented(np.asarray(proxy.registers).swapaxes(0, 1), right_layout, (rank, positions))
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
    warps, positions, tiling = slab // 16, tiles.PRODUCT // slab, ((8, tiles.DEPTH), (8, 8), (2,))
    spread = (plgpu.Replicated(warps),) if warps > 1 else ()  # they have other channels
    if positions > 8:  # and others other positions
        tiling, spread = ((positions, tiles.DEPTH), *tiling), (*spread, -7)
    columns = plgpu.Layout.TILED(plgpu.Tiling(tiling), warp_dims=spread, lane_dims=(-3, -2), vector_dim=-1)
    return plgpu.Layout.MMA_LHS(jnp.bfloat16, m_warps=warps), columns
