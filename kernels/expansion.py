"""Logits, lam, out_gate and skip of a line from its proxy, on tensor cores: they never reach device memory.

A block takes 64 positions, the t-th lines of several images side by side, and a slab of 64 channels. Its `up` stays in
shared memory; each line is one product [64, d] x [d, 64] for each of the five or six kinds, which the warpgroups share
out. docs/kernel.md has the picture.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import reference, tiles
from gspn_jax.kernels.terms import LAM, OUT_GATE, SKIP, Inputs, Job
from gspn_jax.kernels.walk import Walk

SWIZZLE = 64
"""Bytes of a row that are interleaved with those of other rows, so that the tensor cores read without conflicts."""
QUANTUM = SWIZZLE // 2
"""The width of a proxy is filled up to a multiple of this."""


class Expansion(NamedTuple):
    """What the warpgroups of a block share to expand the proxy."""

    up: Any
    """[kinds, d, 64 channels] bfloat16"""
    proxy: Any
    """[2, 64 positions, d] bfloat16: the line that is expanded and the one on its way"""
    products: Any
    """[1 or 2, kinds, 64 positions, 64 channels] bfloat16"""
    up_arrived: Any
    proxy_arrived: Any

    @property
    def kinds(self) -> int:
        return self.up.shape[0]

    def begin(self, inputs: Inputs, walk: Walk) -> None:
        """Sends for `up` and the first line."""
        share_out(
            walk.plan,
            walk.warpgroup,
            self.kinds,
            lambda kind: plgpu.copy_gmem_to_smem(
                inputs.up.at[walk.k, lax.axis_index("slab"), kind], self.up.at[kind], self.up_arrived.at[kind]
            ),
        )
        self._send_for_line(inputs, walk, 0)
        share_out(walk.plan, walk.warpgroup, self.kinds, lambda kind: plgpu.barrier_wait(self.up_arrived.at[kind]))

    def expand(self, inputs: Inputs, walk: Walk, n: Any, meanwhile: Callable[[], Any] = tuple) -> Any:
        """Expands the n-th line while `meanwhile` runs, whose value it returns, and sends for the one after it.

        Warpgroups must meet before, where one of them may still read the products that this replaces, and afterwards.
        """
        slot, buffer = _slot(n, 2), _slot(n, self.products.shape[0])
        self._send_for_line(inputs, walk, n + 1)
        plgpu.barrier_wait(self.proxy_arrived.at[slot])

        def expand_kind(kind: Any, meanwhile: Callable[[], Any]) -> Any:
            def product(accumulator):
                plgpu.wgmma(accumulator, self.proxy.at[slot], self.up.at[kind])
                value = meanwhile()
                self.products[buffer, kind] = accumulator[...].astype(self.products.dtype)
                return value

            return pl.run_scoped(product, plgpu.ACC((tiles.ROWS, tiles.SLABS[0]), jnp.float32))

        def expand_another(kind: Array) -> None:
            expand_kind(kind, tuple)

        share_out(walk.plan, walk.warpgroup, self.kinds, expand_another, first=walk.plan.warpgroups)
        return expand_kind(walk.warpgroup, meanwhile)

    def end(self, last: int) -> None:
        """Waits for the line that was sent for when the `last` was expanded: no copy may outlive the block."""
        plgpu.barrier_wait(self.proxy_arrived.at[_slot(last + 1, 2)])

    def read(self, walk: Walk, n: Any, position: Any, kind: int) -> Float[Array, "P slab"]:
        """This warpgroup's tile of the n-th line, in float32; lam and out_gate are 1 more than the product."""
        index = (_slot(n, self.products.shape[0]), kind, pl.ds(walk.row(position), walk.lines.positions), slice(None))
        tile = walk.read(self.products, index)
        return 1.0 + tile if kind in (LAM, OUT_GATE) else tile

    def _send_for_line(self, inputs: Inputs, walk: Walk, n: Any) -> None:
        """Past the last line that one comes again, so that every wait has its arrival."""
        slot, group = _slot(n, 2), lax.axis_index("image")
        line = walk.line(walk.visited(lax.min(jnp.int32(n), walk.lines.count - 1)))
        order = 0 if walk.direction in ("down", "up") else 1

        @pl.when(walk.warpgroup == 0)
        def _():
            source = inputs.proxy.at[order, group, line]
            plgpu.copy_gmem_to_smem(source, self.proxy.at[slot], self.proxy_arrived.at[slot])


