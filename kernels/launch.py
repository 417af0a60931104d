"""Launches of the GPU kernel: their grids, what a block shares, what they give back."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gspn_jax.kernels import bodies, compat, devices, from_proxy, shared_memory, tiles
from gspn_jax.kernels.terms import LAM, Inputs, Job
from gspn_jax.kernels.walk import Shared


def forward(job: Job, plan: tiles.Plan, inputs: Inputs, *, save: bool) -> tuple[Array, tuple[Array, ...]]:
    """(y, states of each direction if `save`)."""
    body = functools.partial(bodies.forward, job=job, plan=plan, save=save)
    batch, height, width, channels = inputs.x.shape
    shape = inputs.x.shape if plan.joint else (batch, height, width, len(job.directions), channels)
    outputs = [jax.ShapeDtypeStruct(shape, inputs.x.dtype)]
    if save:
        outputs += [jax.ShapeDtypeStruct(_state_shape(inputs.x.shape, d), inputs.x.dtype) for d in job.directions]
    y, *states = _scan(body, job, plan, inputs, outputs, states=1)
    return (y if plan.joint else _sum_directions(y)), tuple(states)


def backward(job: Job, plan: tiles.Plan, inputs: Inputs, states: tuple[Array, ...], cotangent: Array) -> Inputs:
    """The cotangents of `inputs`."""
    batch = inputs.x.shape[0]
    body = functools.partial(bodies.backward, job=job, plan=plan)
    outputs = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), inputs._replace(merge=None))
    if plan.rank:
        outputs = _expanded(job, inputs)
    if not plan.joint:
        outputs = outputs._replace(x=_terms(job, inputs))
    if job.shared:
        outputs = outputs._replace(weights=jax.ShapeDtypeStruct((*inputs.weights.shape[:-1], plan.slabs), jnp.float32))
    if inputs.merge is not None:
        positions = plan.sharing * max(plan.rows.positions, plan.columns.positions)
        blocks = (batch, len(job.directions), plan.slabs)
        outputs = outputs._replace(merge=jax.ShapeDtypeStruct((*blocks, positions, plan.slab), jnp.float32))
    arrays = (inputs, (cotangent.astype(inputs.x.dtype), *states))
    by = _scan(body, job, plan, arrays, outputs, states=plan.handed_on)
    if not plan.joint:
        by = by._replace(x=_sum_directions(by.x))
    if job.shared:
        by = by._replace(weights=_sum_slabs(by.weights, inputs.weights))
    if by.merge is not None:
        by = by._replace(merge=_merge_cotangent(by.merge, job, plan))
    return by


def _terms(job: Job, inputs: Inputs) -> jax.ShapeDtypeStruct:
    """[B, H, W, K, C]"""
    batch, height, width, channels = inputs.x.shape
    return jax.ShapeDtypeStruct((batch, height, width, len(job.directions), channels), inputs.x.dtype)


def _expanded(job: Job, inputs: Inputs) -> Inputs:
    """Types of x and of the terms that a proxy is expanded to."""
    (batch, height, width, channels), terms = inputs.x.shape, _terms(job, inputs)
    logits = (batch, height, width, len(job.directions), LAM, channels)
    return Inputs(
        x=jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype),
        weights=jax.ShapeDtypeStruct(logits, inputs.x.dtype),
        lam=terms,
        out_gate=terms,
        skip=terms if job.skip else None,
        merge=None,
    )


def _sum_directions(y: Float[Array, "B H W K C"]) -> Float[Array, "B H W C"]:
    return y[..., 0, :] if y.shape[3] == 1 else y.astype(jnp.float32).sum(3).astype(y.dtype)


def _sum_slabs(by_slab: Float[Array, "B H W K 3 slabs"], weights: Array) -> Float[Array, "B H W K 3 G"]:
    """What the weights of a group get from its slabs."""
    return by_slab.reshape(*weights.shape, -1).sum(-1).astype(weights.dtype)


def _state_shape(shape: tuple[int, ...], direction: str) -> tuple[int, ...]:
    """States are kept with a position beyond each end of a line, never written, so that neighbours can be read."""
    batch, height, width, channels = shape
    rows = direction in ("down", "up")
    return (batch, height, width + 2, channels) if rows else (batch, height + 2, width, channels)


def _merge_cotangent(partial: Float[Array, "B K S P slab"], job: Job, plan: tiles.Plan) -> Float[Array, "K C"]:
    """Sums what the warpgroups left; channels that the last slab shares with the one before it are counted once."""
    by_slab = jnp.stack(
        [
            partial[:, k, :, : plan.sharing * plan.lines(direction).positions].sum((0, 2))
            for k, direction in enumerate(job.directions)
        ]
    )
    whole = by_slab[:, :-1].reshape(len(by_slab), -1)
    return jnp.concatenate([whole, by_slab[:, -1, plan.slabs * plan.slab - plan.channels :]], axis=1)


def _scan(body: Callable, job: Job, plan: tiles.Plan, inputs: Any, outputs: Any, *, states: int) -> Any:
    """Runs a program of `bodies`, whose lines hand on so many states."""
    shared = _shared(job, plan, inputs if isinstance(inputs, Inputs) else inputs[0], states)
    grid = {"image": jax.tree.leaves(inputs)[0].shape[0], "slab": plan.slabs}
    if not plan.joint:
        grid["direction"] = len(job.directions)
    return run(body, grid, plan.warpgroups, inputs, outputs, shared)


def run(
    body: functools.partial,
    grid: dict[str, int],
    warpgroups: int,
    inputs: Any,
    outputs: Any,
    shared: Any = (),
    *,
    name: str = "line_scan",
) -> Any:
    """Runs `body(inputs, outputs, shared)` over the grid, for trees of arrays, of types and of shared memory.

    Profiles show it as `name` and the name of the body.
    """
    flat, structure = jax.tree.flatten(inputs)
    out_type, out_structure = jax.tree.flatten(outputs)
    scratch, scratch_structure = jax.tree.flatten(shared, is_leaf=lambda node: not isinstance(node, tuple))

    def kernel_body(*refs):
        arrays, rest = refs[: len(flat)], refs[len(flat) :]
        body(
            jax.tree.unflatten(structure, arrays),
            jax.tree.unflatten(out_structure, rest[: len(out_type)]),
            jax.tree.unflatten(scratch_structure, rest[len(out_type) :]),
        )

    kernel_body.__name__ = f"{name}_{body.func.__name__}"
    trees = structure, out_structure, scratch_structure
    made_of = (body.func, *sorted(body.keywords.items()), *trees, devices.current())
    found = compat.kernel(
        kernel_body,
        made_of,
        flat,
        out_type=tuple(out_type),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
    )
    return jax.tree.unflatten(out_structure, found)


def _shared(job: Job, plan: tiles.Plan, inputs: Inputs, states: int) -> Shared:
    """The shared memory of a block, for `states` values that a line hands on."""
    total = plan.total if plan.joint else (1, 1, tiles.QUANTUM)
    held = len(job.directions) if plan.joint else 1
    return Shared(
        state=shared_memory.row_major((held, 2, states, plan.state_positions, plan.row)),
        total=shared_memory.row_major(total),
        turn=plgpu.Barrier(num_arrivals=1, num_barriers=4),
        meeting=plgpu.Barrier(num_arrivals=plan.warpgroups),
        factors=from_proxy.scratch(plan, inputs) if plan.keeps_factors else (),
    )
