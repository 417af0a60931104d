"""The programs of the line scan on a GPU, forward and backward, as one warpgroup runs them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from gspn_jax.kernels import compat, tiles
from gspn_jax.kernels.from_memory import FromMemory
from gspn_jax.kernels.from_proxy import FromProxy
from gspn_jax.kernels.terms import KINDS, LAM, OUT_GATE, SKIP, Inputs, Job
from gspn_jax.kernels.walk import Shared, Walk, begin_line, clear, finish, take_turn, visit_mine
from gspn_jax.kernels.weights import LOGIT_FLOOR


def odds(logits: Array) -> Array:
    """exp(-logit), for sigmoid = 1 / (1 + odds)."""
    return jnp.exp(-jnp.maximum(logits, LOGIT_FLOOR))


def normalised(
    logits: Sequence[Array], has_left: Array, has_right: Array, reciprocal: Callable[[Array], Array]
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The weights of three logits, and 1 - sigmoid of each."""
    found = [odds(logit) for logit in logits]
    a, b, c = (1.0 + odd for odd in found)
    left, center, right = b * c, a * c, a * b
    scale = reciprocal(a * left)
    complements = tuple(odd * product * scale for odd, product in zip(found, (left, center, right), strict=True))
    left, right = jnp.where(has_left, left, 0.0), jnp.where(has_right, right, 0.0)
    scale = reciprocal(left + center + right)
    return (left * scale, center * scale, right * scale), complements


def by_weights(adjoints: Sequence[Array], before: Sequence[Array], has_left: Array, has_right: Array) -> list[Array]:
    """Gradients of the three weights: adjoints times the states before of the left, the same and the right position."""
    left, center, right = (adjoint * state for adjoint, state in zip(adjoints, before, strict=True))
    return [jnp.where(has_left, left, 0.0), center, jnp.where(has_right, right, 0.0)]


def by_logits(weights: Sequence[Array], complements: Sequence[Array], shares: Sequence[Array]) -> list[Array]:
    """Gradients of the three logits, from those of their weights times each weight."""
    left, center, right = shares
    mean = left + center + right
    return [
        complement * (share - weight * mean)
        for weight, complement, share in zip(weights, complements, shares, strict=True)
    ]


MOST_AHEAD = 14
"""Bytes that all terms of an element may take if those of a tile are to be loaded a tile ahead: seven terms in
bfloat16. With float32 the registers would spill."""
WIDEST_AHEAD = 128
"""Width up to which a proxy is loaded so early where a line has several tiles; wider ones would spill."""


def _loads_ahead(inputs: Inputs) -> bool:
    """Whether registers have room for the terms of the next tile beside those of the tile that is computed."""
    terms = inputs.x, *(inputs.weights,) * 3, inputs.lam, inputs.out_gate, inputs.skip
    return sum(ref.dtype.itemsize for ref in terms if ref is not None) <= MOST_AHEAD


def _tile_by_tile(walk: Walk, do: Callable, carry: Any, queue: tuple) -> tuple[Any, tuple]:
    """Calls carry, new = do(position, carry, old) for each tile of a line, where old and new are its own in `queue`.

    One program for all tiles, with the addresses of one, which saves registers: the queue goes round.
    """

    def step(m, carry):
        carry, (first, *others) = carry
        walk.await_tile_before(m)
        carry, new = do(walk.positions()[0] + walk.lines.start(m), carry, first)
        return carry, (*others, new)

    return lax.fori_loop(0, len(queue), step, (carry, queue))


def _source(inputs: Inputs, walk: Walk, shared: Shared) -> FromMemory | FromProxy:
    """Source of the terms of tiles."""
    return FromProxy.begin(inputs, walk, shared.factors) if walk.plan.rank else FromMemory(inputs, walk)