def share_out(plan: tiles.Plan, warpgroup: Array, kinds: int, do: Callable[[Array], None], first: int = 0) -> None:
    """Calls `do` with the kinds, from `first`, that are this warpgroup's."""
    for start in range(first, kinds, plan.warpgroups):
        kind = warpgroup + start
        if start + plan.warpgroups <= kinds:
            do(kind)
        else:
            pl.when(kind < kinds)(functools.partial(do, kind))


def _slot(n: Any, slots: int) -> Array:
    """n modulo `slots`; n is not negative, which % would provide for."""
    return lax.rem(jnp.int32(n), jnp.int32(slots))


def inputs(
    plan: tiles.Plan,
    x: Float[Array, "B H W C"],
    proxy: Float[Array, "B H W d"],
    up: Float[Array, "4 N C d"],
    merge: Float[Array, "4 C"],
) -> Inputs:
    """What a launch reads: lines of several images side by side, rows and then columns, and slabs of channels of `up`.

    Both copies are made by XLA; a proxy is a sixteenth of x, and `up` does not grow with the batch.
    """
    batch, height, width, rank = proxy.shape
    lines = proxy.reshape(batch // plan.images, plan.images, height, width, rank)
    orders = lines.transpose(0, 2, 1, 3, 4), lines.transpose(0, 3, 1, 2, 4)
    lines = jnp.stack([order.reshape(*order.shape[:2], tiles.ROWS, rank) for order in orders])
    return Inputs(x, None, None, None, None, merge, lines, slabs(plan, up, x.dtype))


def plain(job: Job, arrays: tuple[Array, ...]) -> Float[Array, "B H W C"]:
    """By `reference`, from x, proxy, up and merge as in `inputs`; the terms are float32 and in device memory."""
    x, proxy, up, merge = arrays
    up = up.astype(x.dtype).astype(jnp.float32)
    terms = jnp.einsum("bhwd,kncd->nbhwkc", proxy.astype(jnp.float32), up)
    gates, skip = jnp.moveaxis(terms[:LAM], 0, 4), terms[SKIP] if job.skip else None
    return reference.propagate(x, gates, 1 + terms[LAM], 1 + terms[OUT_GATE], merge, skip, job.chunk)


def slabs(
    plan: tiles.Plan, up: Float[Array, "4 N C d"], dtype: Any, *, once: bool = False
) -> Float[Array, "4 slabs N d slab"]:
    """`up` by slabs of channels; with `once` channels are zero where the slab before has them too."""
    starts = jnp.minimum(jnp.arange(plan.slabs) * plan.slab, plan.channels - plan.slab)
    channels = starts[:, None] + jnp.arange(plan.slab)
    found = up.astype(dtype)[:, :, channels].transpose(0, 2, 1, 4, 3)
    new = channels >= jnp.arange(plan.slabs)[:, None] * plan.slab
    return jnp.where(new[:, None, None], found, 0) if once and plan.channels % plan.slab else found


def _buffers(states: int) -> int:
    """Forward, where a line hands on one value, the next line is expanded while this one is computed."""
    return 2 if states == 1 else 1


def scratch(inputs: Inputs, states: int) -> Expansion:
    """The shared memory it takes."""
    kinds, rank, slab = inputs.up.shape[2:]
    dtype = inputs.x.dtype
    return Expansion(
        up=swizzled((kinds, rank, slab), dtype),
        proxy=swizzled((2, tiles.ROWS, rank), dtype),
        products=swizzled((_buffers(states), kinds, tiles.ROWS, slab), dtype, 2 * SWIZZLE),
        up_arrived=plgpu.Barrier(num_barriers=kinds),
        proxy_arrived=plgpu.Barrier(num_barriers=2),
    )


def swizzled(shape: tuple[int, ...], dtype: Any, swizzle: int = SWIZZLE) -> Any:
    """Shared memory that tensor cores read."""
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def shared_bytes(kinds: int, rank: int) -> int:
    """Of shared memory, in the pass that takes more, for a proxy of `rank` that expands to so many kinds of terms."""
    slab, rank = tiles.SLABS[0], rank + -rank % QUANTUM
    operands = 2 * rank * (kinds * slab + 2 * tiles.ROWS)
    return operands + max(
        2 * _buffers(states) * kinds * tiles.ROWS * slab + 2 * states * (tiles.ROWS + 2) * slab * 4
        for states in (1, tiles.HANDED_ON[True])
    )
