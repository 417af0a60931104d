"""The line scan as one XLA loop over lines: runs on every device, forward and backward.

All directions with the same number of lines advance together in one loop, and each reads its line where it lies in the
image's frame, so nothing is flipped, rotated or transposed. The backward pass is the adjoint scan written out: left to
autodiff, every step of the loop would add a full-size cotangent.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.weights import DIRECTIONS, line_axes, neighbour_sigmoids

UNROLLED_LINES = 4
"""Loops of at most this many lines (local GSPN) are written out, so that XLA fuses them."""


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
    states = _scan(x, gates, lam, DIRECTIONS, chunk, True)
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
    """See `kernels.line_scan`; arguments are checked there."""
    weights = jnp.stack([left, center, right], axis=3)[..., None, :, :]
    return _scan(x, weights, None, (direction,), chunk, False)[..., 0, :].astype(x.dtype)


def _loops(shape: tuple[int, ...], directions: tuple[str, ...], chunk: int | None):
    """Yields (lines a loop, restart or None, [(k, direction)]): directions that can advance together in one loop.

    Chunks that divide the lines run side by side, in a loop of `chunk` lines. Otherwise the loop runs over all lines
    and the state restarts every `chunk` of them.
    """
    loops = {}
    for k, direction in enumerate(directions):
        lines = shape[line_axes(direction)[0]]
        if chunk is None or chunk >= lines:
            key = (lines, None)
        else:
            key = (chunk, None) if lines % chunk == 0 else (lines, chunk)
        loops.setdefault(key, []).append((k, direction))
    for (steps, restart), members in loops.items():
        yield steps, restart, members


def _loop(steps: int, body: Callable, carry):
    if steps <= UNROLLED_LINES:
        for s in range(steps):
            carry = body(s, carry)
        return carry
    return lax.fori_loop(0, steps, body, carry)


@dataclasses.dataclass(frozen=True)
class _Line:
    """Line s of every chunk of `steps` lines, counted from where the scan starts; lines and chunks share an axis."""

    direction: str
    steps: int
    s: int | Array

    @property
    def axis(self) -> int:
        """The axis of the position along the line."""
        return line_axes(self.direction)[1]

    def _slice(self, shape: tuple[int, ...], k: int | None) -> tuple[tuple, list, list]:
        """(shape with the lines split into chunks, start and size of this line in it)."""
        lines = line_axes(self.direction)[0]
        index = self.steps - 1 - self.s if self.direction in ("up", "left") else self.s
        split = (*shape[:lines], shape[lines] // self.steps, self.steps, *shape[lines + 1 :])
        start, size = [0] * len(split), list(split)
        start[lines + 1], size[lines + 1] = index, 1
        if k is not None:
            start[4], size[4] = k, 1
        return split, start, size

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this line of an array [B, H, W, C]."""
        lines = line_axes(self.direction)[0]
        return (*shape[:lines], shape[lines] // self.steps, *shape[lines + 1 :])

    def read(self, array: Array, k: int | None = None) -> Array:
        """This line of [B, H, W, ...], or of direction k of [B, H, W, K, ...], in float32."""
        split, start, size = self._slice(array.shape, k)
        line = lax.dynamic_slice(array.reshape(split), start, size)
        drop = (line_axes(self.direction)[0] + 1,) + (() if k is None else (4,))
        return lax.squeeze(line, drop).astype(jnp.float32)

    def weights(self, weights: Array, k: int, logits: bool) -> tuple[tuple, tuple]:
        """Left, center and right weights of this line, and the sigmoids they come from if they are given by logits."""
        line = self.read(weights, k)
        if not logits:
            return tuple(line[..., j, :] for j in range(3)), ()
        sigmoids = neighbour_sigmoids(line, self.axis)
        scale = 1.0 / sum(sigmoids)
        return tuple(sigmoid * scale for sigmoid in sigmoids), sigmoids

    def write(self, array: Array, k: int, line: Array) -> Array:
        """`array` [B, H, W, K, ...] with this line of direction k replaced."""
        split, start, size = self._slice(array.shape, k)
        return lax.dynamic_update_slice(array.reshape(split), line.reshape(size), start).reshape(array.shape)


def _shift(line: Array, axis: int, offset: int) -> Array:
    """Element i is element i - offset of `line`, 0 beyond its ends."""
    padding = [(0, 0, 0)] * line.ndim
    padding[axis] = (offset, -offset, 0)
    return lax.pad(line, jnp.zeros((), line.dtype), padding)


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


def _through_normalisation(
    by_weight: Sequence[Array], weights: Sequence[Array], sigmoids: Sequence[Array]
) -> list[Array]:
    """Cotangents of the logits of w_j = s_j / sum(s), s = sigmoid(logits), from those of the weights."""
    mean = sum(weight * cotangent for weight, cotangent in zip(weights, by_weight, strict=True))
    return [
        weight * (1.0 - sigmoid) * (cotangent - mean)
        for weight, sigmoid, cotangent in zip(weights, sigmoids, by_weight, strict=True)
    ]


# The core: h[..., k, :] is the scan of lam[..., k, :] * x in directions[k], float32. `weights` are logits if `logits`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _scan(
    x: Float[Array, "B H W C"],
    weights: Float[Array, "B H W K 3 G"],
    lam: Float[Array, "B H W K C"] | None,
    directions: tuple[str, ...],
    chunk: int | None,
    logits: bool,
) -> Float[Array, "B H W K C"]:
    channels = x.shape[-1]
    states = jnp.zeros((*x.shape[:3], len(directions), channels), jnp.float32)
    for steps, restart, members in _loops(x.shape, directions, chunk):

        def step(s, carry, members=members, steps=steps, restart=restart):
            states, previous = carry
            following = []
            for (k, direction), state in zip(members, previous, strict=True):
                line = _Line(direction, steps, s)
                if restart:
                    state = jnp.where(s % restart == 0, 0.0, state)
                left, center, right = (_spread(w, channels) for w in line.weights(weights, k, logits)[0])
                drive = line.read(x) if lam is None else line.read(x) * line.read(lam, k)
                state = (
                    left * _shift(state, line.axis, 1) + center * state + right * _shift(state, line.axis, -1) + drive
                )
                states = line.write(states, k, state)
                following.append(state)
            return states, tuple(following)

        start = tuple(jnp.zeros(_Line(direction, steps, 0).shape(x.shape), jnp.float32) for _, direction in members)
        states, _ = _loop(steps, step, (states, start))
    return states