def forward(inputs: Inputs, outputs, shared: Shared, *, job: Job, plan: tiles.Plan, save: bool):
    state = shared.state

    def visit(walk: Walk) -> None:
        lines, merge, source = walk.lines, walk.read_merge(inputs.merge), _source(inputs, walk, shared)

        def fetch(t: Array, position: Any) -> tuple[Array, Any]:
            """The tiles of an input line, as they are in memory."""
            t = lax.min(t, lines.count - 1)
            x = compat.load(inputs.x, walk.index(t, position), plan.layout)
            return x, source.load(t, position, range(len(KINDS)))

        def scan_tile(t: Array, position: Any, fetched: tuple[Array, Any]) -> Float[Array, "P slab"]:
            """A tile of y, stored if the directions do not meet."""
            parity, (x, loaded) = lax.rem(t, 2), fetched
            term = functools.partial(source.term, loaded)
            x, left, center, right = walk.widened(x), *map(term, range(LAM))
            has_left, has_right = walk.neighbours(position, shared=job.shared)
            if job.logits:
                a, b, c = (1.0 + odds(logits) for logits in (left, center, right))
                left, center, right = b * c, a * c, a * b
            left = jnp.where(has_left, left, 0.0)
            right = jnp.where(has_right, right, 0.0)
            if job.logits:
                scale = walk.spread(walk.reciprocal(left + center + right))
            left, center, right = map(walk.spread, (left, center, right))
            # one neighbour after the other: few values are alive at a time
            h = left * walk.read(state, walk.state(parity, 0, position, 0))
            h = h + center * walk.read(state, walk.state(parity, 0, position, 1))
            h = h + right * walk.read(state, walk.state(parity, 0, position, 2))
            if job.logits:
                h = h * scale
            if job.chunk is not None:
                h = walk.unless_first(t, h)
            h = h + (x * term(LAM) if job.lam else x)
            state[walk.state(1 - parity, 0, position, 1)] = h
            if save:
                compat.store(outputs[1 + walk.k], walk.index(t, position, halo=1), h)
            y = h
            if job.out_gate:
                y = y * term(OUT_GATE)
            if job.skip:
                y = y + term(SKIP) * x
            if inputs.merge is not None:
                y = y * merge
            if not plan.joint:
                compat.store(outputs[0], walk.index(t, position, walk.k), y)
            return y

        def step(t, queue):
            """Loads stand behind the tile whose registers they take, and before the turn, below which ptxas cannot move
            them: they have all of the next tile's time to arrive if `queue` has two tiles, and a turn's if one."""
            begin_line(plan, shared)
            positions, results = walk.positions(), []
            for m, position in enumerate(positions):
                tile, *queue = queue
                walk.await_tile_before(m)
                results.append((position, scan_tile(t, position, tile)))
                lines_ahead, at = divmod(m + 1 + len(queue), len(positions))
                queue.append(fetch(t + lines_ahead, positions[at]))
            if plan.joint:
                take_turn(walk, shared, t, results)
            return tuple(queue)

        clear(walk, shared, 1)
        positions = walk.positions()
        wide = plan.rank > WIDEST_AHEAD and len(positions) > 1
        first = [divmod(m, len(positions)) for m in range(2 if _loads_ahead(inputs) and not wide else 1)]
        lax.fori_loop(0, lines.count, step, tuple(fetch(jnp.int32(t), positions[m]) for t, m in first))
        finish(walk, shared, outputs[0])

    visit_mine(job, plan, visit)


