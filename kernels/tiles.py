"""How the GPU kernel cuts an image: the channels of a block, the threads of a line, and what fits on chip.

What differs between GPUs comes from `devices`.
"""

import dataclasses
import itertools
import math

from jax.experimental.pallas import mosaic_gpu as plgpu

from gspn_jax.kernels.devices import Device

WARPGROUP = 128
VECTOR = 2
"""Neighbouring channels that one thread takes: 4 bytes of bfloat16 at a time."""
QUANTUM = WARPGROUP * VECTOR
"""Elements of a line that one warpgroup takes at once: positions along the line times channels."""
HANDED_ON = {True: 2, False: 3}
"""Values a position that a line of the backward pass hands to the next one in shared memory, in a joint plan and in
another; there the third, which stays at its position, would be several tiles of registers."""
SLABS = (64, 32, 16, 8)
"""Channels that a block may take, best first: 64 of bfloat16 are a whole 128-byte cache line."""
ROWS = 64
"""Positions of a line that a block expands from a proxy at once: the rows of the tensor cores' instruction."""


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
    images: int = 1
    """Images whose lines a block takes side by side."""
    expands: bool = False
    """Whether a block expands its terms from a proxy; its warpgroups then share a line of ROWS positions."""
    across: int = 0
    """Channels that a warp's threads lie across, if not the whole slab: those of a row of shared memory that threads
    write for the tensor cores."""
    blocks: int = 0
    """Blocks that a launch should have at least where that can be chosen."""

    @property
    def slabs(self) -> int:
        return math.ceil(self.channels / self.slab)

    def lines(self, direction: str) -> "Lines":
        """The cut of the lines of scans in `direction`."""
        return self.rows if direction in ("down", "up") else self.columns

    @property
    def layout(self) -> object:
        """How a tile is spread over the threads of a warpgroup."""
        return layout(self.across or self.slab)

    @property
    def handed_on(self) -> int:
        return HANDED_ON[self.joint or self.expands]

    @property
    def state_positions(self) -> int:
        """Positions of a block's line of the longer kind, with one beyond each end."""
        return self.images * max(self.rows.padded, self.columns.padded) + 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """`count` lines of `length` positions, `padded` to whole tiles of `positions`."""

    count: int
    length: int
    padded: int
    positions: int

    @property
    def tiles(self) -> int:
        return self.padded // self.positions


def make_plan(
    height: int, width: int, channels: int, *, directions: int, device: Device, shared_weights: bool = False
) -> Plan | None:
    """The plan with the least padding, then the widest slab; None when no line of the map fits in shared memory.

    `shared_weights`: whether channels of a block share their weights.
    """
    best, least = None, math.inf
    may_be_joint = directions > 1 and (device.shared_joint or not shared_weights)
    apart_tile = (shared_weights and device.shared_tile) or device.apart_tile
    for joint, slab in itertools.product((True, False), SLABS):
        quantum = QUANTUM // slab
        padded_height, padded_width = _up(height, quantum), _up(width, quantum)
        padded_channels = max(_up(channels, VECTOR), slab)
        state = 2 * HANDED_ON[joint] * (max(padded_height, padded_width) + 2) * slab * 4
        shared = directions * state + padded_height * padded_width * slab * 4 if joint else state
        wide_enough = slab >= 32 or slab >= channels
        if shared > device.scan_bytes or (joint and not (wide_enough and may_be_joint)):
            continue
        waste = padded_height * padded_width * padded_channels
        if waste < least:
            tile = device.joint_tile if joint else apart_tile
            rows, columns = (
                Lines(count=count, length=length, padded=padded, positions=_positions(padded, quantum, tile // slab))
                for count, length, padded in ((height, width, padded_width), (width, height, padded_height))
            )
            shares = max(n for n in (1, 2, 4) if rows.tiles % n == columns.tiles % n == 0)
            best = Plan(
                height=padded_height,
                width=padded_width,
                channels=padded_channels,
                slab=slab,
                joint=joint,
                rows=rows,
                columns=columns,
                warpgroups=directions if joint else shares,
            )
            least = waste
    return best


def make_expanding_plan(height: int, width: int, channels: int, *, device: Device) -> Plan | None:
    """The plan of a kernel that expands its terms from a proxy; None for maps and devices that it is not made for.

    A warpgroup takes its positions in two tiles: with one it would spill registers.
    """
    if device.expanding is None:
        return None
    warpgroups, blocks = device.expanding.warpgroups, device.expanding.blocks
    slab, positions = SLABS[0], ROWS // warpgroups
    if height != width or width % positions or ROWS % width or channels < slab or channels % VECTOR:
        return None
    lines = Lines(count=height, length=width, padded=width, positions=positions // 2)
    return Plan(
        height=height,
        width=width,
        channels=channels,
        slab=slab,
        joint=False,
        rows=lines,
        columns=lines,
        warpgroups=warpgroups,
        images=ROWS // width,
        expands=True,
        blocks=blocks,
    )


def _positions(padded: int, quantum: int, most: int) -> int:
    """The most positions, up to `most`, in whole quanta, that divide a line of `padded`."""
    return max(p for p in range(quantum, max(most, quantum) + 1, quantum) if padded % p == 0)


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
