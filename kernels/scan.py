"""The line scan as one XLA loop over lines, fast on CPUs: runs on every device, forward and backward.

`reference` says the same in a page, and is what this is tested against.

All directions with the same number of lines advance together in one loop, and each reads its line where it lies in the
image's frame, so nothing is flipped, rotated or transposed. The backward pass is the adjoint scan written out, from the
saved states: left to autodiff, every step of the loop would add a full-size cotangent.
Four directions, forward and with gradients, B=8, 16x16, C=256 on 2 CPU cores: 11 and 46 ms; with all weights computed
first 25 and 101 ms; with lines moved to a leading axis as inputs of lax.scan, and its autodiff, 29 and 144 ms.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gspn_jax.kernels import reference
from gspn_jax.kernels.derivatives import differentiable
from gspn_jax.kernels.weights import DIRECTIONS, LOGIT_FLOOR, inside, line_axes, stochastic_weights


def refuses(x: Float[Array, "B H W C"], directions: int) -> str | None:
    """Reason why the scan cannot take `x`, in any number of directions, in words, or None."""
    return "computes in float32, not in float64" if x.dtype == jnp.float64 else None


def propagate(
    x: Float[Array, "B H W C"],
    gates: Float[Array, "B H W 4 3 G"],
    lam: Float[Array, "B H W 4 C"],
    out_gate: Float[Array, "B H W 4 C"],
    merge: Float[Array, "4"] | Float[Array, "4 C"],
    skip: Float[Array, "B H W 4 C"] | None,
    chunk: int | None,
) -> Float[Array, "B H W C"]:
    """See `kernels.propagate`; arguments are checked there."""
    states = _scan(x, gates, lam, directions=DIRECTIONS, chunk=chunk, logits=True)
    y = jnp.zeros(x.shape, jnp.float32)
    for k in range(len(DIRECTIONS)):
        term = out_gate[..., k, :].astype(jnp.float32) * states[..., k, :]
        if skip is not None:
            term += skip[..., k, :].astype(jnp.float32) * x.astype(jnp.float32)
        y += merge[k].astype(jnp.float32) * term
    return y.astype(x.dtype)


def line_scan(
    x: Float[Array, "B H W C"],
    left: Float[Array, "B H W G"],
    center: Float[Array, "B H W G"],
    right: Float[Array, "B H W G"],
    direction: str,
    chunk: int | None,
) -> Float[Array, "B H W C"]:
    """See `gspn_jax.kernels.line_scan`; arguments are checked there."""
    weights = jnp.stack([left, center, right], axis=3)[..., None, :, :]
    states = _scan(x, weights, None, directions=(direction,), chunk=chunk, logits=False)
    return states[..., 0, :].astype(x.dtype)


def _scan(
    x: Float[Array, "B H W C"],
    weights: Float[Array, "B H W K 3 G"],
    lam: Float[Array, "B H W K C"] | None,
    *,
    directions: tuple[str, ...],
    chunk: int | None,
    logits: bool,
) -> Float[Array, "B H W K C"]:
    """States [..., k, :] of the scans of lam[..., k, :] * x in directions[k], float32; `weights` may be logits."""
    programs = (
        functools.partial(program, directions=directions, chunk=chunk, logits=logits)
        for program in (_forward, _plain, _backward)
    )
    forward, plain, backward = programs
    return differentiable(forward, plain=plain, pull_back=backward, saves_result=True)((x, weights, lam))


Arrays = tuple[Float[Array, "B H W C"], Float[Array, "B H W K 3 G"], Float[Array, "B H W K C"] | None]
"""x, weights and lam of `_scan`."""


def _plain(arrays: Arrays, *, directions: tuple[str, ...], chunk: int | None, logits: bool) -> Array:
    x, weights, lam = (None if array is None else array.astype(jnp.float32) for array in arrays)
    found = []
    for k, direction in enumerate(directions):
        of_direction = weights[..., k, :, :]
        ready = stochastic_weights(of_direction, direction=direction) if logits else jnp.moveaxis(of_direction, 3, 0)
        drive = x if lam is None else lam[..., k, :] * x
        found.append(reference.states(drive, *ready, direction, chunk))
    return jnp.stack(found, axis=3)


def _forward(arrays: Arrays, *, directions: tuple[str, ...], chunk: int | None, logits: bool) -> Array:
    x, weights, lam = arrays
    channels = x.shape[-1]
    states = jnp.zeros_like(jnp.stack([x] * len(directions), axis=3), jnp.float32)
    for loop in _loops(x.shape, directions, chunk):

        def step(s, carry, loop=loop):
            states, previous = carry
            following = []
            for (k, direction), state in zip(loop.members, previous, strict=True):
                line = _Line(direction, loop.steps, s)
                state = jnp.where(loop.starts(s), 0.0, state)
                left, center, right = (_spread(weight, channels) for weight in _weights(line, weights, k, logits)[0])
                drive = line.read(x) if lam is None else line.read(x) * line.read(lam, k)
                state = left * line.shift(state, 1) + center * state + right * line.shift(state, -1) + drive
                states = line.write(states, state, k)
                following.append(state)
            return states, tuple(following)

        states, _ = lax.fori_loop(0, loop.steps, step, (states, loop.zeros(x)))
    return states


def _backward(
    arrays: Arrays, states: Array, cotangent: Array, *, directions: tuple[str, ...], chunk: int | None, logits: bool
) -> Arrays:
    """The adjoint scan: each direction runs from its last line to its first."""
    x, weights, lam = arrays
    channels, groups = x.shape[-1], weights.shape[-1]
    drives = jnp.zeros_like(states)
    by_weights = jnp.zeros_like(_as_integers(weights))
    for loop in _loops(x.shape, directions, chunk):

        def step(t, carry, loop=loop):
            drives, by_weights, later = carry
            s = loop.steps - 1 - t
            following = []
            for (k, direction), adjoint in zip(loop.members, later, strict=True):
                line, line_before = _Line(direction, loop.steps, s), _Line(direction, loop.steps, jnp.maximum(s - 1, 0))
                ready, complements = _weights(line, weights, k, logits)
                left, center, right = (_spread(weight, channels) for weight in ready)
                adjoint = adjoint + line.read(cotangent, k)
                drives = line.write(drives, adjoint, k)

                before = jnp.where(loop.starts(s), 0.0, line_before.read(states, k))
                neighbours = line.shift(before, 1), before, line.shift(before, -1)
                by_weight = [_group_sum(adjoint * neighbour, groups) for neighbour in neighbours]
                if logits:
                    mean = sum(w * g for w, g in zip(ready, by_weight, strict=True))
                    by_weight = [w * c * (g - mean) for w, c, g in zip(ready, complements, by_weight, strict=True)]
                for j in range(3):
                    by_weights = line.write(by_weights, _as_integers(by_weight[j].astype(weights.dtype)), k, j)

                earlier = line.shift(left * adjoint, -1) + center * adjoint + line.shift(right * adjoint, 1)
                following.append(jnp.where(loop.starts(s), 0.0, earlier))
            return drives, by_weights, tuple(following)

        drives, by_weights, _ = lax.fori_loop(0, loop.steps, step, (drives, by_weights, loop.zeros(x)))
    by_weights = _as_floats(by_weights, weights.dtype)
    if lam is None:
        return drives.sum(3).astype(x.dtype), by_weights, None
    by_x = (drives * lam.astype(jnp.float32)).sum(3)
    by_lam = drives * x.astype(jnp.float32)[..., None, :]
    return by_x.astype(x.dtype), by_weights, by_lam.astype(lam.dtype)


def _weights(
    line: "_Line", weights: Float[Array, "B H W K 3 G"], k: int, logits: bool
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Left, center and right weights of a line; with logits, also 1 - sigmoid of each, for the gradient.

    With A = 1 + exp(-a) and so on, the normalised sigmoids are BC, AC, AB over their sum: one reciprocal for all.
    The three are read one by one and kept apart by barriers because XLA:CPU would compute the exponentials once for
    every use, unvectorised: 44 against 11 ms for four directions (2 cores, B=8, 16x16, C=256).
    """
    line_weights = tuple(line.read(weights, k, j) for j in range(3))
    if not logits:
        return line_weights, ()
    odds = lax.optimization_barrier(tuple(jnp.exp(-jnp.maximum(logit, LOGIT_FLOOR)) for logit in line_weights))
    a, b, c = (1.0 + odd for odd in odds)
    has_left, has_right = inside(a.shape, line.position(a))
    products = b * c * has_left, a * c, a * b * has_right
    scale = 1.0 / sum(products)
    ready = lax.optimization_barrier(tuple(product * scale for product in products))
    return ready, tuple(odd / (1.0 + odd) for odd in odds)


