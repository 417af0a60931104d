"""What a proxy and its factors get, on tensor cores: the cotangents of the terms never reach device memory.

Once the adjoint of every state is known (`bodies.adjoint`), a pixel's terms get what the pixel and its neighbours on
the line before say, and no scan is left: blocks may walk as they like, and each keeps one sum in registers.

    sum_over_lines  stays with a direction and a slab of channels, and walks over images and lines: for the factors
    sum_over_slabs  stays with a direction and a line of 64 positions, and walks over slabs: for the proxy

A step of either expands the logits of 64 positions and 64 channels once more, makes the cotangents of all their terms
in shared memory, and multiplies them by the proxy or by the factors. docs/kernel.md has the bytes.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import bodies, compat, expansion, launch, tiles
from gspn_jax.kernels.expansion import QUANTUM
from gspn_jax.kernels.terms import LAM, OUT_GATE, SKIP, Inputs, Job
from gspn_jax.kernels.walk import Walk, meet

LOGITS = 3
WIDTH = QUANTUM
"""Channels computed at a time where there are logits: with more the sums, which are in registers too, would spill."""


class Given(NamedTuple):
    """What both passes read."""

    x: Any
    """[B, H, W, C]"""
    cotangent: Any
    """[B, H, W, C], of y"""
    adjoints: Any
    """[B, H, W, 4, C]"""
    states: Any
    """of each direction, with a position beyond each end of a line"""
    proxy: Any
    """[2, B / n, lines, 64, d]; see `Inputs`"""
    up: Any
    """[4, slabs, kinds, d, 64]"""


class Tiles(NamedTuple):
    """What the warpgroups of a block share."""

    proxy: Any
    """[1 or 2, 64 positions, d]: where lines pass, this one and the one on its way"""
    up: Any
    """[1 or 2, kinds, d, 64 channels], likewise"""
    terms: Any
    """[kinds, 64 positions, 64 channels]: first the logits, then what every kind of term gets"""
    proxy_arrived: Any
    up_arrived: Any
    meeting: Any


def pull_back(
    job: Job,
    plan: tiles.Plan,
    inputs: Inputs,
    up: Float[Array, "4 N C d"],
    merge: Float[Array, "4 C"],
    adjoints: Float[Array, "B H W 4 C"],
    states: tuple[Array, ...],
    cotangent: Float[Array, "B H W C"],
) -> tuple[Float[Array, "B H W d"], Float[Array, "4 N C d"], Float[Array, "4 C"]]:
    """The cotangents of the proxy, of its factors `up` and of `merge`; see the equations in docs/kernel.md."""
    plan = dataclasses.replace(plan, across=QUANTUM)
    given = Given(inputs.x, cotangent, adjoints, states, inputs.proxy, inputs.up)
    kinds = tuple(range(up.shape[1]))
    parts = [_by_up(job, plan, given, part) for part in (kinds[:LOGITS], kinds[LOGITS:])]
    by_up, (_, gy_h) = jnp.concatenate([sums for sums, _ in parts], axis=1), parts[1]
    # the kernels leave `merge` out of what out_gate and skip get: it is a factor of the sums, and gets them
    after = slice(OUT_GATE, None)
    used = up[:, after].astype(cotangent.dtype).astype(jnp.float32)
    by_merge = gy_h + (by_up[:, after] * used).sum((1, 3))
    by_up = by_up.at[:, after].multiply(merge[:, None, :, None])
    scaled = up.at[:, after].multiply(merge[:, None, :, None])
    by_proxy = _by_proxy(job, plan, given._replace(up=expansion.slabs(plan, scaled, cotangent.dtype, once=True)))
    return by_proxy, by_up, by_merge


def _by_up(
    job: Job, plan: tiles.Plan, given: Given, kinds: tuple[int, ...]
) -> tuple[Float[Array, "4 N C d"], Float[Array, "4 C"] | None]:
    """(sums of proxy times what `kinds` of terms get, sum of gy h if out_gate is one of them)."""
    groups, directions, rank = given.proxy.shape[1], len(job.directions), given.proxy.shape[-1]
    wanted = math.ceil(plan.blocks / (directions * plan.slabs))
    splits = max(n for n in range(1, groups + 1) if groups % n == 0 and n <= max(wanted, 1))
    blocks = (splits, directions, plan.slabs)
    positions = plan.rows.positions * plan.warpgroups
    outputs = [jax.ShapeDtypeStruct((*blocks, len(kinds), plan.slab, rank), jnp.float32)]
    if OUT_GATE in kinds:
        outputs.append(jax.ShapeDtypeStruct((*blocks, positions, plan.slab), jnp.float32))
    body = functools.partial(sum_over_lines, job=job, plan=plan, kinds=kinds, groups=groups // splits)
    shared = _shared(plan, given, kinds, lines=2, up=(1, LOGITS if 0 in kinds else 0))
    if 0 not in kinds:
        given = given._replace(up=None)
    grid = dict(zip(("split", "direction", "slab"), blocks, strict=True))
    sums, *gy_h = launch.run(body, grid, plan.warpgroups, given, outputs, shared)
    by_channel = launch.join_slabs(plan, sums.sum(0).transpose(0, 2, 1, 3, 4), axis=2)
    return by_channel, launch.join_slabs(plan, gy_h[0].sum((0, 3)), axis=1) if gy_h else None


def _by_proxy(job: Job, plan: tiles.Plan, given: Given) -> Float[Array, "B H W d"]:
    _, groups, count, positions, rank = given.proxy.shape
    outputs = [jax.ShapeDtypeStruct((len(job.directions), groups, count, positions, rank), jnp.float32)]
    body = functools.partial(sum_over_slabs, job=job, plan=plan)
    grid = {"image": groups, "line": count, "direction": len(job.directions)}
    kinds = tuple(range(given.up.shape[2]))
    shared = _shared(plan, given, kinds, lines=1, up=(2, len(kinds)))
    found = launch.run(body, grid, plan.warpgroups, given, outputs, shared)[0]
    found = found.reshape(2, 2, groups, count, plan.images, -1, rank).sum(1)
    found = found[0].transpose(0, 2, 1, 3, 4) + found[1].transpose(0, 2, 3, 1, 4)  # lines that are rows, and columns
    return found.reshape(groups * plan.images, plan.height, plan.width, rank).astype(given.x.dtype)


def _shared(plan: tiles.Plan, given: Given, kinds: tuple[int, ...], *, lines: int, up: tuple[int, int]) -> Tiles:
    """With room for so many lines of the proxy, and for `up` of (slabs, kinds)."""
    rank, slab = given.proxy.shape[-1], tiles.SLABS[0]
    swizzled = functools.partial(expansion.swizzled, dtype=given.x.dtype)
    return Tiles(
        proxy=swizzled((lines, tiles.ROWS, rank)),
        up=swizzled((*up, rank, slab)) if math.prod(up) else (),
        terms=swizzled((len(kinds), tiles.ROWS, slab)),
        proxy_arrived=plgpu.Barrier(num_barriers=lines),
        up_arrived=plgpu.Barrier(num_barriers=math.prod(up)) if math.prod(up) else (),
        meeting=plgpu.Barrier(num_arrivals=plan.warpgroups),
    )


def shared_bytes(kinds: int, rank: int) -> int:
    """Of shared memory, in the pass that takes more, for a proxy of `rank` that expands to so many kinds of terms."""
    slab, rank = tiles.SLABS[0], rank + -rank % QUANTUM
    return 2 * (2 * kinds * rank * slab + kinds * tiles.ROWS * slab + tiles.ROWS * rank)


def sum_over_lines(
    given: Given, outputs: Any, shared: Tiles, *, job: Job, plan: tiles.Plan, kinds: tuple[int, ...], groups: int
):
    """What the factors of `kinds` get, from the lines of `groups` groups of images."""
    split, slab, warpgroup = (lax.axis_index(name) for name in ("split", "slab", "warpgroup"))
    part, mine = _part(warpgroup, given)

    def visit(k: int, direction: str) -> None:
        count = plan.lines(direction).count

        def place(n: Array) -> tuple[Array, Array]:
            """(group of images, row or column) of the n-th step."""
            return split * groups + lax.div(n, jnp.int32(count)), lax.rem(n, jnp.int32(count))

        def send(n: Array) -> None:
            """Past the last line that one comes again, so that every wait has its arrival."""
            source = given.proxy.at[_order(direction), *place(lax.min(n, groups * count - 1))]
            slot = lax.rem(n, 2)
            pl.when(warpgroup == 0)(
                lambda: plgpu.copy_gmem_to_smem(source, shared.proxy.at[slot], shared.proxy_arrived.at[slot])
            )

        def step(n: Array, gy_h: Array, sums: tuple[Any, ...]) -> Array:
            slot = lax.rem(n, 2)
            send(n + 1)
            plgpu.barrier_wait(shared.proxy_arrived.at[slot])
            group, line = place(n)
            walk = _walk(job, plan, k, direction, group, slab, warpgroup)
            if 0 in kinds:
                _expand_logits(walk, shared, slot, 0)
                meet(plan, shared)
            gy_h = _make_cotangents(walk, walk.line(line), given, shared, kinds, gy_h)
            meet(plan, shared)
            for n, total in enumerate(sums):
                compat.wgmma(total, shared.terms.at[n], shared.proxy.at[slot, :, part], transpose_a=True)
            plgpu.wgmma_wait(0)
            meet(plan, shared)
            return gy_h

        def all_steps(*sums: Any) -> Array:
            if 0 in kinds:
                _send_up(plan, warpgroup, given, shared, k, slab, 0)
                _await_up(shared, 0)
            send(jnp.int32(0))
            zeros = compat.zeros((plan.lines(direction).positions, plan.slab), plan.layout)
            gy_h = lax.fori_loop(0, groups * count, lambda n, gy_h: step(n, gy_h, sums), zeros)
            plgpu.barrier_wait(shared.proxy_arrived.at[lax.rem(jnp.int32(groups * count), 2)])
            for n, total in enumerate(sums):

                def store(n=n, total=total):
                    compat.store(outputs[0], (split, k, slab, n, slice(None), part), total[...])

                pl.when(mine)(store)
            return gy_h

        gy_h = pl.run_scoped(all_steps, *[plgpu.ACC((plan.slab, QUANTUM), jnp.float32)] * len(kinds))
        if OUT_GATE in kinds:
            positions = pl.ds(warpgroup * plan.rows.positions, plan.rows.positions)
            compat.store(outputs[1], (split, k, slab, positions, slice(None)), gy_h)

    for k, direction in enumerate(job.directions):
        pl.when(lax.axis_index("direction") == k)(functools.partial(visit, k, direction))


def sum_over_slabs(given: Given, outputs: Any, shared: Tiles, *, job: Job, plan: tiles.Plan):
    """What a line of the proxy gets, from all slabs of channels."""
    group, line, warpgroup = (lax.axis_index(name) for name in ("image", "line", "warpgroup"))
    part, mine = _part(warpgroup, given)
    kinds = tuple(range(given.up.shape[2]))

    def visit(k: int, direction: str) -> None:
        def send(slab: Array) -> None:
            """Past the last slab that one comes again."""
            _send_up(plan, warpgroup, given, shared, k, lax.min(slab, plan.slabs - 1), lax.rem(slab, 2))

        def step(slab: Array, total: Any) -> None:
            slot = lax.rem(slab, 2)
            send(slab + 1)
            _await_up(shared, slot)
            walk = _walk(job, plan, k, direction, group, slab, warpgroup)
            _expand_logits(walk, shared, 0, slot)
            meet(plan, shared)
            _make_cotangents(walk, walk.line(line), given, shared, kinds, None)
            meet(plan, shared)
            pl.loop(0, len(kinds))(
                lambda kind: compat.wgmma(
                    total, shared.terms.at[kind], shared.up.at[slot, kind, part], transpose_b=True
                )
            )
            plgpu.wgmma_wait(0)
            meet(plan, shared)

        def all_steps(total: Any) -> None:
            @pl.when(warpgroup == 0)
            def _():
                source = given.proxy.at[_order(direction), group, line]
                plgpu.copy_gmem_to_smem(source, shared.proxy.at[0], shared.proxy_arrived.at[0])

            send(jnp.int32(0))
            plgpu.barrier_wait(shared.proxy_arrived.at[0])
            pl.loop(0, plan.slabs)(lambda slab: step(slab, total))
            _await_up(shared, plan.slabs % 2)
            pl.when(mine)(lambda: compat.store(outputs[0], (k, group, line, slice(None), part), total[...]))

        pl.run_scoped(all_steps, plgpu.ACC((tiles.ROWS, QUANTUM), jnp.float32))

    for k, direction in enumerate(job.directions):
        pl.when(lax.axis_index("direction") == k)(functools.partial(visit, k, direction))


def _order(direction: str) -> int:
    """Where lines in this direction are in `Given.proxy`."""
    return 0 if direction in ("down", "up") else 1


def _walk(job: Job, plan: tiles.Plan, k: int, direction: str, group: Array, slab: Array, warpgroup: Array) -> Walk:
    """Where this warpgroup is: its positions on a line of a group of images."""
    start = pl.multiple_of(lax.min(slab * plan.slab, plan.channels - plan.slab), tiles.VECTOR)
    image = group * plan.images + lax.div(warpgroup * (tiles.ROWS // plan.warpgroups), plan.width)
    return Walk(k=k, direction=direction, job=job, plan=plan, image=image, start=start, warpgroup=warpgroup)


def _part(warpgroup: Array, given: Given) -> tuple[Any, Array]:
    """(the part of the rank that this warpgroup sums, whether no other does so too)."""
    parts = given.proxy.shape[-1] // QUANTUM
    return pl.ds(pl.multiple_of(lax.min(warpgroup, parts - 1) * QUANTUM, QUANTUM), QUANTUM), warpgroup < parts


def _send_up(plan: tiles.Plan, warpgroup: Array, given: Given, shared: Tiles, k: int, slab: Array, slot: int) -> None:
    expansion.share_out(
        plan,
        warpgroup,
        shared.up.shape[1],
        lambda kind: plgpu.copy_gmem_to_smem(
            given.up.at[k, slab, kind], shared.up.at[slot, kind], shared.up_arrived.at[slot * shared.up.shape[1] + kind]
        ),
    )


def _await_up(shared: Tiles, slot: int) -> None:
    for kind in range(shared.up.shape[1]):
        plgpu.barrier_wait(shared.up_arrived.at[slot * shared.up.shape[1] + kind])


def _expand_logits(walk: Walk, shared: Tiles, line: Any, slot: int) -> None:
    def expand(kind: Array) -> None:
        def product(accumulator):
            plgpu.wgmma(accumulator, shared.proxy.at[line], shared.up.at[slot, kind])
            shared.terms[kind] = accumulator[...].astype(shared.terms.dtype)

        pl.run_scoped(product, plgpu.ACC((tiles.ROWS, walk.plan.slab), jnp.float32))

    expansion.share_out(walk.plan, walk.warpgroup, LOGITS, expand)


def _make_cotangents(
    walk: Walk, t: Array, given: Given, shared: Tiles, kinds: tuple[int, ...], gy_h: Array | None
) -> Array | None:
    """Puts what `kinds` of terms get, without `merge`, in place of the logits; adds gy h to `gy_h` if it is given."""
    positions, k, tile = walk.lines.positions, walk.k, len(walk.positions())
    width = WIDTH if 0 in kinds else walk.plan.slab
    whole = walk._replace(plan=dataclasses.replace(walk.plan, slab=width))

    def make(m: Array, gy_h: Array | None) -> Array | None:
        part = pl.multiple_of(lax.div(m, tile) * width, width)
        walk = whole._replace(start=whole.start + part)
        position = walk.positions()[0] + lax.rem(m, tile) * positions
        rows = pl.ds(walk.row(position), positions)

        def write(kind: int, tile: Array) -> None:
            shared.terms[kinds.index(kind), rows, pl.ds(part, width)] = tile.astype(shared.terms.dtype)

        if 0 in kinds:
            has_left, has_right = walk.neighbours(position)
            logits = [walk.read(shared.terms, (kind, rows, pl.ds(part, width))) for kind in range(LOGITS)]
            weights, complements = bodies.normalised(logits, has_left, has_right, walk.reciprocal)
        adjoint = walk.read(given.adjoints, walk.index(t, position, k))
        if 0 in kinds:
            before = [
                walk.read(given.states[k], walk.index(lax.max(t - 1, 0), position, halo=halo)) for halo in range(3)
            ]
            gradients = bodies.by_weights(adjoint, before, has_left, has_right)
            for kind, gradient in enumerate(bodies.by_logits(weights, complements, gradients)):
                write(kind, walk.unless_first(t, gradient))
        if LAM in kinds:
            x = walk.read(given.x, walk.index(t, position))
            write(LAM, adjoint * x)
            gy = walk.read(given.cotangent, walk.index(t, position))
            if SKIP in kinds:
                write(SKIP, gy * x)
            product = gy * walk.read(given.states[k], walk.index(t, position, halo=1))
            write(OUT_GATE, product)
            if gy_h is not None:
                gy_h = gy_h + product
        return gy_h

    gy_h = lax.fori_loop(0, tile * (walk.plan.slab // width), make, gy_h)
    plgpu.commit_smem()  # written by threads, read by tensor cores
    return gy_h
