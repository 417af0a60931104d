"""The kernel for chunk=2 on GPUs other than those of compute capability 9.0: threads load and store, and tensor cores
read registers (mma.sync).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import compat, shared_memory
from gspn_jax.kernels.local_block import LAYOUT, Class, Next, piece_at, pixel_layout
from gspn_jax.kernels.local_pieces import PIXELS

LEFT, RIGHT, SUM = (
    getattr(plgpu.Layout, name)(jnp.bfloat16) if hasattr(plgpu.Layout, name) else None
    for name in ("MMA_LHS", "MMA_RHS", "MMA_ACC")
)
"""Layouts of the operands and the sum of `compat.mma`; JAX has them since 0.11.2."""

BY_ROWS = plgpu.Layout.TILED(plgpu.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
"""Layout of [rows, slab] beyond a piece that threads copy."""


class ByThreads(Class):
    """Threads load the next pixels to registers while this piece is computed, and the proxy where products take it."""

    def walk(self, pieces: int, visit: Callable[[Class, Next], Any]) -> None:
        """As `ByCopies.walk`."""
        self._bring_factors()
        self._clear()
        self.meet()
        self._bring_beyond(piece_at(pieces, 0), jnp.int32(0))
        self._put_pixels(self._load_pixels(piece_at(pieces, 0)))

        @pl.loop(0, pieces)
        def _(n):
            here = self.asked_again()._replace(piece=piece_at(pieces, n), slot=lax.rem(n, jnp.int32(2)))

            def pixels():
                return here._load_pixels(piece_at(pieces, n + 1))

            def beyond():
                here._bring_beyond(piece_at(pieces, n + 1), 1 - here.slot)

            here._put_pixels(visit(here, Next(pixels=pixels, proxy=lambda: None, beyond=beyond)))

    def expand(self, *wanted: tuple[Array, slice], meanwhile: Callable = tuple) -> tuple[list, Any]:
        """As `ByCopies.expand`, one after the other."""
        value = meanwhile()
        products = []
        for direction, found in wanted:
            if products and not self.job.skip:
                compat.warpgroup_barrier()  # or ptxas loads the proxy ahead, and spills; with skip it spills more so
            products.append(self._products(direction, self._kinds(found)))
        return products, value

    def _products(self, direction: Array, kinds: range) -> list[Float[Array, "64 slab"]]:
        sums, step = [compat.zeros((PIXELS, self.slab), SUM) for _ in kinds], shared_memory.QUANTUM
        for start in range(0, self.given.proxy.shape[-1], step):
            part = pl.ds(start, step)
            proxy = compat.load(self.given.proxy, (self.piece, self.index, slice(None), part), LEFT)
            for n, kind in enumerate(kinds):
                place = direction, pl.ds(kind * self.slab, self.slab), part
                sums[n] = compat.mma(sums[n], proxy, compat.load_transposed(self.shared.up, place, RIGHT))
        return [compat.layout_cast(total, LAYOUT) for total in sums]

    def _bring_factors(self) -> None:
        """Each class has one direction's."""
        whole = (slice(None),) * 2
        factors = compat.load(self.given.up.at[lax.axis_index("slab"), self.index], whole, shared_memory.COPIED)
        compat.store(self.shared.up.at[self.index], whole, factors)

    def _load_pixels(self, piece: Array) -> list[Array]:
        return [compat.load(source, self.place(piece), pixel_layout(self.slab)) for source in self.given.sources]

    def _put_pixels(self, tiles: list[Array]) -> None:
        for n, tile in enumerate(tiles):
            compat.store(self._pixels(n), (slice(None),) * 3, tile)
        compat.warpgroup_barrier()

    def _bring_beyond(self, piece: Array, slot: Array) -> None:
        """A quarter for all classes, which are done with the slot; they see it after they have met."""
        if self.given.beyond is not None:
            source, target = self._quarter_beyond(piece, slot)
            whole = (slice(None),) * 2
            compat.store(target, whole, compat.load(source, whole, BY_ROWS))
