"""A block of the kernel for chunk=2, as each of its warpgroups sees it: a class of pixels, its neighbours in the other
classes, and what the block shares.

How arrays come to the chip, and to its tensor cores, differs between GPUs: see `local_copies` and `local_threads`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import compat, instructions
from gspn_jax.kernels.local_pieces import CLASSES, GRID, PIXELS, Cut
from gspn_jax.kernels.terms import Job

LAYOUT = plgpu.Layout.WGMMA
"""How a tile [pixels of a class, channels] is spread over a warpgroup: as products leave it."""


class Given(NamedTuple):
    """Arrays that a launch reads."""

    x: Any
    """[B H / 2, 2, W / 2, 2, C]: rows and columns by parity"""
    proxy: Any
    """[pieces, 4 classes, 64 pixels, d]"""
    up: Any
    """[slabs, 4 directions, kinds * slab, d]"""
    merge: Any
    """[4, C] float32"""
    cotangent: Any = None
    """Cotangent of y, as x; None forward."""
    beyond: Any = None
    """[pieces, grids * 64 pixels, C]: `local_pieces.beyond`; None for maps of one piece."""

    @property
    def sources(self) -> list[Any]:
        """Arrays of which every pixel is read: x and, backward, the cotangent of y."""
        return [array for array in (self.x, self.cotangent) if array is not None]


class Arrivals(NamedTuple):
    """Barriers at which copies arrive."""

    up: Any
    proxy: Any
    pixels: Any


class Shared(NamedTuple):
    """Shared memory of a block; each class has a part of its own, of which others read `exchanged`."""

    up: Any
    """[4, kinds * slab, d]"""
    proxy: Any
    """[slots, classes, pixels, d]; () where threads load it to registers"""
    pixels: Any
    """[1 or 2 slots, 1 or 2, classes, H / 2, W / 2, slab]: x, which the result replaces, and the cotangent of y"""
    exchanged: Any
    """[pixels of all classes, `exchanged_channels`] float32, a slab of each tile: h of pixels on first lines, forward
    for either axis, backward for one and then what they get back from their three neighbours on second lines"""
    beyond: Any
    """[rows, slab]: a margin, and of `Given.beyond` the rows of a piece, with a margin; forward these twice"""
    arrivals: Any
    """`Arrivals`; () where threads load"""
    meeting: Any

    @property
    def slab(self) -> int:
        """Channels of the block."""
        return self.pixels.shape[-1]


def rows_between(cut: Cut) -> int:
    """Rows of zeros between classes in `Shared.exchanged`, for neighbours beyond the map: a step along a column. Before
    the first class and behind the last one nothing is read, and in maps of several pieces that is read elsewhere."""
    return GRID if cut.single else 0


def exchanged_rows(cut: Cut) -> int:
    """Rows of all classes in `Shared.exchanged`."""
    return CLASSES * PIXELS + (CLASSES - 1) * rows_between(cut)


def exchanged_channels(tiles: int, slab: int) -> int:
    """Channels of a row of `Shared.exchanged` with an even number of tiles: a warp reads or writes 8 rows at a time, 32
    bytes of each, so that rows must not start in the same banks."""
    return tiles * slab + 8


def rows_of(cut: Cut, index: Any, offset: Any = 0) -> Any:
    """Rows of a class among those of all classes, moved by so many pixels."""
    return pl.ds(index * (PIXELS + rows_between(cut)) + offset, PIXELS)


def tile_at(tile: Any, slab: int) -> Any:
    """Columns of a tile of `Shared.exchanged`."""
    start = tile * slab
    return pl.ds(start if isinstance(tile, int) else pl.multiple_of(start, slab), slab)


def pixel_layout(slab: int) -> Any:
    """Layout of [GRID, GRID, slab] that is loaded or stored: a warp takes a quarter of the rows, a thread 16 bytes
    of a slab of 16, 8 of one of 8."""
    tiling = plgpu.Tiling(((GRID, GRID, slab), (GRID // 4, GRID, slab), (slab // 2,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-4, -3, -2), vector_dim=-1)


class Lines(NamedTuple):
    """Lines along an axis as one class sees them: where its neighbours on the other line of a pair are."""

    axis: Array
    """0 for lines that are rows (down, up), 1 for lines that are columns (right, left)."""
    second: Array
    """0 on first lines of "down" or "right", 1 on second ones; the other way round in "up" and "left"."""
    along: Array
    """Parity of the position along a line."""
    stride: Array
    """Pixels of a class from one to the next along a line."""
    cut: Cut
    before: Any
    """Pixels of the class on a line before the piece."""
    length: Any
    """Length of a line of the map, in pixels of the class."""
    slab: int

    @property
    def first_direction(self) -> Array:
        """The direction in which this class is on first lines."""
        return 2 * self.axis + self.second

    @property
    def second_direction(self) -> Array:
        return 2 * self.axis + 1 - self.second

    def other(self, along: Array) -> Array:
        """The class on the other line of each pair with that parity along it."""
        line = 1 - self.second
        return jnp.where(self.axis == 0, 2 * line + along, 2 * along + line)

    def neighbours(self) -> tuple[Array, Array]:
        """Masks of the pixels that have a left and a right neighbour."""
        along = self._along() + self.before
        return along > 0, along < self.length

    def inside(self) -> tuple[Array, Array]:
        """Masks of the pixels whose left and right neighbours, if they have any, are in the piece."""
        along = self._along()
        return along > 0, along < GRID

    def _along(self) -> Array:
        """Positions along a line, rounded down for left neighbours and up for right ones."""
        pixel = compat.iota((PIXELS, self.slab), 0, LAYOUT)
        rows = jnp.broadcast_to(self.axis == 0, pixel.shape)
        return jnp.where(rows, lax.rem(pixel, GRID), lax.div(pixel, GRID)) + self.along

    def read(self, ref: Any, tile: Any, neighbour: int, beyond: Any = None) -> Float[Array, "64 slab"]:
        """Reads a tile of `Shared.exchanged` at the left (0), same (1) or right (2) positions on the other line of each
        pair. Beyond the end of a line that is `beyond`, or else a pixel of another line, or zero."""
        along = self.along if neighbour == 1 else 1 - self.along
        offset = (self.along - 1, 0, self.along)[neighbour]
        rows = rows_of(self.cut, self.other(along), offset * self.stride)
        value = compat.load(ref, (rows, tile_at(tile, self.slab)), LAYOUT)
        if neighbour == 1 or beyond is None:
            return value
        return jnp.where(self.inside()[neighbour // 2], value, beyond)


class Class(NamedTuple):
    """One warpgroup of a block: a class of pixels and a slab of channels, at a piece of a map."""

    job: Job
    given: Given
    shared: Shared
    index: Array
    start: Array
    """First channel."""
    cut: Cut
    piece: Any = None
    """Which one it is at, of all maps."""
    slot: Any = None
    """0 and 1 in turn"""
    proxy_slot: Any = None

    @classmethod
    def of(cls, job: Job, given: Given, shared: Shared, cut: Cut) -> "Class":
        """Class of this warpgroup, before the first piece."""
        slab, index = lax.axis_index("slab"), lax.axis_index("warpgroup")
        start = pl.multiple_of(lax.min(slab * shared.slab, given.x.shape[-1] - shared.slab), 8)
        return cls(job, given, shared, index, start, cut)

    @property
    def slab(self) -> int:
        return self.shared.slab

    @property
    def rows(self) -> Any:
        """Rows of this class in `Shared.exchanged`."""
        return rows_of(self.cut, self.index)

    def tile(self, n: Any) -> Any:
        """Columns of the n-th tile of `Shared.exchanged`."""
        return tile_at(n, self.slab)

    def zeros(self) -> Float[Array, "64 slab"]:
        return compat.zeros((PIXELS, self.slab), LAYOUT)

    def merge(self, direction: Array) -> Float[Array, "64 slab"]:
        factors = compat.load(self.given.merge, (direction, pl.ds(self.start, self.slab)), LAYOUT.reduce(0))
        return lax.broadcast_in_dim(factors, (PIXELS, self.slab), (1,))

    def asked_again(self) -> "Class":
        """The same; what is computed from its index is not kept in registers from before, which would spill."""
        return self._replace(index=lax.axis_index("warpgroup"))

    def meet(self) -> None:
        """All classes are here: what one wrote before, all see afterwards."""
        plgpu.barrier_arrive(self.shared.meeting)
        plgpu.barrier_wait(self.shared.meeting)

    def lines(self, axis: Array) -> Lines:
        row, column = lax.div(self.index, 2), lax.rem(self.index, 2)
        rows = axis == 0
        stride = jnp.where(rows, 1, GRID)
        second, along = jnp.where(rows, row, column), jnp.where(rows, column, row)
        before_row, before_column = self._before()
        height, width = self.cut.height // 2, self.cut.width // 2
        return Lines(
            axis=axis,
            second=second,
            along=along,
            stride=stride,
            cut=self.cut,
            before=jnp.where(rows, before_column, before_row),
            length=jnp.where(rows, width, height),
            slab=self.slab,
        )

    def _before(self) -> tuple[Any, Any]:
        """Rows and columns of the class in the map before the piece."""
        down, across = self.cut.counts
        row = lax.rem(lax.div(self.piece, jnp.int32(across)), jnp.int32(down)) * GRID if down > 1 else 0
        return row, lax.rem(self.piece, jnp.int32(across)) * GRID if across > 1 else 0

    def place(self, piece: Array) -> tuple:
        """Index of this class in [B H / 2, 2, W / 2, 2, C]."""
        across, columns = self.cut.counts[1], slice(None)
        if across > 1:
            piece, column = lax.div(piece, jnp.int32(across)), lax.rem(piece, jnp.int32(across))
            columns = pl.ds(column * GRID, GRID)
        return (
            pl.ds(piece * GRID, GRID),
            lax.div(self.index, 2),
            columns,
            lax.rem(self.index, 2),
            pl.ds(self.start, self.slab),
        )

    def read_pixels(self, n: int) -> Float[Array, "64 slab"]:
        """Reads x (n = 0) or the cotangent of y (1)."""
        tile = compat.load_reshaped(self._pixels(n), (PIXELS, self.slab), LAYOUT)
        return instructions.widened(tile, LAYOUT)

    def store(self, output: Any, tile: Float[Array, "64 slab"]) -> None:
        """Stores a tile by way of shared memory, in the place of x, where threads exchange it for more bytes of a pixel
        each."""
        self = self.asked_again()
        staged = self._pixels(0)
        compat.store_reshaped(staged, tile.astype(output.dtype))
        compat.warpgroup_barrier()
        whole = (slice(None),) * 3
        compat.store(output, self.place(self.piece), compat.load(staged, whole, pixel_layout(self.slab)))

    def _pixels(self, n: int) -> Any:
        slot = self.slot if self.shared.pixels.shape[0] > 1 else 0
        return self.shared.pixels.at[slot, n, self.index]

    def read_beyond(self, lines: Lines, grid: Any) -> Float[Array, "64 slab"] | None:
        """Reads a grid of `local_pieces.beyond` so that each pixel is where `Lines.read` has need of it."""
        if self.given.beyond is None:
            return None
        first = self._beyond(self.slot) + grid * PIXELS + (lines.second - lines.along) * lines.stride
        return compat.load(self.shared.beyond, (pl.ds(first, PIXELS), slice(None)), LAYOUT).astype(jnp.float32)

    def _beyond(self, slot: Array) -> Any:
        rows = self.given.beyond.shape[1]
        return GRID + (slot * (rows + GRID) if self.shared.beyond.shape[0] > 2 * GRID + rows else 0)

    def _quarter_beyond(self, piece: Array, slot: Array) -> tuple[Any, Any]:
        """Source and target of a quarter of `Given.beyond`, for all classes."""
        count = self.given.beyond.shape[1] // CLASSES
        source = self.given.beyond.at[piece, pl.ds(self.index * count, count), pl.ds(self.start, self.slab)]
        return source, self.shared.beyond.at[pl.ds(self._beyond(slot) + self.index * count, count)]

    def _clear(self) -> None:
        """Zeroes what is read of shared memory and never written: rows between classes, or margins of `beyond`."""
        if self.cut.single:
            gap = rows_of(self.cut, self.index, GRID)
            pl.when(self.index < CLASSES - 1)(functools.partial(self._zero, self.shared.exchanged, gap))
            return
        rows = self.shared.beyond.shape[0]
        for start in (*range(0, rows - GRID, GRID + self.given.beyond.shape[1]), rows - PIXELS):
            pl.when(self.index == 0)(functools.partial(self._zero, self.shared.beyond, pl.ds(start, PIXELS)))

    def _zero(self, ref: Any, rows: Any) -> None:
        zeros = self.zeros().astype(ref.dtype)
        for n in range(ref.shape[1] // self.slab):
            ref[rows, self.tile(n)] = zeros

    def _kinds(self, found: slice) -> range:
        return range(self.shared.up.shape[1] // self.slab)[found]


def piece_at(pieces: int, n: Any) -> Array:
    """The n-th of this block. Past the last one that comes again, so that every wait has its arrival."""
    return lax.axis_index("split") * pieces + lax.min(jnp.int32(n), pieces - 1)


class Next(NamedTuple):
    """What brings the next piece. The program of a piece calls each of these once, where it may."""

    pixels: Callable[[], Any]
    """Anywhere, best where registers are free: the program returns what this gives."""
    proxy: Callable[[], None]
    """After the last product of this piece."""
    beyond: Callable[[], None]
    """After all classes have read what is beyond this piece, if there is one slot for it, beyond the piece before, if
    there are two."""
