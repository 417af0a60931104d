"""Cuts of maps for the scan with chunk=2, and what pieces read beyond their edges, which XLA computes beforehand.

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
AXES = 2
"""Lines that are rows (down, up), and lines that are columns (right, left)."""
SIDE = 16
"""Pixels of a side of a piece."""
GRID = SIDE // 2
"""Rows and columns of a class in a piece."""
PIXELS = GRID**2
"""Pixels of a class: 64, the rows of the tensor cores' instruction."""
MOST_FILLED = 1.5
"""Pixels of pieces for each of the map, beyond which the kernels that XLA expands terms for move fewer bytes."""


class Cut(NamedTuple):
    """Cut of a map into pieces of SIDE x SIDE pixels; zeros fill up the last ones."""

    height: int
    width: int

    @property
    def counts(self) -> tuple[int, int]:
        """Pieces from top to bottom and from left to right."""
        return -(-self.height // SIDE), -(-self.width // SIDE)

    @property
    def single(self) -> bool:
        """True where one piece has all of the map."""
        return self.counts == (1, 1)

    @property
    def filled(self) -> float:
        """Pixels of all pieces for each of the map."""
        down, across = self.counts
        return down * across * SIDE**2 / (self.height * self.width)

    def filled_up(self, array: Float[Array, "B H W n"]) -> Float[Array, "B pieces_high pieces_wide n"]:
        """Zeros in what pieces have and the map has not."""
        more = (0, -self.height % SIDE), (0, -self.width % SIDE)
        return jnp.pad(array, ((0, 0), *more, (0, 0))) if self.filled > 1 else array

    def restored(self, array: Float[Array, "..."]) -> Float[Array, "B H W C"]:
        """The map of an array that was filled up, of whatever shape."""
        down, across = self.counts
        filled_up = array.reshape(-1, down * SIDE, across * SIDE, array.shape[-1])
        return filled_up[:, : self.height, : self.width]

    def by_class(self, array: Float[Array, "B pieces_high pieces_wide n"]) -> Float[Array, "pieces 4 64 n"]:
        """Pixels by piece and class."""
        (down, across), n = self.counts, array.shape[-1]
        parities = array.reshape(-1, down, GRID, 2, across, GRID, 2, n).transpose(0, 1, 4, 3, 6, 2, 5, 7)
        return parities.reshape(-1, CLASSES, PIXELS, n)

    def from_classes(self, array: Float[Array, "4 pixels n"]) -> Float[Array, "B H W n"]:
        """The other way round, for classes before pieces."""
        (down, across), n = self.counts, array.shape[-1]
        parities = array.reshape(2, 2, -1, down, across, GRID, GRID, n).transpose(2, 3, 5, 0, 4, 6, 1, 7)
        return self.restored(parities.reshape(-1, n))


def beyond(
    cut: Cut,
    x: Float[Array, "B H W C"],
    proxy: Float[Array, "B H W d"],
    up: Float[Array, "4 N C d"],
    merge: Float[Array, "4 C"],
    cotangent: Float[Array, "B H W C"] | None = None,
) -> Float[Array, "pieces rows C"] | None:
    """Values that pieces read of pixels just beyond their edges, or None for a single piece: h of first pixels and,
    with the cotangent of y, what second ones hand back; zero beyond the map.

    A grid [64 pixels of a class, C] of each piece for either axis, those of h before those of what is handed back.
    `Class.read_beyond` shifts a grid so that its place falls on the edge. A class reads over one edge of either axis:
    where lines are rows over the left one if its columns are even. Those of even rows find what they read in the
    outmost column of the grid but one on the right, and in the outmost on the left; those of odd rows in the others.
    """
    if cut.single:
        return None
    proxies = [_strips(axis, proxy) for axis in range(AXES)]
    found = [_states(axis, _strips(axis, x), proxies[axis], up) for axis in range(AXES)]
    grids = [_grid(axis, found[axis]) for axis in range(AXES)]
    if cotangent is not None:
        found = [_handed_back(axis, _strips(axis, cotangent), proxies[axis], up, merge) for axis in range(AXES)]
        grids += [_grid(axis, found[axis]) for axis in range(AXES)]
    return jnp.concatenate(grids, axis=1)


def _strips(axis: int, array: Float[Array, "B H W n"]) -> Float[Array, "2 2 B across lines along n"]:
    """Pixels just beyond the edges that lines of `axis` cross, by the parity of their line, before and after the piece,
    by piece across lines, by line and by piece along them."""
    along = 2 - axis

    def filled(strip: Array, before: int) -> Array:
        ends = [(0, 0)] * 4
        ends[along] = before, 1 - before
        return jnp.pad(strip, ends)

    lead = (slice(None),) * along
    strips = jnp.stack([filled(array[*lead, SIDE - 1 : -1 : SIDE], 1), filled(array[*lead, SIDE::SIDE], 0)])
    if axis == 1:
        strips = strips.swapaxes(2, 3)
    sides, batch, lines, count, n = strips.shape
    by_line = strips.reshape(sides, batch, lines // SIDE, GRID, 2, count, n)
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


def _grid(axis: int, strips: Float[Array, "2 2 B across lines along C"]) -> Float[Array, "pieces 64 C"]:
    """Lines of one parity are read by those of the other one."""
    read_by = strips[::-1]
    place = read_by.transpose(2, 3, 5, 4, 1, 0, 6) if axis == 0 else read_by.transpose(2, 5, 3, 1, 0, 4, 6)
    sides = 4 if axis == 0 else 3
    before, after = (lax.index_in_dim(place, side, sides, keepdims=False) for side in (0, 1))
    shape = [*before.shape[:3], GRID, GRID, before.shape[-1]]
    shape[sides] -= 4
    grid = jnp.concatenate([before, jnp.zeros(shape, before.dtype), after], sides)
    return grid.reshape(-1, PIXELS, before.shape[-1])
