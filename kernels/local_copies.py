"""The kernel for chunk=2 on compute capability 9.0: the copy engine brings the next piece while this one is computed,
and tensor cores read shared memory (wgmma).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import compat
from gspn_jax.kernels.local_block import Class, Next, piece_at
from gspn_jax.kernels.local_pieces import CLASSES, PIXELS


class ByCopies(Class):
    """Copies of the next piece are on their way while this one is computed."""

    def walk(self, pieces: int, visit: Callable[[Class, Next], Any]) -> None:
        """Calls `visit` for each piece of this block."""
        proxies, at = self.shared.proxy.shape[0], functools.partial(piece_at, pieces)
        self._send_for_factors()
        for n in range(proxies):
            self._send_for_proxy(at(n), jnp.int32(n))
        self._send_for_pixels(at(0), jnp.int32(0))
        self._clear()
        if not self.cut.single:
            plgpu.commit_smem()
            self.meet()  # copies overwrite most of it
        self._send_for_beyond(at(0), jnp.int32(0))
        self._await_factors()

        @pl.loop(0, pieces)
        def _(n):
            here = self.asked_again()._replace(
                piece=at(n), slot=lax.rem(n, jnp.int32(2)), proxy_slot=lax.rem(n, jnp.int32(proxies))
            )
            plgpu.commit_smem()  # all threads have read the piece that the next copy overwrites
            here._send_for_pixels(at(n + 1), 1 - here.slot)
            here._await_pixels(here.slot)
            here._await_proxy(here.proxy_slot)

            def proxy():
                compat.warpgroup_barrier()
                here._send_for_proxy(at(n + proxies), here.proxy_slot)

            def beyond():
                here._send_for_beyond(at(n + 1), 1 - here.slot)

            visit(here, Next(pixels=tuple, proxy=proxy, beyond=beyond))

        for n in range(proxies):  # no copy may outlive the block
            self._await_proxy(jnp.int32((pieces + n) % proxies))
        self._await_pixels(jnp.int32(pieces % 2))

    def expand(self, *wanted: tuple[Array, slice], meanwhile: Callable = tuple) -> tuple[list, Any]:
        """Products of proxy and factors for each direction and kinds that are wanted, and the value of `meanwhile`,
        which runs beside them. lam and out_gate are 1 more than theirs.
        """
        kinds = [self._kinds(found) for _, found in wanted]

        def product(*accumulators):
            for accumulator, (direction, _), found in zip(accumulators, wanted, kinds, strict=True):
                factors = self.shared.up.at[direction, pl.ds(found[0] * self.slab, len(found) * self.slab)]
                compat.wgmma(accumulator, self.shared.proxy.at[self.proxy_slot, self.index], factors)
            value = meanwhile()
            return [accumulator[...] for accumulator in accumulators], value

        shapes = [plgpu.ACC((PIXELS, len(found) * self.slab), jnp.float32) for found in kinds]
        products, value = pl.run_scoped(product, *shapes)
        return [self._tiles(columns) for columns in products], value

    def _tiles(self, products: Float[Array, "64 columns"]) -> list[Float[Array, "64 slab"]]:
        """Splits products by kind."""
        return [products[:, start : start + self.slab] for start in range(0, products.shape[1], self.slab)]

    def _send_for_factors(self) -> None:
        """Each class has one direction's."""
        plgpu.copy_gmem_to_smem(
            self.given.up.at[lax.axis_index("slab"), self.index],
            self.shared.up.at[self.index],
            self.shared.arrivals.up.at[self.index],
        )

    def _await_factors(self) -> None:
        for direction in range(CLASSES):
            plgpu.barrier_wait(self.shared.arrivals.up.at[direction])

    def _send_for_proxy(self, piece: Array, slot: Array) -> None:
        plgpu.copy_gmem_to_smem(
            self.given.proxy.at[piece, self.index],
            self.shared.proxy.at[slot, self.index],
            self.shared.arrivals.proxy.at[slot * CLASSES + self.index],
        )

    def _await_proxy(self, slot: Array) -> None:
        plgpu.barrier_wait(self.shared.arrivals.proxy.at[slot * CLASSES + self.index])

    def _send_for_pixels(self, piece: Array, slot: Array) -> None:
        for n, source in enumerate(self.given.sources):
            plgpu.copy_gmem_to_smem(
                source.at[self.place(piece)],
                self.shared.pixels.at[slot, n, self.index],
                self.shared.arrivals.pixels.at[slot * CLASSES + self.index],
            )

    def _await_pixels(self, slot: Array) -> None:
        """Those of this class, and its quarter of what is beyond the piece."""
        plgpu.barrier_wait(self.shared.arrivals.pixels.at[slot * CLASSES + self.index])

    def _send_for_beyond(self, piece: Array, slot: Array) -> None:
        """A quarter for all classes, which are done with the slot; it arrives with the pixels."""
        if self.given.beyond is None:
            return
        plgpu.commit_smem()  # all have read what this overwrites
        source, target = self._quarter_beyond(piece, slot)
        plgpu.copy_gmem_to_smem(source, target, self.shared.arrivals.pixels.at[slot * CLASSES + self.index])
