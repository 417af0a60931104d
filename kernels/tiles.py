"""How the GPU kernel cuts an image: the channels of a block, the threads of a line, and what fits on chip.

What differs between GPUs comes from `devices`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from gspn_jax.kernels import compat
from gspn_jax.kernels.devices import Device
from gspn_jax.kernels.terms import SKIP

WARPGROUP = 128
VECTOR = 2
"""Neighbouring channels that one thread takes: 4 bytes of bfloat16 at a time."""
QUANTUM = WARPGROUP * VECTOR
"""Elements of a line that one warpgroup takes at once: positions along the line times channels."""
HANDED_ON = {True: 2, False: 3}
"""Values a position that a line of the backward pass hands to the next one in shared memory, in a joint plan and in
another; there the third, which stays at its position, would be several tiles of registers."""
APART = 3
"""Bytes of a map whose directions do not meet on chip, where one whose directions do has 2: 66 an element and 44."""
SLABS = (64, 32, 16, 8)
"""Channels that a block may take, best first: 64 of bfloat16 are a whole 128-byte cache line."""
NARROWEST = 4
"""Channels that a block takes of lines for which it has no room otherwise: 8 bytes of bfloat16 of a sector of 32."""
SPARE = 4
"""Numbers between positions in shared memory of which a warp reads every second: two of them are then 8 banks apart,
the width of what it reads of each."""
NARROW = 32
"""Directions meet on chip in no narrower slabs, unless there are no more channels, or none that share weights."""
PRODUCT = 512
"""Elements of the smallest product that a warpgroup makes of a proxy in registers."""
PRODUCTS = (64, 32, 16)
"""Channels that its rows may be."""
DEPTH = 16
"""The width of a proxy of which tensor cores make one product at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How an image [height, width, channels] is walked; `rows` and `columns` say so for lines that are rows or columns.

    `joint`: a block has one warpgroup for each direction, and they add up their results in shared memory. Otherwise a
    block walks in one direction, its warpgroups share each line, and every direction writes its result by itself.
    """

    height: int
    width: int
    channels: int
    slab: int
    joint: bool
    rows: "Lines"
    columns: "Lines"
    warpgroups: int
    rank: int = 0
    """Width of the proxy from which threads expand terms in registers, if they do."""
    kinds: int = 0
    """Terms of a pixel that they expand it to."""
    backward: bool = True
    """True if a block has room for the backward pass, which takes more than the forward pass."""

    @property
    def keeps_factors(self) -> bool:
        """True where factors of a proxy are in shared memory, for they would fill the registers."""
        return self.rank > DEPTH

    @property
    def slabs(self) -> int:
        return math.ceil(self.channels / self.slab)

    @property
    def sharing(self) -> int:
        """Warpgroups that share the lines of a direction."""
        return 1 if self.joint else self.warpgroups

    def walked_whole(self) -> "Plan":
        """The same with lines that fill the map up walked like others."""
        rows = dataclasses.replace(self.rows, count=self.height)
        return dataclasses.replace(self, rows=rows, columns=dataclasses.replace(self.columns, count=self.width))

    def lines(self, direction: str) -> "Lines":
        """The cut of the lines of scans in `direction`."""
        return self.rows if direction in ("down", "up") else self.columns

    def scan_bytes(self, directions: int) -> int:
        """Bytes of shared memory in the backward pass, or forward if that has no room."""
        state = 2 * self.handed_on * self.state_positions * self.row * 4
        if self.keeps_factors:
            state += 2 * self.kinds * self.slab * self.rank
        return directions * state + 4 * math.prod(self.total) if self.joint else state

    @property
    def total(self) -> tuple[int, int, int]:
        """Numbers that shared memory has for a map where directions meet, by height, width and channel; with a
        position that is spare lines that are columns find other banks as well."""
        return self.height, self.room(self.rows) + (self.rank > 0), self.row

    @property
    def row(self) -> int:
        """Numbers of a position in shared memory: those of a slab and what is spare."""
        return self.slab + (SPARE if self.rank else 0)

    @property
    def computed(self) -> int:
        """Positions that are computed in one of the directions, on average of rows and columns."""
        lines = ((lines.count, self.sharing * lines.tiles * lines.positions) for lines in (self.rows, self.columns))
        return sum(map(math.prod, lines)) // 2

    @property
    def layout(self) -> object:
        """How a tile is spread over the threads of a warpgroup."""
        if self.rank:
            return product_layout(self.slab)
        return layout(self.slab)

    @property
    def handed_on(self) -> int:
        """Values a position that a line hands to the next one in the pass that takes more."""
        return HANDED_ON[self.joint] if self.backward else 1

    @property
    def state_positions(self) -> int:
        """Positions of a block's line of the longer kind, with one beyond each end."""
        return max(map(self.room, (self.rows, self.columns))) + 2

    def room(self, lines: "Lines") -> int:
        """Positions that shared memory has for a line: whole tiles."""
        return _up(self.sharing * lines.stretch, lines.positions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """`count` lines of `length` positions; a warpgroup takes a stretch of each in tiles of `positions`.

    Where `positions` does not divide the stretch its last tile overlaps the one before it, as slabs of channels do.
    """

    count: int
    length: int
    stretch: int
    """The line itself, filled up to a tile if it is shorter than one, or an equal part of it."""
    positions: int

    @property
    def tiles(self) -> int:
        """Number of tiles of a stretch."""
        return math.ceil(self.stretch / self.positions)

    @property
    def overlap(self) -> bool:
        return self.stretch % self.positions > 0

    def start(self, n: Any) -> Any:
        """First position of the n-th tile, from the start of the stretch."""
        if not self.overlap:
            return n * self.positions
        last = self.stretch - self.positions
        return min(n * self.positions, last) if isinstance(n, int) else lax.min(n * self.positions, last)


def make_plan(
    height: int,
    width: int,
    channels: int,
    *,
    directions: int,
    device: Device,
    group: int | None = None,
    rank: int = 0,
    kinds: int = 0,
    backward: bool = True,
) -> Plan | None:
    """The plan with the least padding, then the fewest bytes and positions computed, then the widest slab; None when
    no line of the map fits in shared memory.

    Lines for which `Device.scan_bytes` are too few get all the shared memory that there is, then narrower slabs.
    `group`: channels that share their weights, to which a block's belong; None if each has its own.
    `rank`: threads expand a proxy of that width to so many `kinds` of terms of a pixel.
    `backward`: whether the backward pass must have room.
    """
    any_slab = group in (None, channels)
    slabs = [slab for slab in (PRODUCTS if rank else SLABS) if any_slab or group % slab == 0]
    rooms = [(device.shared_bytes, slabs)]  # bytes of shared memory and channels that a block may take, best first
    if not rank:
        rooms = [(device.scan_bytes, slabs), *rooms, (device.shared_bytes, [NARROWEST] * any_slab)]
    best, least = None, (math.inf,) * 3
    may_be_joint = directions > 1 and (device.shared_joint or not group)
    may_be_joint = may_be_joint and (device.skip_joint or kinds <= SKIP)
    apart_tile = (group and device.shared_tile) or device.apart_tile
    any_layout = compat.STORES_ANY_LAYOUT or compat.interpreting()
    candidates = ((n, joint, slab) for n, (_, slabs) in enumerate(rooms) for joint in (True, False) for slab in slabs)
    for n, joint, slab in candidates:
        if joint and not (may_be_joint and slab >= min(NARROW, group or channels)):
            continue
        if slab < NARROW and (joint or group) and not any_layout:
            continue  # does not lower for every map
        quantum = (PRODUCT if rank else QUANTUM) // slab
        sides = max(height, quantum), max(width, quantum)
        tile = device.joint_tile if joint else apart_tile
        shares, stretches = _cut(sides[::-1], quantum, tile // slab, (1,) if joint else (1, 2, 4))
        rows, columns = (
            Lines(count=count, length=length, stretch=stretch, positions=positions)
            for count, length, (stretch, positions) in zip((height, width), (width, height), stretches, strict=True)
        )
        plan = Plan(
            height=sides[0],
            width=sides[1],
            channels=max(_up(channels, VECTOR), slab),
            slab=slab,
            joint=joint,
            rows=rows,
            columns=columns,
            warpgroups=directions if joint else shares,
            rank=rank,
            kinds=kinds,
            backward=backward,
        )
        if plan.scan_bytes(directions) > rooms[n][0]:
            continue
        cost = n, plan.height * plan.width * plan.channels, plan.computed * plan.channels * (2 if joint else APART)
        if cost < least:
            best, least = plan, cost
    return best


def _cut(lengths: Sequence[int], quantum: int, most: int, shares: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """(warpgroups that share a line, (stretch, positions of a tile) for lines of each of the lengths).

    Tiles are whole quanta, up to `most` positions. Of the cuts that compute no more than a seventh twice, that is
    taken which computes most at a time, and then the one with the largest tiles: 56 positions are four stretches of
    14, each two tiles of 8.
    """

    def cost(stretch: int, positions: int) -> int:
        return max(7 * _up(stretch, positions), 8 * stretch)

    def positions(stretch: int) -> int:
        choices = range(quantum, min(max(most, quantum), stretch) + 1, quantum)
        return min(choices, key=lambda choice: (cost(stretch, choice), -choice))

    cuts = {
        n: [(length // n, positions(length // n)) for length in lengths]
        for n in shares
        if all(length % n == 0 and length // n >= quantum for length in lengths)
    }

    def order(n: int) -> tuple[int, int, int]:
        tile = min(positions for _, positions in cuts[n])
        return sum(n * cost(*cut) for cut in cuts[n]), -n * tile, -tile

    best = min(cuts, key=order)
    return best, cuts[best]


def _up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def layout(slab: int) -> object:
    """Spreads a tile [positions, slab] over a warpgroup: a thread takes VECTOR channels of every few positions."""
    lanes = slab // VECTOR
    if lanes == 32:
        tiles, warp, lane = ((4, slab), (VECTOR,)), (-3,), (-2,)
    else:  # a warp takes several positions
        tiles, warp, lane = ((QUANTUM // slab, slab), (32 // lanes, slab), (VECTOR,)), (-5,), (-3, -2)
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=warp, lane_dims=lane, vector_dim=-1)


def product_layout(slab: int) -> object:
    """Spreads a tile [positions, slab] as a product of a proxy leaves it: a warp has 16 channels, a thread two
    positions of two channels of every 8 positions. A warp reads 32 contiguous bytes of bfloat16 a position."""
    positions = PRODUCT // slab
    tiling = plgpu.Tiling(((positions, slab), (8, 16), (VECTOR, VECTOR)))
    warps = (*[-5] * (slab > 16), *[-6] * (positions > 8))  # by channels, and by positions
    return plgpu.Layout.TILED(tiling, warp_dims=warps, lane_dims=(-3, -4), vector_dim=-1)
