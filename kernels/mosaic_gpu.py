"""The line scan as one Pallas kernel for NVIDIA GPUs (Mosaic GPU): all directions of a batch in one launch.

docs/kernel.md shows how it walks the image, what is kept where, and the bytes and operations an element costs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels import compat, tiles
from kernels.weights import DIRECTIONS, LOGIT_FLOOR


@dataclasses.dataclass(frozen=True)
class _Job:
    """What to compute, all of it static: scans in `directions`, restarted every `chunk` lines, with these terms."""

    directions: tuple[str, ...]
    chunk: int | None
    logits: bool
    lam: bool
    out_gate: bool
    skip: bool


class _Inputs(NamedTuple):
    """Arrays, or their references in a kernel; None for the terms that a job does not have."""

    x: Any
    """[B, H, W, C]"""
    weights: Any
    """[B, H, W, K, 3, C], logits or ready"""
    lam: Any
    """[B, H, W, K, C]"""
    out_gate: Any
    """[B, H, W, K, C]"""
    skip: Any
    """[B, H, W, K, C]"""
    merge: Any
    """[K, P, C] float32, the same for each of the P positions of a tile"""


COMPUTE_CAPABILITY = 9.0


def missing() -> str | None:
    """Why this machine cannot run the kernel, or None."""
    if compat.interpreting():
        return None
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU, and this machine's device is {device.device_kind!r}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not capability.replace(".", "", 1).isdigit() or float(capability) < COMPUTE_CAPABILITY:
        return (f"needs an NVIDIA GPU of compute capability {COMPUTE_CAPABILITY} or newer, and "
                f"{device.device_kind!r} has {capability}")
    return None


def refuses(x: Float[Array, "B H W C"], directions: int) -> str | None:
    """Why the kernel cannot take `x` in that many directions, or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {x.dtype}"
    if tiles.make_plan(*x.shape[1:], directions=directions, states=2) is None:
        return f"has no room on chip for lines of {max(x.shape[1:3])} positions"
    return None


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
    job = _Job(DIRECTIONS, chunk, logits=True, lam=True, out_gate=True, skip=skip is not None)
    merge = jnp.broadcast_to(merge.astype(jnp.float32).reshape(4, -1), (4, x.shape[-1]))
    return _padded(job, _Inputs(x, gates, lam, out_gate, skip, merge))


def line_scan(
    x: Float[Array, "B H W C"],
    left: Float[Array, "B H W G"],
    center: Float[Array, "B H W G"],
    right: Float[Array, "B H W G"],
    direction: str,
    chunk: int | None,
) -> Float[Array, "B H W C"]:
    """See `kernels.line_scan`; arguments are checked there."""
    job = _Job((direction,), chunk, logits=False, lam=False, out_gate=False, skip=False)
    weights = jnp.stack([left, center, right], axis=3)[:, :, :, None]
    return _padded(job, _Inputs(x, weights, None, None, None, None))