class _Loop(NamedTuple):
    """Directions that advance together over `steps` lines; states restart every `restart` lines, or only at the first.

    Lines at the same place of several side-by-side chunks count as one.
    """

    steps: int
    restart: int | None
    members: list[tuple[int, str]]

    def starts(self, s: Array) -> Array:
        """Whether line s has no line before it."""
        return s == 0 if self.restart is None else s % self.restart == 0

    def zeros(self, x: Array) -> tuple[Array, ...]:
        """The states before the first lines."""
        return tuple(jnp.zeros_like(_Line(direction, self.steps, 0).read(x)) for _, direction in self.members)


def _loops(shape: tuple[int, ...], directions: tuple[str, ...], chunk: int | None) -> Iterator[_Loop]:
    """One loop if all directions have as many lines, else one for rows and one for columns.

    Accelerators run the chunks side by side where they divide the lines: few, wide steps. A CPU does not: a line and
    its weights stay in its cache (37 against 107 ms with gradients, chunk=2, B=8, 16x16, C=256, 2 cores).
    """
    side_by_side = jax.default_backend() != "cpu"
    loops = {}
    for k, direction in enumerate(directions):
        lines = shape[line_axes(direction)[0]]
        if chunk is None or chunk >= lines:
            key = (lines, None)
        elif side_by_side and lines % chunk == 0:
            key = (chunk, None)
        else:
            key = (lines, chunk)
        loops.setdefault(key, []).append((k, direction))
    for (steps, restart), members in loops.items():
        yield _Loop(steps, restart, members)