def _scan_forward(x, weights, lam, directions, chunk, logits):
    states = _scan(x, weights, lam, directions, chunk, logits)
    return states, (x, weights, lam, states)


def _scan_backward(directions, chunk, logits, saved, cotangent):
    """The adjoint scan: each direction runs from its last line to its first."""
    x, weights, lam, states = saved
    channels, groups = x.shape[-1], weights.shape[-1]
    drives = jnp.zeros(states.shape, jnp.float32)
    gates = jnp.zeros(weights.shape, weights.dtype)
    for steps, restart, members in _loops(x.shape, directions, chunk):

        def step(t, carry, members=members, steps=steps, restart=restart):
            drives, gates, later = carry
            s = steps - 1 - t
            first = s % restart == 0 if restart else s == 0
            following = []
            for (k, direction), adjoint in zip(members, later, strict=True):
                line = _Line(direction, steps, s)
                ready, sigmoids = line.weights(weights, k, logits)
                left, center, right = (_spread(w, channels) for w in ready)
                adjoint = adjoint + line.read(cotangent, k)
                drives = line.write(drives, k, adjoint)
                before = jnp.where(first, 0.0, _Line(direction, steps, jnp.maximum(s - 1, 0)).read(states, k))
                by_weight = [
                    _group_sum(adjoint * neighbour, groups)
                    for neighbour in (_shift(before, line.axis, 1), before, _shift(before, line.axis, -1))
                ]
                if logits:
                    by_weight = _through_normalisation(by_weight, ready, sigmoids)
                gates = line.write(gates, k, jnp.stack(by_weight, axis=-2).astype(gates.dtype))
                earlier = _shift(left * adjoint, line.axis, -1) + _shift(right * adjoint, line.axis, 1)
                following.append(jnp.where(first, 0.0, earlier + center * adjoint))
            return drives, gates, tuple(following)

        start = tuple(jnp.zeros(_Line(direction, steps, 0).shape(x.shape), jnp.float32) for _, direction in members)
        drives, gates, _ = _loop(steps, step, (drives, gates, start))
    if lam is None:
        return drives.sum(3).astype(x.dtype), gates, None
    by_x = (drives * lam.astype(jnp.float32)).sum(3)
    by_lam = drives * x.astype(jnp.float32)[..., None, :]
    return by_x.astype(x.dtype), gates, by_lam.astype(lam.dtype)


_scan.defvjp(_scan_forward, _scan_backward)
