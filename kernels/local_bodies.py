"""The programs of the scan with chunk=2, forward and backward, as the warpgroups of a block run them: see `local`."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from gspn_jax.kernels import bodies, compat, instructions
from gspn_jax.kernels.local_block import LAYOUT, Class, Given, Next, Shared
from gspn_jax.kernels.local_pieces import AXES, Cut
from gspn_jax.kernels.terms import LAM, OUT_GATE, SKIP, Job

LOGITS = 3


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


def _reciprocal(tile: Float[Array, "64 slab"]) -> Float[Array, "64 slab"]:
    return instructions.reciprocal(tile, LAYOUT)


FIRST, WEIGHTS, SECOND = slice(LAM, None), slice(0, LAM), slice(LAM, None)
"""Kinds of terms: of pixels on first lines, and in two parts of those on second lines. The products of the last part
are made while the weights are computed from the part before."""


def local_forward(given: Given, outputs: Any, shared: Shared, *, job: Job, cut: Cut, pieces: int, view: type[Class]):
    states = shared.exchanged

    def visit(here: Class, coming: Next) -> Any:
        def add(y: Array, x: Array, state: Array, out_gate: Array, skip: list[Array], direction: Array) -> Array:
            term = _one_more(out_gate, state)
            return y + (term + skip[0] * x if skip else term) * here.merge(direction)

        def visit_axis(axis: Array, y: Array) -> Array:
            lines, x = here.lines(axis), here.read_pixels(0)
            ((lam, *others), logits), _ = here.expand((lines.first_direction, FIRST), (lines.second_direction, WEIGHTS))
            state = _one_more(lam, x)
            states[here.rows, here.tile(axis)] = state
            y = add(y, x, state, others[0], others[1:], lines.first_direction)
            here.meet()

            def carry(lines=lines, logits=logits, x=x) -> Array:
                sigmoids = _sigmoids(logits, *lines.neighbours())
                beyond = here.read_beyond(lines, axis)
                carried = sigmoids.weigh(lines.read(states, axis, n, beyond) for n in range(LOGITS))
                return x + carried * sigmoids.scale

            ((lam, *others),), state = here.expand((lines.second_direction, SECOND), meanwhile=carry)

            @pl.when(axis == AXES - 1)
            def _():
                coming.proxy()
                coming.beyond()

            return add(y, x, state + lam * x, others[0], others[1:], lines.second_direction)

        pixels = coming.pixels()
        here.store(outputs[0], lax.fori_loop(0, AXES, visit_axis, here.zeros()))
        return pixels

    view.of(job, given, shared, cut).walk(pieces, visit)


class Cotangents(NamedTuple):
    """Arrays that the backward launch writes."""

    x: Any
    """As x"""
    terms: Any
    """[4 classes, pieces, 64 pixels, pairs, C] uint32, each two bfloat16 in the order of `pairs`, so that two channels
    of a thread are 8 bytes and eight of a slab a whole sector; out_gate and skip without the factor `merge`"""


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


def local_backward(
    given: Given, outputs: Cotangents, shared: Shared, *, job: Job, cut: Cut, pieces: int, view: type[Class]
):
    """Pixels on first lines need what second lines hand back, and those need h of first lines: three phases an axis."""
    exchanged, of_axis = shared.exchanged, len(pairs(job)) // AXES

    def visit(here: Class, coming: Next) -> Any:
        mine, read = here.rows, here.read_pixels

        def write(pair: int, low: Array, high: Array) -> None:
            at = (here.index, here.piece, slice(None), pair, pl.ds(here.start, here.slab))
            low, high = (instructions.widened(tile, LAYOUT) for tile in (low, high))
            compat.store(outputs.terms, at, instructions.packed(low, high, LAYOUT))

        def visit_axis(axis: int, by_x: Array, by_lam_before: Array | None) -> tuple[Array, Array, Any]:
            """(what x gets so far, what lam of first lines gets, the next pixels). The two axes are written out, not a
            loop: what waits for the second one would spill if it were carried."""
            lines, pair = here.lines(axis), axis * of_axis
            x, gy = read(0), read(1)
            ((lam, out_gate, *skip), logits), _ = here.expand(
                (lines.first_direction, FIRST), (lines.second_direction, WEIGHTS)
            )
            lam = 1.0 + lam
            h = lam * x
            exchanged[mine, here.tile(0)] = h
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
                beyond, scale = here.read_beyond(lines, axis), sigmoids.scale
                weights = [sigmoid * scale for sigmoid in sigmoids[:LOGITS]]
                carried = sum(weight * lines.read(exchanged, 0, n, beyond) for n, weight in enumerate(weights))
                return weights, sigmoids.sum * _reciprocal(sigmoids.total), carried

            if axis == 1:  # kept there while registers are scarce
                exchanged[mine, here.tile(1)] = by_x
            ((lam, out_gate, *skip),), (weights, sigmoids, carried) = here.expand(
                (lines.second_direction, SECOND), meanwhile=carry
            )
            pixels = None
            if axis == 1:
                coming.proxy()
                pixels = coming.pixels()
            x, gy = read(0), read(1)
            scaled = gy * here.merge(lines.second_direction)
            adjoint, lam = _one_more(out_gate, scaled), 1.0 + lam
            write(pair + 2, adjoint * x, gy * (carried + lam * x))
            if axis == 1:
                by_x = compat.load(exchanged, (mine, here.tile(1)), LAYOUT)
            if skip:
                by_x = by_x + scaled * skip[0]
            by_x = by_x + adjoint * lam

            beyond = here.read_beyond(lines, axis)

            def by_logit(n: int, weight: Array) -> Array:
                passed = weight * adjoint
                exchanged[mine, here.tile(1 + n)] = passed
                return passed * (1.0 - weight * sigmoids) * (lines.read(exchanged, 0, n, beyond) - carried)

            left, center, right = map(by_logit, range(LOGITS), weights)
            write(pair + 1, left, center)
            if axis == 0:
                write(pair, read(1) * (first_lam * read(0)), right)
            else:
                right = right.astype(jnp.bfloat16)
            beyond = here.read_beyond(lines, AXES + axis)
            here.meet()
            if axis == 1:
                coming.beyond()

            # the left neighbour of a pixel on the second line has that pixel to its right
            adjoint = direct + sum(lines.read(exchanged, 3 - n, n, beyond) for n in range(LOGITS))
            by_lam = (adjoint * read(0)).astype(jnp.bfloat16)
            if axis == 1:
                write(pair, by_lam, right)
            return by_x + adjoint * first_lam, by_lam, pixels

        by_x, by_lam, _ = visit_axis(0, here.zeros(), None)
        by_x, _, pixels = visit_axis(1, by_x, by_lam)
        here.store(outputs.x, by_x)
        return pixels

    view.of(job, given, shared, cut).walk(pieces, visit)