def backward(inputs, outputs, shared: Shared, *, job: Job, plan: tiles.Plan):
    """The adjoint scan: from the last line to the first.

    With u = merge out_gate: adjoint[t] = u gy[t] + what line t + 1 hands back, center adjoint at the same position,
    left adjoint at the position to the right and right adjoint at the position to the left.
    """
    state = shared.state
    inputs, (cotangent, *saved) = inputs
    by, center_in_registers = outputs, plan.handed_on == tiles.HANDED_ON[True]

    def visit(walk: Walk) -> None:
        walk = walk._replace(backwards=True)
        lines, k = walk.lines, walk.k
        # lines of few channels and many tiles have no registers for it: those of addresses far apart
        early = _loads_ahead(inputs) and len(walk.positions()) <= 2
        zeros = compat.zeros((lines.positions, plan.slab), plan.layout)
        merge = walk.read_merge(inputs.merge)
        source = _source(inputs, walk, shared)

        def fetch_pixel(n: Array, position: Any) -> tuple[dict[str, Array], Any]:
            """Loads what the cotangents of a pixel's own terms need, as it is in memory."""
            t = walk.visited(lax.min(n, lines.count - 1))
            read = functools.partial(compat.load, layout=plan.layout)
            found = {"x": read(inputs.x, walk.index(t, position)), "gy": read(cotangent, walk.index(t, position))}
            if job.out_gate:
                found["h"] = read(saved[k], walk.index(t, position, halo=1))
            return found, source.load(t, position, (LAM, OUT_GATE, SKIP))

        def fetch_weights(n: Array, position: Any) -> tuple[Any, list[Array]]:
            """The weights of a tile, and the states of the line before to their left, in the middle and to their right;
            for the first line of a chunk these are not used."""
            t = walk.visited(n)
            weights = source.load(t, position, range(LAM))
            index = functools.partial(walk.index, lax.max(t - 1, 0), position)
            return weights, [compat.load(saved[k], index(halo=halo), plan.layout) for halo in range(3)]

        def pull_pixel(
            n: Array, position: Any, fetched: tuple[dict[str, Array], Any], by_merge: Array, from_center: Array | None
        ) -> tuple[Array, Array, Array]:
            """(by_merge, adjoint of h, adjoint of x), the latter stored if the directions do not meet."""
            t, parity = walk.visited(n), lax.rem(n, 2)
            found, loaded = fetched
            found = {name: walk.widened(tile) for name, tile in found.items()}
            term, x, gy = functools.partial(source.term, loaded), found["x"], found["gy"]

            def write(kind: int, tile: Array) -> None:
                compat.store(getattr(by, KINDS[kind]), walk.index(t, position, k), tile)

            # few values are alive at a time
            if not center_in_registers:
                from_center = walk.read(state, walk.state(parity, 2, position, 1))
            adjoint = from_center + walk.read(state, walk.state(parity, 0, position, 2))
            adjoint = adjoint + walk.read(state, walk.state(parity, 1, position, 0))
            by_x = None
            if job.out_gate:
                out_gate, h, scaled = term(OUT_GATE), found["h"], gy * merge
                y = out_gate * h
                write(OUT_GATE, scaled * h)
                if job.skip:
                    skip = term(SKIP)
                    y = y + skip * x
                    write(SKIP, scaled * x)
                    by_x = scaled * skip
                by_merge = by_merge + walk.once(position, gy * y)
                adjoint = adjoint + scaled * out_gate
            else:
                adjoint = adjoint + gy
            adjoint_x = adjoint
            if job.lam:
                write(LAM, adjoint * x)
                adjoint_x = adjoint * term(LAM)
            if by_x is not None:
                adjoint_x = adjoint_x + by_x
            if not plan.joint:
                compat.store(by.x, walk.index(t, position, k), adjoint_x)
            return by_merge, adjoint, adjoint_x

        def pull_weights(n: Array, position: Any, loaded: Any, before: list[Array], adjoint: Array) -> Array | None:
            """Computes the weights once more and what they get; returns what center hands on, if in registers."""
            t, parity = walk.visited(n), lax.rem(n, 2)

            def write_weight(kind: int, tile: Array) -> None:
                *pixel, channels = walk.index(t, position, k, kind)
                at = lax.axis_index("slab") if job.shared else channels
                compat.store(by.weights, (*pixel, at), tile)

            weights = [source.term(loaded, kind) for kind in range(LAM)]
            has_left, has_right = walk.neighbours(position, shared=job.shared)
            if job.logits:
                weights, complements = normalised(weights, has_left, has_right, walk.reciprocal)
                left, center, right = weights
            else:
                left, center, right = weights
                left, right = jnp.where(has_left, left, 0.0), jnp.where(has_right, right, 0.0)
            left, center, right = map(walk.spread, (left, center, right))
            passed = [weight * adjoint for weight in (left, center, right)]
            state[walk.state(1 - parity, 0, position, 1)] = walk.unless_first(t, passed[0])
            state[walk.state(1 - parity, 1, position, 1)] = walk.unless_first(t, passed[2])
            before = [walk.widened(tile) for tile in before]
            if job.logits and not job.shared:
                gradients = by_logits(weights, complements, by_weights(passed, before, has_left, has_right))
            else:
                gradients = by_weights((adjoint,) * 3, before, *walk.neighbours(position))
            if job.shared:
                gradients = [walk.sum_of_channels(gradient) for gradient in gradients]
                if job.logits:
                    shares = [weight * gradient for weight, gradient in zip(weights, gradients, strict=True)]
                    gradients = by_logits(weights, complements, shares)
            for kind, gradient in enumerate(gradients):
                write_weight(kind, walk.unless_first(t, gradient))
            from_center = walk.unless_first(t, passed[1])
            if not center_in_registers:
                state[walk.state(1 - parity, 2, position, 1)] = from_center
                from_center = None
            return from_center

        def joint_step(n, carry):
            """Loads for the weights of a tile are under way while its pixels are computed, and those for the next
            pixels while the weights are. The barrier of the line and the turn keep ptxas from moving them down."""
            (by_merge, carried, pixel), results, following = carry, [], []
            positions = walk.positions()
            for m, (position, from_center) in enumerate(zip(positions, carried, strict=True)):
                if early:
                    weights = fetch_weights(n, position)
                if m == 0:
                    begin_line(plan, shared)
                walk.await_tile_before(m)
                if not early:
                    pixel = fetch_pixel(n, position)
                by_merge, adjoint, adjoint_x = pull_pixel(n, position, pixel, by_merge, from_center)
                last = m + 1 == len(positions)
                if early:
                    pixel = fetch_pixel(n + 1, positions[0]) if last else fetch_pixel(n, positions[m + 1])
                results.append((position, adjoint_x))
                if last:
                    take_turn(walk, shared, walk.visited(n), results)
                if not early:
                    weights = fetch_weights(n, position)
                following.append(pull_weights(n, position, *weights, adjoint))
            return by_merge, tuple(following), pixel if early else ()

        def step(n, carry):
            """As `joint_step`, but for the turn; the tiles of a line are one program."""
            begin_line(plan, shared)
            first, last_tile = walk.positions()[0], lines.start(lines.tiles - 1)

            def pull(position, carry, from_center):
                by_merge, pixel = carry
                if not early:
                    by_merge, adjoint, _ = pull_pixel(n, position, fetch_pixel(n, position), by_merge, from_center)
                    return (by_merge, ()), pull_weights(n, position, *fetch_weights(n, position), adjoint)
                weights = fetch_weights(n, position)
                by_merge, adjoint, _ = pull_pixel(n, position, pixel, by_merge, from_center)
                following = position + lines.positions
                last = following == first + lines.stretch
                if lines.overlap:
                    following = lax.min(following, first + last_tile)
                pixel = fetch_pixel(jnp.where(last, n + 1, n), jnp.where(last, first, following))
                return (by_merge, pixel), pull_weights(n, position, *weights, adjoint)

            return _tile_by_tile(walk, pull, *carry)

        clear(walk, shared, plan.handed_on)
        carried = (zeros if center_in_registers else None,) * len(walk.positions())
        pixel = fetch_pixel(jnp.int32(0), walk.positions()[0]) if early else ()
        if plan.joint:
            carry = zeros, carried, pixel
            by_merge, *_ = lax.fori_loop(0, lines.count, joint_step, carry)
        else:
            (by_merge, _), _ = lax.fori_loop(0, lines.count, step, ((zeros, pixel), carried))
        if job.out_gate:
            writer = 0 if plan.joint else walk.warpgroup
            mine = pl.ds(writer * lines.positions, lines.positions)
            compat.store(by.merge, (lax.axis_index("image"), k, lax.axis_index("slab"), mine, slice(None)), by_merge)
        finish(walk, shared, by.x)

    visit_mine(job, plan, visit)
