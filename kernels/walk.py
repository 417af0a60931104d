"""What one warpgroup of the GPU kernel does between its loads and stores: where it walks, whom it meets.

docs/kernel.md has the picture.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import compat, instructions, tiles
from gspn_jax.kernels.terms import Job


class Walk(NamedTuple):
    """One direction of one image and slab of channels, as one warpgroup sees it."""

    k: int
    direction: str
    job: Job
    plan: tiles.Plan
    image: Array
    start: Array
    """The slab's first channel."""
    warpgroup: Array
    backwards: bool = False
    """Whether lines are visited from the last to the first."""

    @property
    def lines(self) -> tiles.Lines:
        return self.plan.lines(self.direction)

    def positions(self) -> list[Any]:
        """First positions of the tiles of a line that this warpgroup takes."""
        if self.lines.overlap:
            first = 0 if self.plan.joint else self.warpgroup * self.lines.stretch
            return [first + self.lines.start(n) for n in range(self.lines.tiles)]
        first = 0 if self.plan.joint else self.warpgroup * self.lines.tiles
        return [(first + n) * self.lines.positions for n in range(self.lines.tiles)]

    def once(self, position: Any, tile: Float[Array, "P slab"]) -> Float[Array, "P slab"]:
        """The tile at `position`, or zeros at positions that the tile before it has too."""
        if not self.lines.overlap:
            return tile
        before = lax.rem(jnp.int32(position - self.positions()[0]), jnp.int32(self.lines.positions))
        shared = jnp.where(before == 0, 0, self.lines.positions - before)
        return jnp.where(compat.iota(tile.shape, 0, self.plan.layout) < shared, 0.0, tile)

    def await_tile_before(self, n: Any) -> None:
        """Before the n-th tile is stored to shared memory: the one before it is, with which it may have positions in
        common."""
        if self.lines.overlap and not (isinstance(n, int) and n != self.lines.tiles - 1):
            compat.warpgroup_barrier()

    def visited(self, n: Any) -> Any:
        """The n-th line that is visited."""
        return self.lines.count - 1 - n if self.backwards else n

    def line(self, t: Any) -> Any:
        """Which row or column of the map the t-th line is."""
        return t if self.direction in ("down", "right") else self.lines.count - 1 - t

    def unless_first(self, t: Array, tile: Array) -> Array:
        """The tile, or zeros on a line that has no line before it."""
        chunk = self.job.chunk
        first = t == 0 if chunk is None or chunk >= self.lines.count else t % chunk == 0
        return jnp.where(jnp.broadcast_to(first, tile.shape), 0.0, tile)

    def pixels(self, t: Array, position: Any, halo: int = 0) -> tuple[Any, Any]:
        """(row, column) index of a tile on the t-th line; `halo` positions are kept before the first."""
        along = pl.ds(position + halo, self.lines.positions)
        return (self.line(t), along) if self.direction in ("down", "up") else (along, self.line(t))

    def index(self, t: Array, position: Any, *middle: int, halo: int = 0) -> tuple:
        """Index of a tile in an array [B, H, W, ..., C]."""
        return (self.image, *self.pixels(t, position, halo), *middle, pl.ds(self.start, self.plan.slab))

    def read(self, ref: Any, index: tuple) -> Float[Array, "P slab"]:
        """A tile in float32."""
        return self.widened(compat.load(ref, index, self.plan.layout))

    def widened(self, tile: Float[Array, "P slab"] | Float[Array, "P"]) -> Float[Array, "P slab"] | Float[Array, "P"]:
        """The same in float32."""
        return instructions.widened(tile, self._layout_of(tile))

    def load_weight(self, ref: Any, t: Array, position: Any, kind: int) -> Float[Array, "P slab"] | Float[Array, "P"]:
        """A tile of one of the three weights, as it is in memory; a number a position where channels share it."""
        *pixel, channels = self.index(t, position, self.k, kind)
        if not self.job.shared:
            return compat.load(ref, (*pixel, channels), self.plan.layout)
        group = lax.div(self.start, self.plan.channels // ref.shape[-1])
        return compat.load(ref, (*pixel, group), self.plan.layout.reduce(1))

    def spread(self, tile: Array) -> Float[Array, "P slab"]:
        """What channels share, for each of them."""
        shape = self.lines.positions, self.plan.slab
        return tile if tile.ndim == 2 else lax.broadcast_in_dim(tile, shape, (0,))

    def reciprocal(
        self, tile: Float[Array, "P slab"] | Float[Array, "P"]
    ) -> Float[Array, "P slab"] | Float[Array, "P"]:
        """1 / tile; numbers below 2**-126 in size count as zero."""
        return instructions.reciprocal(tile, self._layout_of(tile))

    def _layout_of(self, tile: Float[Array, "P slab"] | Float[Array, "P"]) -> Any:
        return self.plan.layout if tile.ndim == 2 else self.plan.layout.reduce(1)

    def sum_of_channels(self, tile: Float[Array, "P slab"]) -> Float[Array, "P"]:
        """Over the channels of this slab that the one before it does not have."""
        if self.plan.channels % self.plan.slab:
            channel = compat.iota(tile.shape, 1, self.plan.layout) + self.start
            tile = jnp.where(channel >= lax.axis_index("slab") * self.plan.slab, tile, 0.0)
        return tile.sum(1)

    def read_merge(self, merge: Any) -> Float[Array, "P slab"] | None:
        """The factors of this direction's channels, spread over the positions of a tile: two numbers a thread."""
        if merge is None:
            return None
        factors = compat.load(merge, (self.k, pl.ds(self.start, self.plan.slab)), self.plan.layout.reduce(0))
        return lax.broadcast_in_dim(factors, (self.lines.positions, self.plan.slab), (1,))

    def state(self, parity: Array | int, kind: int, position: Any, offset: int) -> tuple:
        """Index in the state of the tile at `position`, or of its left (offset 0) or right (2) neighbours."""
        at = pl.ds(position + offset, self.lines.positions)
        return (self.k if self.plan.joint else 0, parity, kind, at, self.channels)

    @property
    def channels(self) -> Any:
        """Those of a tile in shared memory."""
        return pl.ds(0, self.plan.slab) if self.plan.rank else slice(None)

    def neighbours(self, position: Any, *, shared: bool = False) -> tuple[Array, Array]:
        """Whether each element of a tile, or position if `shared`, has a left and a right neighbour in the map."""
        shape, layout = (self.lines.positions, self.plan.slab), self.plan.layout
        if shared:
            shape, layout = shape[:1], layout.reduce(1)
        at = compat.iota(shape, 0, layout) + position
        return at > 0, at < self.lines.length - 1


def visit_mine(job: Job, plan: tiles.Plan, visit: Callable[[Walk], None]) -> None:
    """Calls `visit` with the walk that is this warpgroup's."""
    image, slab = lax.axis_index("image"), lax.axis_index("slab")
    warpgroup = lax.axis_index("warpgroup") if plan.warpgroups > 1 else jnp.int32(0)
    mine = warpgroup if plan.joint else lax.axis_index("direction")
    # the last slab overlaps the one before it where the slab does not divide the channels
    start = pl.multiple_of(lax.min(slab * plan.slab, plan.channels - plan.slab), tiles.VECTOR)
    for k, direction in enumerate(job.directions):
        walk = Walk(k=k, direction=direction, job=job, plan=plan, image=image, start=start, warpgroup=warpgroup)
        if len(job.directions) == 1:
            visit(walk)
        else:
            pl.when(mine == k)(functools.partial(visit, walk))


class Shared(NamedTuple):
    """What the warpgroups of a block share."""

    state: Any
    """[direction, parity, kind, position + 1, channel]: values that a line hands to the next one."""
    total: Any
    """[H, W, channel]: where the directions meet, if the plan is joint."""
    turn: Any
    """One barrier for each direction: its turn to add to `total`."""
    meeting: Any
    """All warpgroups are here."""
    factors: Any
    """By which they expand a proxy in registers, where those have no room: see `from_proxy.scratch`."""


def meet(plan: tiles.Plan, shared: Shared) -> None:
    """All warpgroups of the block are here: what one wrote before, all see afterwards."""
    if plan.warpgroups > 1:
        plgpu.barrier_arrive(shared.meeting)
        plgpu.barrier_wait(shared.meeting)
    else:
        compat.warpgroup_barrier()


def begin_line(plan: tiles.Plan, shared: Shared) -> None:
    """All threads that share a line are here: what the line before wrote to the state is seen.

    As the state has two buffers, this is also all that keeps a line from overwriting what the one before still reads.
    Loads issued before it stay before it, under the computation of the line.
    """
    if plan.joint:
        compat.warpgroup_barrier()
    else:
        meet(plan, shared)


def clear(walk: Walk, shared: Shared, kinds: int) -> None:
    """Zeroes the state before the first line, the position beyond each end included, and the total.

    Others see the zeros once a line began, or all met.
    """
    plan, positions = walk.plan, walk.lines.positions
    zeros = compat.zeros((positions, plan.slab), plan.layout)

    def clear_at(position: Any, offset: int) -> None:
        for parity, kind in itertools.product((0, 1), range(kinds)):
            shared.state[walk.state(parity, kind, position, offset)] = zeros

    def clear_end(position: Any) -> None:
        """The two positions beyond the last tile; it is stored to once more, by other threads."""
        compat.warpgroup_barrier()
        clear_at(position, 2)

    def clear_line() -> None:
        tiles = plan.room(walk.lines) // positions
        pl.loop(0, tiles)(lambda n: clear_at(n * positions, 0))
        clear_end((tiles - 1) * positions)

    if not plan.joint:
        pl.when(walk.warpgroup == 0)(clear_line)
        return
    clear_line()
    if walk.k == 0:  # the first to add

        @pl.loop(0, plan.height)
        def _(row):
            for position in range(0, plan.room(walk.lines), walk.lines.positions):
                shared.total[row, pl.ds(position, walk.lines.positions), walk.channels] = zeros

    if walk.k == len(walk.job.directions) - 1:
        plgpu.barrier_arrive(shared.turn.at[0])


def take_turn(walk: Walk, shared: Shared, t: Array, results: Sequence[tuple[Any, Array]]) -> None:
    """Adds what this direction has for line t, as (position, tile), to the total.

    The directions do so in turns, always in the same order, so that the sum is the same every time.
    """
    plgpu.barrier_wait(shared.turn.at[walk.k])
    for n, (position, tile) in enumerate(results):
        walk.await_tile_before(n)
        index = (*walk.pixels(t, position), walk.channels)
        compat.store(shared.total, index, walk.read(shared.total, index) + walk.once(position, tile))
    plgpu.barrier_arrive(shared.turn.at[(walk.k + 1) % len(walk.job.directions)])


def finish(walk: Walk, shared: Shared, output: Any) -> None:
    """Stores the total, each warpgroup some rows, once all directions have had their last turn."""
    plan, directions = walk.plan, len(walk.job.directions)
    if not plan.joint:
        return

    @pl.loop(walk.lines.count, max(plan.rows.count, plan.columns.count))
    def _(_):  # a direction with fewer lines lets the others pass
        plgpu.barrier_wait(shared.turn.at[walk.k])
        plgpu.barrier_arrive(shared.turn.at[(walk.k + 1) % directions])

    if walk.k == 0:
        plgpu.barrier_wait(shared.turn.at[0])
    meet(plan, shared)
    rows = plan.rows

    @pl.loop(0, pl.cdiv(plan.height - walk.k, directions))
    def _(n):
        row = n * directions + walk.k
        for position in map(rows.start, range(rows.tiles)):
            along = pl.ds(position, rows.positions)
            tile = walk.read(shared.total, (row, along, walk.channels))
            compat.store(output, (walk.image, row, along, pl.ds(walk.start, plan.slab)), tile)