class _Line(NamedTuple):
    """Line s of every chunk of `steps` lines, counted from where the scan starts."""

    direction: str
    steps: int
    s: int | Array

    def _slice(self, shape: tuple[int, ...], *at: int) -> tuple[tuple, list, list]:
        """(shape with the lines split into chunks, start and size in it of this line, at those indices after W)."""
        lines = line_axes(self.direction)[0]
        index = self.steps - 1 - self.s if self.direction in ("up", "left") else self.s
        split = (*shape[:lines], shape[lines] // self.steps, self.steps, *shape[lines + 1 :])
        start, size = [0] * len(split), list(split)
        start[lines + 1], size[lines + 1] = index, 1
        start[4 : 4 + len(at)], size[4 : 4 + len(at)] = at, [1] * len(at)
        return split, start, size

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this line of an array [B, H, W, ...]; a single chunk has no axis, which is faster on XLA:CPU."""
        lines = line_axes(self.direction)[0]
        chunks = shape[lines] // self.steps
        return (*shape[:lines], *((chunks,) if chunks > 1 else ()), *shape[lines + 1 :])

    def read(self, array: Array, *at: int) -> Array:
        """This line of [B, H, W, ...] in float32, at the given indices of the axes after W."""
        split, start, size = self._slice(array.shape, *at)
        line = lax.dynamic_slice(_as_integers(array).reshape(split), start, size)
        line = line.reshape(self.shape((*array.shape[:3], *array.shape[3 + len(at) :])))
        return _as_floats(line, array.dtype).astype(jnp.float32)

    def write(self, array: Array, line: Array, *at: int) -> Array:
        """`array` [B, H, W, ...] with this line replaced, at the given indices of the axes after W."""
        split, start, size = self._slice(array.shape, *at)
        return lax.dynamic_update_slice(array.reshape(split), line.reshape(size), start).reshape(array.shape)

    def position(self, line: Array) -> int:
        """The axis of the position along the line."""
        return 2 if self.direction in ("down", "up") and line.ndim == 4 else 1

    def shift(self, line: Array, offset: int) -> Array:
        """Element i is element i - offset of `line`, 0 beyond its ends."""
        padding = [(0, 0, 0)] * line.ndim
        padding[self.position(line)] = (offset, -offset, 0)
        return lax.pad(line, jnp.zeros((), line.dtype), padding)


# XLA:CPU widens a whole bfloat16 array to read or write one line of it, every step; as integers it leaves it alone.


def _as_integers(array: Array) -> Array:
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype.itemsize == 2 else array


def _as_floats(array: Array, dtype: jnp.dtype) -> Array:
    return lax.bitcast_convert_type(array, dtype) if dtype.itemsize == 2 else array


def _spread(weight: Float[Array, "*line G"], channels: int) -> Float[Array, "*line C"]:
    """Gives the weight of each group to its C/G consecutive channels."""
    groups = weight.shape[-1]
    if groups in (1, channels):
        return weight
    spread = jnp.broadcast_to(weight[..., None], (*weight.shape, channels // groups))
    return spread.reshape(*weight.shape[:-1], channels)


def _group_sum(line: Float[Array, "*line C"], groups: int) -> Float[Array, "*line G"]:
    """The transpose of `_spread`."""
    if groups == line.shape[-1]:
        return line
    return line.reshape(*line.shape[:-1], groups, -1).sum(-1)
