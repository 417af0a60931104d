"""How maps are cut for the scan with chunk=2, and what pieces read beyond their edges, which XLA computes beforehand.

Lines are paired inside of a piece, whose sides are even, but the three pixels that a second pixel needs lie in the
piece beside its own where it is the first or last of the piece along its line. There they are read from `beyond`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gspn_jax.kernels.terms import LAM, OUT_GATE
from gspn_jax.kernels.weights import LOGIT_FLOOR

CLASSES = 4
PIXELS = 64
"""Of a class: the rows of the tensor cores' instruction."""
PIECES = (16, 16), (8, 32), (32, 8)
"""Height and width of a piece: four classes of 64 pixels, and at least two columns and rows of a class an edge."""
MOST_FILLED = 1.5
"""Pixels of pieces for each of the map, beyond which the kernels that XLA expands terms for move fewer bytes."""


class Cut(NamedTuple):
    """Pieces of a map, which fills the last ones with zeros where it does not reach their ends."""

    size: tuple[int, int]
    """Height and width of the map."""
    piece: tuple[int, int]
    """Height and width of a piece."""

    @property
    def counts(self) -> tuple[int, int]:
        """Pieces from top to bottom and from left to right."""
        return tuple(-(-size // piece) for size, piece in zip(self.size, self.piece, strict=True))

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a class in a piece."""
        return self.piece[0] // 2, self.piece[1] // 2

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes whose lines are cut: 0 for those that are rows, 1 for columns."""
        return tuple(axis for axis in (0, 1) if self.counts[1 - axis] > 1)

    @property
    def filled(self) -> float:
        """Pixels of all pieces for each of the map."""
        height, width = self._whole()
        return height * width / (self.size[0] * self.size[1])

    def _whole(self) -> tuple[int, int]:
        return tuple(count * piece for count, piece in zip(self.counts, self.piece, strict=True))

    def filled_up(self, array: Float[Array, "B H W n"]) -> Float[Array, "B pieces_high pieces_wide n"]:
        """Zeros in what pieces have and the map has not."""
        more = [(0, whole - size) for whole, size in zip(self._whole(), self.size, strict=True)]
        return jnp.pad(array, ((0, 0), *more, (0, 0))) if self.filled > 1 else array

    def restored(self, array: Float[Array, "..."]) -> Float[Array, "B H W C"]:
        """The map of an array that was filled up, of whatever shape."""
        height, width = self.size
        return array.reshape(-1, *self._whole(), array.shape[-1])[:, :height, :width]

    def by_class(self, array: Float[Array, "B pieces_high pieces_wide n"]) -> Float[Array, "pieces 4 64 n"]:
        """Pixels by piece and class."""
        (down, across), (height, width), n = self.counts, self.grid, array.shape[-1]
        parities = array.reshape(-1, down, height, 2, across, width, 2, n).transpose(0, 1, 4, 3, 6, 2, 5, 7)
        return parities.reshape(-1, CLASSES, PIXELS, n)

    def from_classes(self, array: Float[Array, "4 pixels n"]) -> Float[Array, "B H W n"]:
        """The other way round, for classes before pieces."""
        (down, across), (height, width), n = self.counts, self.grid, array.shape[-1]
        parities = array.reshape(2, 2, -1, down, across, height, width, n).transpose(2, 3, 5, 0, 4, 6, 1, 7)
        return self.restored(parities.reshape(-1, n))


def choose(height: int, width: int) -> Cut:
    """The pieces with the fewest pixels, of these those that cut lines of fewer axes, and then the squarest."""
    return min((Cut((height, width), piece) for piece in PIECES), key=lambda cut: (cut.filled, len(cut.axes)))


def beyond(
    cut: Cut,
    x: Float[Array, "B H W C"],
    proxy: Float[Array, "B H W d"],
    up: Float[Array, "4 N C d"],
    merge: Float[Array, "4 C"],
    cotangent: Float[Array, "B H W C"] | None = None,
) -> Float[Array, "pieces rows C"] | None:
    """What pieces read of pixels just beyond their edges, or None for a single piece: h of first pixels and, with the
    cotangent of y, what second ones hand back; zero beyond the map.

    A grid [64 pixels of a class, C] of each piece for each axis in `cut.axes`, those of h before what is handed back.
    `Class.read_beyond` shifts a grid so that its place falls on the edge. A class reads over one edge of either axis:
    where lines are rows over the left one if its columns are even. Those of even rows find what they read in the
    outmost column of the grid but one on the right, and in the outmost on the left; those of odd rows in the others.
    """
    if not cut.axes:
        return None
    grids = []
    for axis in cut.axes:
        edges = _strips(cut, axis, x), _strips(cut, axis, proxy)
        grids.append(_grid(cut, axis, _states(axis, *edges, up)))
    if cotangent is not None:
        for axis in cut.axes:
            edges = _strips(cut, axis, cotangent), _strips(cut, axis, proxy)
            grids.append(_grid(cut, axis, _handed_back(axis, *edges, up, merge)))
    return jnp.concatenate(grids, axis=1)


def _strips(cut: Cut, axis: int, array: Float[Array, "B H W n"]) -> Float[Array, "2 2 B across lines along n"]:
    """Pixels just beyond the edges that lines of `axis` cross, by the parity of their line, before and after the piece,
    by piece across lines, by line and by piece along them."""
    along = 2 - axis
    size, count = cut.piece[1 - axis], cut.counts[1 - axis]

    def every(first: int) -> Array:
        return lax.slice_in_dim(array, first, first + (count - 2) * size + 1, size, along)

    def filled(strip: Array, before: int) -> Array:
        ends = [(0, 0)] * 4
        ends[along] = before, 1 - before
        return jnp.pad(strip, ends)

    strips = jnp.stack([filled(every(size - 1), 1), filled(every(size), 0)])
    if axis == 1:
        strips = strips.swapaxes(2, 3)
    sides, batch, lines, count, n = strips.shape
    height = cut.grid[axis]
    by_line = strips.reshape(sides, batch, lines // (2 * height), height, 2, count, n)
    return by_line.transpose(4, 0, 1, 2, 3, 5, 6)


def _expand(proxy: Float[Array, "2 2 B across lines along d"], factors: Float[Array, "2 n C d"]) -> list[Array]:
    """n terms of each pixel, for the two parities of lines, as the kernel of every chunk finds them in memory."""
    parities, kinds, channels, rank = factors.shape
    factors = factors.astype(proxy.dtype).reshape(parities, kinds * channels, rank)
    terms = jnp.einsum("psbltmd,pnd->psbltmn", proxy, factors).reshape(*proxy.shape[:-1], kinds, channels)
    return [terms[..., kind, :].astype(jnp.float32) for kind in range(kinds)]


def _states(axis: int, x: Array, proxy: Array, up: Float[Array, "4 N C d"]) -> Array:
    """h = lam x in the direction in which a line is a first one."""
    (lam,) = _expand(proxy, up[2 * axis : 2 * axis + 2, LAM : LAM + 1])
    return ((1 + lam) * x.astype(lam.dtype)).astype(x.dtype)


def _handed_back(
    axis: int, cotangent: Array, proxy: Array, up: Float[Array, "4 N C d"], merge: Float[Array, "4 C"]
) -> Array:
    """weight * adjoint over the piece's edge, in the direction in which a line is a second one.

    Neighbours beyond the map need no mask: only the last pixel of a line has one, and that is the last of its piece.
    """
    directions = jnp.array([2 * axis + 1, 2 * axis])
    *logits, out_gate = _expand(proxy, up[directions][:, jnp.array([*range(LAM), OUT_GATE])])
    left, center, right = (jax.nn.sigmoid(jnp.maximum(logit, LOGIT_FLOOR)) for logit in logits)
    towards = jnp.stack([right[:, 0], left[:, 1]], axis=1)  # what lies before a piece has it to its right
    factors = merge[directions].reshape(2, *(1,) * (cotangent.ndim - 2), -1)
    adjoint = (1 + out_gate) * factors * cotangent.astype(out_gate.dtype)
    return (towards / (left + center + right) * adjoint).astype(cotangent.dtype)


def _grid(cut: Cut, axis: int, strips: Float[Array, "2 2 B across lines along C"]) -> Float[Array, "pieces 64 C"]:
    """Lines of one parity are read by those of the other one."""
    read_by = strips[::-1]
    place = read_by.transpose(2, 3, 5, 4, 1, 0, 6) if axis == 0 else read_by.transpose(2, 5, 3, 1, 0, 4, 6)
    sides = 4 if axis == 0 else 3
    before, after = (lax.index_in_dim(place, side, sides, keepdims=False) for side in (0, 1))
    shape = [*before.shape[:3], *cut.grid, before.shape[-1]]
    shape[sides] -= 4
    grid = jnp.concatenate([before, jnp.zeros(shape, before.dtype), after], sides)
    return grid.reshape(-1, PIXELS, before.shape[-1])
