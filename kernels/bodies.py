"""The two programs of the GPU kernel, forward and backward, as one warpgroup runs them."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels import compat, tiles
from kernels.walk import Inputs, Job, Shared, Walk, clear, finish, meet, take_turn, visit_mine
from kernels.weights import LOGIT_FLOOR


def _odds(logits: Array) -> Array:
    """exp(-logit), for sigmoid = 1 / (1 + odds)."""
    return jnp.exp(-jnp.maximum(logits, LOGIT_FLOOR))


def forward(inputs: Inputs, outputs, state, total, turn, meeting, *, job: Job, plan: tiles.Plan, save: bool):
    shared = Shared(state, total, turn, meeting)

    def fetch(walk: Walk, t: Array, position: Any) -> tuple[Array, ...]:
        """The tiles of an input line, as they are in memory."""
        read = functools.partial(compat.load, layout=tiles.layout(plan.slab))
        per_direction = walk.index(t, position, walk.k)
        fetched = [read(inputs.x, walk.index(t, position))]
        fetched += [read(inputs.weights, walk.index(t, position, walk.k, j)) for j in range(3)]
        fetched += [read(ref, per_direction) for ref in (inputs.lam, inputs.out_gate, inputs.skip) if ref is not None]
        return tuple(fetched)

    def visit(walk: Walk) -> None:
        lines = walk.lines
        clear(walk, shared, 1)

        def step(t, fetched):
            # the next line's loads are under way while this one is computed
            following = tuple(fetch(walk, lax.min(t + 1, lines.count - 1), p) for p in walk.positions())
            parity, results = t % 2, []
            for position, tiles_here in zip(walk.positions(), fetched, strict=True):
                x, left, center, right, *terms = (tile.astype(jnp.float32) for tile in tiles_here)
                lam, out_gate, skip = (terms.pop(0) if has else None for has in (job.lam, job.out_gate, job.skip))
                has_left, has_right = walk.neighbours(position)
                if job.logits:
                    a, b, c = (1.0 + _odds(logits) for logits in (left, center, right))
                    left, center, right = b * c, a * c, a * b
                left = jnp.where(has_left, left, 0.0)
                right = jnp.where(has_right, right, 0.0)
                before = [walk.read(state, walk.state(parity, 0, position, offset)) for offset in range(3)]
                h = left * before[0] + center * before[1] + right * before[2]
                if job.logits:
                    h = h * (1.0 / (left + center + right))
                if job.chunk is not None:
                    h = walk.unless_first(t, h)
                h = h + (x * lam if job.lam else x)
                state[walk.state(1 - parity, 0, position, 1)] = h
                if save:
                    saved = outputs[1 + walk.k]
                    compat.store(saved, walk.index(t, position, halo=1), h)
                y = h
                if job.out_gate:
                    y = y * out_gate
                if job.skip:
                    y = y + skip * x
                if inputs.merge is not None:
                    y = y * _read_merge(walk, inputs.merge)
                if plan.joint:
                    results.append((position, y))
                else:
                    compat.store(outputs[0], walk.index(t, position, walk.k), y)
            take_turn(walk, shared, t, results) if plan.joint else meet(plan, shared)
            return following

        lax.fori_loop(0, lines.count, step, tuple(fetch(walk, 0, p) for p in walk.positions()))
        finish(walk, shared, outputs[0])

    visit_mine(job, plan, visit)


def _read_merge(walk: Walk, merge: Any) -> Array:
    return walk.read(merge, (walk.k, pl.ds(0, walk.lines.positions), pl.ds(walk.start, walk.plan.slab)))


def backward(inputs, outputs, state, total, turn, meeting, *, job: Job, plan: tiles.Plan):
    """The adjoint scan: from the last line to the first.

    With u = merge out_gate: adjoint[t] = u gy[t] + what line t + 1 hands back, center adjoint at the same position,
    left adjoint at the position to the right and right adjoint at the position to the left.
    """
    shared = Shared(state, total, turn, meeting)
    inputs, (cotangent, *saved) = inputs
    by = jax.tree.unflatten(jax.tree.structure(inputs), outputs)

    def visit(walk: Walk) -> None:
        lines, k = walk.lines, walk.k
        clear(walk, shared, tiles.HANDED_ON[plan.joint])
        zeros = compat.zeros((lines.positions, plan.slab), tiles.layout(plan.slab))

        def step(n, carry):
            t, parity = lines.count - 1 - n, n % 2
            (by_merge, carried), following, results = carry, [], []
            for position, from_center in itertools.zip_longest(walk.positions(), carried):
                here = walk.index(t, position, k)
                x = walk.read(inputs.x, walk.index(t, position))
                gy = walk.read(cotangent, walk.index(t, position))

                # the adjoint of h, and what the pixel's own terms get; few values are alive at a time
                if not plan.joint:
                    from_center = walk.read(state, walk.state(parity, 2, position, 1))
                adjoint = from_center + walk.read(state, walk.state(parity, 0, position, 2))
                adjoint = adjoint + walk.read(state, walk.state(parity, 1, position, 0))
                by_x = None
                if job.out_gate:
                    out_gate, scaled = walk.read(inputs.out_gate, here), gy * _read_merge(walk, inputs.merge)
                    h = walk.read(saved[k], walk.index(t, position, halo=1))
                    term = out_gate * h
                    compat.store(by.out_gate, here, scaled * h)
                    if job.skip:
                        skip = walk.read(inputs.skip, here)
                        term = term + skip * x
                        compat.store(by.skip, here, scaled * x)
                        by_x = scaled * skip
                    by_merge = by_merge + gy * term
                    adjoint = adjoint + scaled * out_gate
                else:
                    adjoint = adjoint + gy
                adjoint_x = adjoint
                if job.lam:
                    compat.store(by.lam, here, adjoint * x)
                    adjoint_x = adjoint * walk.read(inputs.lam, here)
                if by_x is not None:
                    adjoint_x = adjoint_x + by_x
                if plan.joint:
                    results.append((position, adjoint_x))
                else:
                    compat.store(by.x, here, adjoint_x)

                # the weights once more, and what they get
                left, center, right = (walk.read(inputs.weights, walk.index(t, position, k, j)) for j in range(3))
                has_left, has_right = walk.neighbours(position)
                if job.logits:
                    odds = [_odds(logits) for logits in (left, center, right)]
                    a, b, c = (1.0 + odd for odd in odds)
                    left, center, right = b * c, a * c, a * b
                    scale = 1.0 / (a * left)
                    complements = [odd * product * scale
                                   for odd, product in zip(odds, (left, center, right), strict=True)]
                left, right = jnp.where(has_left, left, 0.0), jnp.where(has_right, right, 0.0)
                if job.logits:
                    scale = 1.0 / (left + center + right)
                    left, center, right = left * scale, center * scale, right * scale
                state[walk.state(1 - parity, 0, position, 1)] = walk.unless_first(t, left * adjoint)
                state[walk.state(1 - parity, 1, position, 1)] = walk.unless_first(t, right * adjoint)
                # line t - 1, which for the first line of a chunk is not there
                before = [walk.read(saved[k], walk.index(lax.max(t - 1, 0), position, halo=halo)) for halo in range(3)]
                by_weights = [jnp.where(has_left, adjoint * before[0], 0.0), adjoint * before[1],
                              jnp.where(has_right, adjoint * before[2], 0.0)]
                if job.logits:
                    mean = left * by_weights[0] + center * by_weights[1] + right * by_weights[2]
                    by_weights = [weight * complement * (gradient - mean) for weight, complement, gradient
                                  in zip((left, center, right), complements, by_weights, strict=True)]
                for j, gradient in enumerate(by_weights):
                    gradient = walk.unless_first(t, gradient)
                    compat.store(by.weights, walk.index(t, position, k, j), gradient)
                from_center = walk.unless_first(t, center * adjoint)
                if plan.joint:
                    following.append(from_center)
                else:
                    state[walk.state(1 - parity, 2, position, 1)] = from_center
            take_turn(walk, shared, t, results) if plan.joint else meet(plan, shared)
            return by_merge, tuple(following)

        carried = (zeros,) * len(walk.positions()) if plan.joint else ()
        by_merge, _ = lax.fori_loop(0, lines.count, step, (zeros, carried))
        if job.out_gate:
            writer = 0 if plan.joint else walk.warpgroup
            mine = pl.ds(writer * lines.positions, lines.positions)
            compat.store(by.merge, (walk.image, k, lax.axis_index("slab"), mine, slice(None)), by_merge)
        finish(walk, shared, by.x)

    visit_mine(job, plan, visit)
