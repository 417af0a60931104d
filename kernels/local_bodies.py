"""The programs of the scan with chunk=2, forward and backward, as the warpgroups of a block run them: see `local`."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import bodies, compat, instructions
from gspn_jax.kernels.local_pieces import AXES, CLASSES, GRID, PIXELS, Cut
from gspn_jax.kernels.terms import LAM, OUT_GATE, SKIP, Job

SLAB = 16
"""Channels of a block."""
LOGITS = 3
LAYOUT = plgpu.Layout.WGMMA
"""How a tile [pixels of a class, channels] is spread over a warpgroup: as products leave it."""


PIXEL_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((GRID, GRID, SLAB), (GRID // 4, GRID, SLAB), (8,))),
    warp_dims=(-7,),
    lane_dims=(-4, -3, -2),
    vector_dim=-1,
)
"""How [GRID, GRID, SLAB] is spread to be stored: a thread takes 8 channels, a warp a quarter of the rows."""


class Given(NamedTuple):
    """Arrays that a launch reads."""

    x: Any
    """[B H / 2, 2, W / 2, 2, C]: rows and columns by parity"""
    proxy: Any
    """[pieces, 4 classes, 64 pixels, d]"""
    up: Any
    """[slabs, 4 directions, kinds * SLAB, d]"""
    merge: Any
    """[4, C] float32"""
    cotangent: Any = None
    """Cotangent of y, as x; None forward."""
    beyond: Any = None
    """[pieces, grids * 64 pixels, C]: `local_pieces.beyond`; None for maps of one piece."""


class Shared(NamedTuple):
    """Shared memory of a block; each class has a part of its own, of which others read `state` and `handed`."""

    up: Any
    """[4, kinds * SLAB, d]"""
    proxy: Any
    """[slots, classes, pixels, d]"""
    pixels: Any
    """[2 slots, 1 or 2, classes, H / 2, W / 2, SLAB]: x, which the result replaces, and the cotangent of y"""
    exchanged: Any
    """[pixels of all classes, `exchanged_channels`] float32, SLAB of each tile: h of pixels on first lines, forward for
    either axis, backward for one and then what they get back from their three neighbours on second lines"""
    beyond: Any
    """[rows, SLAB]: a margin, and of `Given.beyond` the rows of a piece, with a margin; forward these twice"""
    up_arrived: Any
    proxy_arrived: Any
    pixels_arrived: Any
    meeting: Any


def rows_between(cut: Cut) -> int:
    """Rows of zeros between classes in `Shared.exchanged`, for neighbours beyond the map: a step along a column. Before
    the first class and behind the last one nothing is read, and in maps of several pieces that is read elsewhere."""
    return GRID if cut.single else 0


def exchanged_rows(cut: Cut) -> int:
    """Rows of all classes in `Shared.exchanged`."""
    return CLASSES * PIXELS + (CLASSES - 1) * rows_between(cut)


def rows_of(cut: Cut, index: Any, offset: Any = 0) -> Any:
    """Rows of a class among those of all classes, moved by so many pixels."""
    return pl.ds(index * (PIXELS + rows_between(cut)) + offset, PIXELS)


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
        pixel = compat.iota((PIXELS, SLAB), 0, LAYOUT)
        rows = jnp.broadcast_to(self.axis == 0, pixel.shape)
        return jnp.where(rows, lax.rem(pixel, GRID), lax.div(pixel, GRID)) + self.along

    def read(self, ref: Any, tile: Any, neighbour: int, beyond: Any = None) -> Float[Array, "64 SLAB"]:
        """Reads a tile of `Shared.exchanged` at the left (0), same (1) or right (2) positions on the other line of each
        pair. Beyond the end of a line that is `beyond`, or else a pixel of another line, or zero."""
        along = self.along if neighbour == 1 else 1 - self.along
        offset = (self.along - 1, 0, self.along)[neighbour]
        rows = rows_of(self.cut, self.other(along), offset * self.stride)
        value = compat.load(ref, (rows, tile_at(tile)), LAYOUT)
        if neighbour == 1 or beyond is None:
            return value
        return jnp.where(self.inside()[neighbour // 2], value, beyond)


def exchanged_channels(tiles: int) -> int:
    """Channels of a row of `Shared.exchanged` with an even number of tiles: a warp reads or writes 8 rows at a time, 32
    bytes of each, so that rows must not start in the same banks."""
    return tiles * SLAB + 8


def tile_at(tile: Any) -> Any:
    """Columns of a tile of `Shared.exchanged`."""
    start = tile * SLAB
    return pl.ds(start if isinstance(tile, int) else pl.multiple_of(start, SLAB), SLAB)


class Class(NamedTuple):
    """One warpgroup of a block: a class of pixels and a slab of channels."""

    job: Job
    given: Given
    shared: Shared
    index: Array
    start: Array
    """First channel."""
    cut: Cut
    piece: Any = None
    """Which one it is at, of all maps."""

    def asked_again(self) -> "Class":
        """The same; what is computed from its index is not kept in registers from before, which would spill."""
        return self._replace(index=lax.axis_index("warpgroup"))

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
        )

    def _before(self) -> tuple[Any, Any]:
        """Rows and columns of the class in the map before the piece."""
        down, across = self.cut.counts
        row = lax.rem(lax.div(self.piece, jnp.int32(across)), jnp.int32(down)) * GRID if down > 1 else 0
        return row, lax.rem(self.piece, jnp.int32(across)) * GRID if across > 1 else 0

    def send_for_beyond(self, piece: Array, slot: Array) -> None:
        """A quarter for all classes, which are done with the slot; it arrives with the pixels."""
        if self.given.beyond is None:
            return
        plgpu.commit_smem()  # all have read what this overwrites
        count = self.given.beyond.shape[1] // CLASSES
        plgpu.copy_gmem_to_smem(
            self.given.beyond.at[piece, pl.ds(self.index * count, count), pl.ds(self.start, SLAB)],
            self.shared.beyond.at[pl.ds(self._beyond(slot) + self.index * count, count)],
            self.shared.pixels_arrived.at[slot * CLASSES + self.index],
        )

    def read_beyond(self, lines: Lines, slot: Array, grid: Any) -> Float[Array, "64 SLAB"] | None:
        """Reads a grid of `local_pieces.beyond` so that each pixel is where `Lines.read` has need of it."""
        if self.given.beyond is None:
            return None
        first = self._beyond(slot) + grid * PIXELS + (lines.second - lines.along) * lines.stride
        return compat.load(self.shared.beyond, (pl.ds(first, PIXELS), slice(None)), LAYOUT).astype(jnp.float32)

    def _beyond(self, slot: Array) -> Any:
        rows = self.given.beyond.shape[1]
        return GRID + (slot * (rows + GRID) if self.shared.beyond.shape[0] > 2 * GRID + rows else 0)

    def send_for_factors(self) -> None:
        """Each class has one direction's."""
        plgpu.copy_gmem_to_smem(
            self.given.up.at[lax.axis_index("slab"), self.index],
            self.shared.up.at[self.index],
            self.shared.up_arrived.at[self.index],
        )

    def await_factors(self) -> None:
        for direction in range(CLASSES):
            plgpu.barrier_wait(self.shared.up_arrived.at[direction])

    def send_for_proxy(self, piece: Array, slot: Array) -> None:
        plgpu.copy_gmem_to_smem(
            self.given.proxy.at[piece, self.index],
            self.shared.proxy.at[slot, self.index],
            self.shared.proxy_arrived.at[slot * CLASSES + self.index],
        )

    def await_proxy(self, slot: Array) -> None:
        plgpu.barrier_wait(self.shared.proxy_arrived.at[slot * CLASSES + self.index])

    def send_for_pixels(self, piece: Array, slot: Array) -> None:
        for n, source in enumerate(self._sources()):
            plgpu.copy_gmem_to_smem(
                source.at[self.place(piece)],
                self.shared.pixels.at[slot, n, self.index],
                self.shared.pixels_arrived.at[slot * CLASSES + self.index],
            )

    def await_pixels(self, slot: Array) -> None:
        """Those of this class, and its quarter of what is beyond the piece."""
        plgpu.barrier_wait(self.shared.pixels_arrived.at[slot * CLASSES + self.index])

    def read_pixels(self, slot: Array, n: int) -> Float[Array, "64 SLAB"]:
        """Reads x (n = 0) or the cotangent of y (1)."""
        tile = compat.load_reshaped(self.shared.pixels.at[slot, n, self.index], (PIXELS, SLAB), LAYOUT)
        return instructions.widened(tile, LAYOUT)

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
            pl.ds(self.start, SLAB),
        )

    def store(self, output: Any, slot: Array, tile: Float[Array, "64 SLAB"]) -> None:
        """Stores a tile by way of shared memory, in the place of x, where threads exchange it for 16 bytes of a pixel
        each."""
        self = self.asked_again()
        staged = self.shared.pixels.at[slot, 0, self.index]
        compat.store_reshaped(staged, tile.astype(output.dtype))
        compat.warpgroup_barrier()
        whole = (slice(None),) * 3
        compat.store(output, self.place(self.piece), compat.load(staged, whole, PIXEL_LAYOUT))

    def expand(self, slot: Array, *wanted: tuple[Array, slice], meanwhile: Callable = tuple) -> tuple[list, Any]:
        """Products of proxy and factors for each direction and kinds that are wanted, and the value of `meanwhile`,
        which runs beside them. lam and out_gate are 1 more than theirs: see `_one_more`.
        """
        kinds = [range(self.shared.up.shape[1] // SLAB)[found] for _, found in wanted]

        def product(*accumulators):
            for accumulator, (direction, _), found in zip(accumulators, wanted, kinds, strict=True):
                factors = self.shared.up.at[direction, pl.ds(found[0] * SLAB, len(found) * SLAB)]
                compat.wgmma(accumulator, self.shared.proxy.at[slot, self.index], factors, transpose_b=True)
            value = meanwhile()
            return [accumulator[...] for accumulator in accumulators], value

        def tiles(columns: Array, found: range) -> list[Array]:
            return [columns[:, n * SLAB : (n + 1) * SLAB] for n in range(len(found))]

        shapes = [plgpu.ACC((PIXELS, len(found) * SLAB), jnp.float32) for found in kinds]
        products, value = pl.run_scoped(product, *shapes)
        return list(map(tiles, products, kinds)), value

    def merge(self, direction: Array) -> Float[Array, "64 SLAB"]:
        factors = compat.load(self.given.merge, (direction, pl.ds(self.start, SLAB)), LAYOUT.reduce(0))
        return lax.broadcast_in_dim(factors, (PIXELS, SLAB), (1,))

    def clear(self) -> None:
        """Zeroes what is read of shared memory and never written: rows between classes, or margins of `beyond`."""
        if self.cut.single:
            gap = rows_of(self.cut, self.index, GRID)
            pl.when(self.index < CLASSES - 1)(functools.partial(_zero, self.shared.exchanged, gap))
            return
        rows = self.shared.beyond.shape[0]
        for start in (*range(0, rows - GRID, GRID + self.given.beyond.shape[1]), rows - PIXELS):
            pl.when(self.index == 0)(functools.partial(_zero, self.shared.beyond, pl.ds(start, PIXELS)))
        plgpu.commit_smem()
        self.meet()  # copies overwrite most of it

    def meet(self) -> None:
        """All classes are here: what one wrote before, all see afterwards."""
        plgpu.barrier_arrive(self.shared.meeting)
        plgpu.barrier_wait(self.shared.meeting)

    def _sources(self) -> list[Any]:
        return [array for array in (self.given.x, self.given.cotangent) if array is not None]


def _zero(ref: Any, rows: Any) -> None:
    zeros = compat.zeros((PIXELS, SLAB), LAYOUT).astype(ref.dtype)
    for n in range(ref.shape[1] // SLAB):
        ref[rows, tile_at(n)] = zeros


def _walk(job: Job, given: Given, shared: Shared, cut: Cut, pieces: int, visit: Any) -> None:
    """Calls visit(here, proxy_slot, slot, follow, follow_beyond) for each piece of this block, whose pixels are in
    `slot`. Visit calls follow() once its last product of the piece is made, and follow_beyond() once all classes have
    read what is beyond the piece where there is one slot for it, beyond the piece before where there are two."""
    slab, split, index = (lax.axis_index(name) for name in ("slab", "split", "warpgroup"))
    start = pl.multiple_of(lax.min(slab * SLAB, given.x.shape[-1] - SLAB), 8)
    here = Class(job, given, shared, index, start, cut)
    proxies = shared.proxy.shape[0]

    def piece_at(n: Any) -> Array:
        """Past the last piece that one comes again, so that every wait has its arrival."""
        return split * pieces + lax.min(jnp.int32(n), pieces - 1)

    here.send_for_factors()
    for n in range(proxies):
        here.send_for_proxy(piece_at(n), jnp.int32(n))
    here.send_for_pixels(piece_at(0), jnp.int32(0))
    here.clear()
    here.send_for_beyond(piece_at(0), jnp.int32(0))
    here.await_factors()
    begun = here

    @pl.loop(0, pieces)
    def _(n):
        here = begun.asked_again()._replace(piece=piece_at(n))
        proxy_slot, slot = lax.rem(n, jnp.int32(proxies)), lax.rem(n, jnp.int32(2))
        plgpu.commit_smem()  # all threads have read the piece that the next copy overwrites
        here.send_for_pixels(piece_at(n + 1), 1 - slot)
        here.await_pixels(slot)
        here.await_proxy(proxy_slot)

        def follow():
            compat.warpgroup_barrier()
            here.send_for_proxy(piece_at(n + proxies), proxy_slot)

        def follow_beyond():
            here.send_for_beyond(piece_at(n + 1), 1 - slot)

        visit(here, proxy_slot, slot, follow, follow_beyond)

    for n in range(proxies):  # no copy may outlive the block
        here.await_proxy(jnp.int32((pieces + n) % proxies))
    here.await_pixels(jnp.int32(pieces % 2))


class Sigmoids(NamedTuple):
    """Sigmoids of the logits of three neighbours, times (1 + odds) of all three; 0 for one that does not exist."""

    left: Array
    center: Array
    right: Array
    total: Array
    """Product of the three (1 + odds)."""

    @property
    def sum(self) -> Array:
        return self.left + self.center + self.right

    @property
    def scale(self) -> Array:
        """One over their sum, by which they are weights."""
        return _reciprocal(self.sum)

    def weigh(self, neighbours: Iterable[Array]) -> Array:
        """Their products with values of the three, summed."""
        return sum(sigmoid * value for sigmoid, value in zip(self[:LOGITS], neighbours, strict=True))


def _sigmoids(logits: list[Array], has_left: Array, has_right: Array) -> Sigmoids:
    a, b, c = (1.0 + bodies.odds(logit) for logit in logits)
    left = b * c
    return Sigmoids(jnp.where(has_left, left, 0.0), a * c, jnp.where(has_right, a * b, 0.0), a * left)


def _one_more(product: Array, value: Array) -> Array:
    """(1 + product) * value, one multiply-add."""
    return value + product * value


def _reciprocal(tile: Float[Array, "64 SLAB"]) -> Float[Array, "64 SLAB"]:
    return instructions.reciprocal(tile, LAYOUT)


FIRST, WEIGHTS, SECOND = slice(LAM, None), slice(0, LAM), slice(LAM, None)
"""Kinds of terms: of pixels on first lines, and in two parts of those on second lines. The products of the last part
are made while the weights are computed from the part before."""


def local_forward(given: Given, outputs: Any, shared: Shared, *, job: Job, cut: Cut, pieces: int):
    states = shared.exchanged

    def visit(here: Class, proxy_slot: Array, slot: Array, follow: Any, follow_beyond: Any) -> None:
        def add(y: Array, x: Array, state: Array, out_gate: Array, skip: list[Array], direction: Array) -> Array:
            term = _one_more(out_gate, state)
            return y + (term + skip[0] * x if skip else term) * here.merge(direction)

        def visit_axis(axis: Array, y: Array) -> Array:
            lines, x = here.lines(axis), here.read_pixels(slot, 0)
            ((lam, *others), logits), _ = here.expand(
                proxy_slot, (lines.first_direction, FIRST), (lines.second_direction, WEIGHTS)
            )
            state = _one_more(lam, x)
            states[rows_of(cut, here.index), tile_at(axis)] = state
            y = add(y, x, state, others[0], others[1:], lines.first_direction)
            here.meet()

            def carry(lines=lines, logits=logits, x=x) -> Array:
                sigmoids = _sigmoids(logits, *lines.neighbours())
                beyond = here.read_beyond(lines, slot, axis)
                carried = sigmoids.weigh(lines.read(states, axis, n, beyond) for n in range(LOGITS))
                return x + carried * sigmoids.scale

            ((lam, *others),), state = here.expand(proxy_slot, (lines.second_direction, SECOND), meanwhile=carry)

            @pl.when(axis == AXES - 1)
            def _():
                follow()
                follow_beyond()

            return add(y, x, state + lam * x, others[0], others[1:], lines.second_direction)

        y = lax.fori_loop(0, AXES, visit_axis, compat.zeros((PIXELS, SLAB), LAYOUT))
        here.store(outputs[0], slot, y)

    _walk(job, given, shared, cut, pieces, visit)


class Cotangents(NamedTuple):
    """Arrays that the backward launch writes."""

    x: Any
    """As x"""
    terms: Any
    """[4 classes, pieces, 64 pixels, pairs, C] uint32, each two bfloat16 in the order of `pairs`, so that two channels
    of a thread are 8 bytes and those of a slab a whole sector; out_gate and skip without the factor `merge`"""


def pairs(job: Job) -> list[tuple[tuple[int, bool, int], tuple[int, bool, int]]]:
    """The terms of a class that share a word of `Cotangents.terms`: (axis, whether on second lines, kind) of both.

    Each axis has an odd number of terms: what lam of its first lines gets, in the end, waits for the next axis.
    """
    left, center, right = range(LOGITS)
    of_axes = [
        [
            ((axis, False, (OUT_GATE, LAM)[axis]), (axis, True, right)),
            ((axis, True, left), (axis, True, center)),
            ((axis, True, LAM), (axis, True, OUT_GATE)),
            *([((axis, False, SKIP), (axis, True, SKIP))] if job.skip else []),
        ]
        for axis in range(AXES)
    ]
    return [*of_axes[0], *of_axes[1], ((0, False, LAM), (1, False, OUT_GATE))]


def local_backward(given: Given, outputs: Cotangents, shared: Shared, *, job: Job, cut: Cut, pieces: int):
    """Pixels on first lines need what second lines hand back, and those need h of first lines: three phases an axis."""
    exchanged, of_axis = shared.exchanged, len(pairs(job)) // AXES

    def visit(here: Class, proxy_slot: Array, slot: Array, follow: Any, follow_beyond: Any) -> None:
        mine, read = rows_of(cut, here.index), functools.partial(here.read_pixels, slot)

        def write(pair: int, low: Array, high: Array) -> None:
            at = (here.index, here.piece, slice(None), pair, pl.ds(here.start, SLAB))
            low, high = (instructions.widened(tile, LAYOUT) for tile in (low, high))
            compat.store(outputs.terms, at, instructions.packed(low, high, LAYOUT))

        def visit_axis(axis: int, by_x: Array, by_lam_before: Array | None) -> tuple[Array, Array]:
            """(what x gets so far, what lam of first lines gets). The two axes are written out, not a loop: what waits
            for the second one would spill if it were carried."""
            lines, pair = here.lines(axis), axis * of_axis
            x, gy = read(0), read(1)
            ((lam, out_gate, *skip), logits), _ = here.expand(
                proxy_slot, (lines.first_direction, FIRST), (lines.second_direction, WEIGHTS)
            )
            lam = 1.0 + lam
            h = lam * x
            exchanged[mine, tile_at(0)] = h
            if axis == 1:
                write(AXES * of_axis, by_lam_before, gy * h)
            scaled = gy * here.merge(lines.first_direction)
            if skip:
                write(pair + 3, gy * x, gy * x)
                by_x = by_x + scaled * skip[0]
            direct, first_lam = _one_more(out_gate, scaled), lam
            here.meet()

            def carry(lines=lines, logits=logits) -> tuple[list[Array], Array, Array]:
                sigmoids = _sigmoids(logits, *lines.neighbours())
                beyond, scale = here.read_beyond(lines, slot, axis), sigmoids.scale
                weights = [sigmoid * scale for sigmoid in sigmoids[:LOGITS]]
                carried = sum(weight * lines.read(exchanged, 0, n, beyond) for n, weight in enumerate(weights))
                return weights, sigmoids.sum * _reciprocal(sigmoids.total), carried

            if axis == 1:  # kept there while registers are scarce
                exchanged[mine, tile_at(1)] = by_x
            ((lam, out_gate, *skip),), (weights, sigmoids, carried) = here.expand(
                proxy_slot, (lines.second_direction, SECOND), meanwhile=carry
            )
            if axis == 1:
                follow()
            x, gy = read(0), read(1)
            scaled = gy * here.merge(lines.second_direction)
            adjoint, lam = _one_more(out_gate, scaled), 1.0 + lam
            write(pair + 2, adjoint * x, gy * (carried + lam * x))
            if axis == 1:
                by_x = compat.load(exchanged, (mine, tile_at(1)), LAYOUT)
            if skip:
                by_x = by_x + scaled * skip[0]
            by_x = by_x + adjoint * lam

            beyond = here.read_beyond(lines, slot, axis)

            def by_logit(n: int, weight: Array) -> Array:
                passed = weight * adjoint
                exchanged[mine, tile_at(1 + n)] = passed
                return passed * (1.0 - weight * sigmoids) * (lines.read(exchanged, 0, n, beyond) - carried)

            left, center, right = map(by_logit, range(LOGITS), weights)
            write(pair + 1, left, center)
            if axis == 0:
                write(pair, read(1) * (first_lam * read(0)), right)
            else:
                right = right.astype(jnp.bfloat16)
            beyond = here.read_beyond(lines, slot, AXES + axis)
            here.meet()
            if axis == 1:
                follow_beyond()

            # the left neighbour of a pixel on the second line has that pixel to its right
            adjoint = direct + sum(lines.read(exchanged, 3 - n, n, beyond) for n in range(LOGITS))
            by_lam = (adjoint * read(0)).astype(jnp.bfloat16)
            if axis == 1:
                write(pair, by_lam, right)
            return by_x + adjoint * first_lam, by_lam

        by_x, _ = visit_axis(1, *visit_axis(0, compat.zeros((PIXELS, SLAB), LAYOUT), None))
        here.store(outputs.x, slot, by_x)

    _walk(job, given, shared, cut, pieces, visit)