def _padded(job: _Job, inputs: _Inputs) -> Float[Array, "B H W C"]:
    """Spreads grouped weights over their channels and fills the map up to whole tiles; neither happens to our presets
    in maps of 16, 32 or 64."""
    _, height, width, channels = inputs.x.shape
    plan = _plan(job, height, width, channels)
    groups = inputs.weights.shape[-1]
    if groups != channels:
        inputs = inputs._replace(weights=jnp.repeat(inputs.weights, channels // groups, axis=-1))
    more = (0, plan.height - height), (0, plan.width - width)
    wider = (0, plan.channels - channels)

    def fill(array: Array | None) -> Array | None:
        if array is None:
            return None
        return jnp.pad(array, ((0, 0), *more, *((0, 0),) * (array.ndim - 4), wider))

    merge = None if inputs.merge is None else jnp.pad(inputs.merge, ((0, 0), wider))
    filled = _Inputs(*map(fill, inputs[:-1]), merge)
    return _run(job, (height, width), filled)[:, :height, :width, :channels]


def _plan(job: _Job, height: int, width: int, channels: int) -> tiles.Plan:
    """One plan for both passes: the backward one hands on two values a position."""
    return tiles.make_plan(height, width, channels, directions=len(job.directions), states=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(job: _Job, size: tuple[int, int], inputs: _Inputs) -> Float[Array, "B H W C"]:
    return _forward(job, size, inputs, save=False)[0]


def _run_forward(job, size, inputs):
    y, states = _forward(job, size, inputs, save=True)
    return y, (inputs, states)


def _run_backward(job, size, saved, cotangent):
    inputs, states = saved
    return (_backward(job, size, inputs, states, cotangent),)


_run.defvjp(_run_forward, _run_backward)


def _forward(job: _Job, size: tuple[int, int], inputs: _Inputs, *, save: bool) -> tuple[Array, tuple[Array, ...]]:
    """(y, states of each direction if `save`)."""
    batch, _, _, channels = inputs.x.shape
    plan = _plan(job, *size, channels)
    body = functools.partial(_forward_body, job=job, plan=plan, save=save)
    shape = inputs.x.shape if plan.joint else _with_directions(inputs.x.shape, job)
    outputs = [jax.ShapeDtypeStruct(shape, inputs.x.dtype)]
    if save:
        outputs += [jax.ShapeDtypeStruct(_state_shape(inputs.x.shape, d), inputs.x.dtype) for d in job.directions]
    y, *states = _launch(body, job, plan, _tiled_merge(inputs, plan), batch, outputs, states=1)
    return (y if plan.joint else _sum_directions(y)), tuple(states)


def _backward(
    job: _Job, size: tuple[int, int], inputs: _Inputs, states: tuple[Array, ...], cotangent: Array
) -> _Inputs:
    """The cotangents of `inputs`."""
    batch, _, _, channels = inputs.x.shape
    plan = _plan(job, *size, channels)
    body = functools.partial(_backward_body, job=job, plan=plan)
    by_merge = None
    if inputs.merge is not None:
        positions = _writers(plan) * max(plan.rows.positions, plan.columns.positions)
        by_merge = jax.ShapeDtypeStruct((batch, len(job.directions), plan.slabs, positions, plan.slab), jnp.float32)
    shape = inputs.x.shape if plan.joint else _with_directions(inputs.x.shape, job)
    outputs = _Inputs(*(None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs))
    outputs = outputs._replace(x=jax.ShapeDtypeStruct(shape, inputs.x.dtype), merge=by_merge)
    flat, structure = jax.tree.flatten(outputs)
    more = (cotangent.astype(inputs.x.dtype), *states)
    found = _launch(body, job, plan, (_tiled_merge(inputs, plan), more), batch, flat, states=2)
    by = jax.tree.unflatten(structure, found)
    if not plan.joint:
        by = by._replace(x=_sum_directions(by.x))
    if by_merge is not None:
        by = by._replace(merge=_merge_cotangent(by.merge, job, plan))
    return by


def _with_directions(shape: tuple[int, ...], job: _Job) -> tuple[int, ...]:
    return (*shape[:3], len(job.directions), shape[3])


def _sum_directions(y: Float[Array, "B H W K C"]) -> Float[Array, "B H W C"]:
    return y[..., 0, :] if y.shape[3] == 1 else y.astype(jnp.float32).sum(3).astype(y.dtype)


def _state_shape(shape: tuple[int, ...], direction: str) -> tuple[int, ...]:
    """States are kept with a position beyond each end of a line, never written, so that neighbours can be read."""
    batch, height, width, channels = shape
    rows = direction in ("down", "up")
    return (batch, height, width + 2, channels) if rows else (batch, height + 2, width, channels)


def _tiled_merge(inputs: _Inputs, plan: tiles.Plan) -> _Inputs:
    if inputs.merge is None:
        return inputs
    directions, channels = inputs.merge.shape
    positions = max(plan.rows.positions, plan.columns.positions)
    return inputs._replace(merge=jnp.broadcast_to(inputs.merge[:, None], (directions, positions, channels)))


def _writers(plan: tiles.Plan) -> int:
    """Warpgroups that work on one direction of a block."""
    return 1 if plan.joint else plan.warpgroups


def _merge_cotangent(partial: Float[Array, "B K S P slab"], job: _Job, plan: tiles.Plan) -> Float[Array, "K C"]:
    """Sums what the warpgroups left; channels that the last slab shares with the one before it are counted once."""
    by_slab = jnp.stack([partial[:, k, :, :_writers(plan) * plan.lines(direction).positions].sum((0, 2))
                         for k, direction in enumerate(job.directions)])
    whole = by_slab[:, :-1].reshape(len(job.directions), -1)
    last = by_slab[:, -1, plan.slabs * plan.slab - plan.channels:]
    return jnp.concatenate([whole, last], axis=-1)


def _launch(
    body: Callable, job: _Job, plan: tiles.Plan, inputs: Any, batch: int, outputs: Sequence, *, states: int
) -> tuple[Array, ...]:
    """Runs `body(inputs, outputs, state, total, turn, meeting)` over the grid; `inputs` is a tree of arrays."""
    directions = len(job.directions)
    flat, structure = jax.tree.flatten(inputs)

    def kernel_body(*refs):
        arrays, rest = refs[: len(flat)], refs[len(flat) :]
        body(jax.tree.unflatten(structure, arrays), rest[: len(outputs)], *rest[len(outputs) :])

    held = directions if plan.joint else 1
    total = (plan.height, plan.width, plan.slab) if plan.joint else (1, 1, tiles.QUANTUM)
    kernel_body.__name__ = f"gspn_{body.func.__name__.strip('_')}"
    return compat.kernel(
        kernel_body,
        out_type=tuple(outputs),
        grid=(batch, plan.slabs) if plan.joint else (batch, plan.slabs, directions),
        grid_names=("image", "slab") if plan.joint else ("image", "slab", "direction"),
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((held, 2, states, plan.state_positions, plan.slab), jnp.float32),
            plgpu.SMEM(total, jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=4),
            plgpu.Barrier(num_arrivals=plan.warpgroups),
        ],
    )(*flat)


class _Walk(NamedTuple):
    """One direction of one image and slab of channels, as one warpgroup sees it."""

    k: int
    direction: str
    job: _Job
    plan: tiles.Plan
    image: Array
    start: Array
    """The slab's first channel."""
    warpgroup: Array

    @property
    def lines(self) -> tiles.Lines:
        return self.plan.lines(self.direction)

    def positions(self) -> list[Any]:
        """First positions of the tiles of a line that this warpgroup takes."""
        share = self.lines.tiles if self.plan.joint else self.lines.tiles // self.plan.warpgroups
        first = 0 if self.plan.joint else self.warpgroup * share
        return [(first + n) * self.lines.positions for n in range(share)]

    def unless_first(self, t: Array, tile: Array) -> Array:
        """The tile, or zeros on a line that has no line before it."""
        chunk = self.job.chunk
        first = t == 0 if chunk is None or chunk >= self.lines.count else t % chunk == 0
        return jnp.where(jnp.broadcast_to(first, tile.shape), 0.0, tile)

    def pixels(self, t: Array, position: Any, halo: int = 0) -> tuple[Any, Any]:
        """(row, column) index of a tile on the t-th line; `halo` positions are kept before the first."""
        line = t if self.direction in ("down", "right") else self.lines.count - 1 - t
        along = pl.ds(position + halo, self.lines.positions)
        return (line, along) if self.direction in ("down", "up") else (along, line)

    def index(self, t: Array, position: Any, *middle: int, halo: int = 0) -> tuple:
        """Index of a tile in an array [B, H, W, ..., C]."""
        return (self.image, *self.pixels(t, position, halo), *middle, pl.ds(self.start, self.plan.slab))

    def read(self, ref: Any, index: tuple) -> Float[Array, "P slab"]:
        """A tile in float32."""
        return compat.load(ref, index, tiles.layout(self.plan.slab)).astype(jnp.float32)

    def state(self, parity: Array | int, kind: int, position: Any, offset: int) -> tuple:
        """Index in the state of the tile at `position`, or of its left (offset 0) or right (2) neighbours."""
        at = pl.ds(position + offset, self.lines.positions)
        return (self.k if self.plan.joint else 0, parity, kind, at, slice(None))

    def neighbours(self, position: Any) -> tuple[Array, Array]:
        """Whether each element of a tile has a left and a right neighbour in the map."""
        at = compat.iota((self.lines.positions, self.plan.slab), 0, tiles.layout(self.plan.slab)) + position
        return at > 0, at < self.lines.length - 1


def _walk(job: _Job, plan: tiles.Plan, visit: Callable[[_Walk], None]) -> None:
    """Calls `visit` with the walk that is this warpgroup's."""
    image, slab = lax.axis_index("image"), lax.axis_index("slab")
    warpgroup = lax.axis_index("warpgroup") if plan.warpgroups > 1 else jnp.int32(0)
    mine = warpgroup if plan.joint else lax.axis_index("direction")
    # the last slab overlaps the one before it where the slab does not divide the channels
    start = pl.multiple_of(lax.min(slab * plan.slab, plan.channels - plan.slab), tiles.VECTOR)
    for k, direction in enumerate(job.directions):
        walk = _Walk(k, direction, job, plan, image, start, warpgroup)
        if len(job.directions) == 1:
            visit(walk)
        else:
            pl.when(mine == k)(functools.partial(visit, walk))


class _Shared(NamedTuple):
    """What the warpgroups of a block share."""

    state: Any
    """[direction, parity, kind, position + 1, channel]: values that a line hands to the next one."""
    total: Any
    """[H, W, channel]: where the directions meet, if the plan is joint."""
    turn: Any
    """One barrier for each direction: its turn to add to `total`."""
    meeting: Any
    """All warpgroups are here."""


def _meet(plan: tiles.Plan, shared: _Shared) -> None:
    if plan.warpgroups > 1:
        plgpu.barrier_arrive(shared.meeting)
        plgpu.barrier_wait(shared.meeting)


def _clear(walk: _Walk, shared: _Shared, kinds: int) -> None:
    """Zeroes the state before the first line, the position beyond each end included, and the total."""
    plan = walk.plan
    zeros = compat.zeros((walk.lines.positions, plan.slab), tiles.layout(plan.slab))

    def clear_state():
        @pl.loop(0, walk.lines.tiles)
        def _(n):
            for parity, kind, offset in itertools.product((0, 1), range(kinds), (0, 2)):
                shared.state[walk.state(parity, kind, n * walk.lines.positions, offset)] = zeros

    if not plan.joint:
        pl.when(walk.warpgroup == 0)(clear_state)
        _meet(plan, shared)
        return
    clear_state()
    if walk.k == 0:  # the first to add

        @pl.loop(0, plan.height)
        def _(row):
            for position in range(0, plan.width, walk.lines.positions):
                shared.total[row, pl.ds(position, walk.lines.positions), :] = zeros

    if walk.k == len(walk.job.directions) - 1:
        plgpu.barrier_arrive(shared.turn.at[0])


def _take_turn(walk: _Walk, shared: _Shared, t: Array, results: Sequence[tuple[Any, Array]]) -> None:
    """Adds what this direction has for line t, as (position, tile), to the total.

    The directions do so in turns, always in the same order, so that the sum is the same every time.
    """
    plgpu.barrier_wait(shared.turn.at[walk.k])
    for position, tile in results:
        index = (*walk.pixels(t, position), slice(None))
        shared.total[index] = walk.read(shared.total, index) + tile
    plgpu.barrier_arrive(shared.turn.at[(walk.k + 1) % len(walk.job.directions)])


def _finish(walk: _Walk, shared: _Shared, output: Any) -> None:
    """Stores the total, each warpgroup some rows, once all directions have had their last turn."""
    plan, directions = walk.plan, len(walk.job.directions)
    if not plan.joint:
        return

    @pl.loop(walk.lines.count, max(plan.rows.count, plan.columns.count))
    def _(_):  # a direction with fewer lines lets the others pass
        plgpu.barrier_wait(shared.turn.at[walk.k])
        plgpu.barrier_arrive(shared.turn.at[(walk.k + 1) % directions])

    if walk.k == 0:
        plgpu.barrier_wait(shared.turn.at[0])
    _meet(plan, shared)
    positions = plan.rows.positions

    @pl.loop(0, pl.cdiv(plan.height - walk.k, directions))
    def _(n):
        row = n * directions + walk.k
        for position in range(0, plan.width, positions):
            along = pl.ds(position, positions)
            tile = walk.read(shared.total, (row, along, slice(None)))
            compat.store(output, (walk.image, row, along, pl.ds(walk.start, plan.slab)), tile)


def _odds(logits: Array) -> Array:
    """exp(-logit), for sigmoid = 1 / (1 + odds)."""
    return jnp.exp(-jnp.maximum(logits, LOGIT_FLOOR))


def _forward_body(inputs: _Inputs, outputs, state, total, turn, meeting, *, job: _Job, plan: tiles.Plan, save: bool):
    shared = _Shared(state, total, turn, meeting)

    def fetch(walk: _Walk, t: Array, position: Any) -> tuple[Array, ...]:
        """The tiles of an input line, as they are in memory."""
        read = functools.partial(compat.load, layout=tiles.layout(plan.slab))
        per_direction = walk.index(t, position, walk.k)
        fetched = [read(inputs.x, walk.index(t, position))]
        fetched += [read(inputs.weights, walk.index(t, position, walk.k, j)) for j in range(3)]
        fetched += [read(ref, per_direction) for ref in (inputs.lam, inputs.out_gate, inputs.skip) if ref is not None]
        return tuple(fetched)

    def visit(walk: _Walk) -> None:
        lines = walk.lines
        _clear(walk, shared, 1)

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
            _take_turn(walk, shared, t, results) if plan.joint else _meet(plan, shared)
            return following

        lax.fori_loop(0, lines.count, step, tuple(fetch(walk, 0, p) for p in walk.positions()))
        _finish(walk, shared, outputs[0])

    _walk(job, plan, visit)


def _read_merge(walk: _Walk, merge: Any) -> Array:
    return walk.read(merge, (walk.k, pl.ds(0, walk.lines.positions), pl.ds(walk.start, walk.plan.slab)))


def _backward_body(inputs, outputs, state, total, turn, meeting, *, job: _Job, plan: tiles.Plan):
    """The adjoint scan: from the last line to the first.

    With u = merge out_gate: adjoint[t] = u gy[t] + what line t + 1 hands back, center adjoint at the same position,
    left adjoint at the position to the right and right adjoint at the position to the left.
    """
    shared = _Shared(state, total, turn, meeting)
    inputs, (cotangent, *saved) = inputs
    by = jax.tree.unflatten(jax.tree.structure(inputs), outputs)

    def visit(walk: _Walk) -> None:
        lines, k = walk.lines, walk.k
        _clear(walk, shared, 2)
        zeros = compat.zeros((lines.positions, plan.slab), tiles.layout(plan.slab))

        def step(n, carry):
            t, parity = lines.count - 1 - n, n % 2
            (by_merge, carried), following, results = carry, [], []
            for position, from_center in zip(walk.positions(), carried, strict=True):
                here = walk.index(t, position, k)
                x = walk.read(inputs.x, walk.index(t, position))
                gy = walk.read(cotangent, walk.index(t, position))

                # the adjoint of h, and what the pixel's own terms get; few values are alive at a time
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
                following.append(walk.unless_first(t, center * adjoint))
            _take_turn(walk, shared, t, results) if plan.joint else _meet(plan, shared)
            return by_merge, tuple(following)

        by_merge, _ = lax.fori_loop(0, lines.count, step, (zeros, (zeros,) * len(walk.positions())))
        if job.out_gate:
            writer = 0 if plan.joint else walk.warpgroup
            mine = pl.ds(writer * lines.positions, lines.positions)
            compat.store(by.merge, (walk.image, k, lax.axis_index("slab"), mine, slice(None)), by_merge)
        _finish(walk, shared, by.x)

    _walk(job, plan, visit)
