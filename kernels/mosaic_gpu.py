"""The line scan as one Pallas kernel for NVIDIA GPUs (Mosaic GPU): all directions of a batch in one launch.

docs/kernel.md shows how it walks the image, what is kept where, and the bytes and operations an element costs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels import bodies, compat, tiles
from kernels.walk import Inputs, Job
from kernels.weights import DIRECTIONS

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
    if tiles.make_plan(*x.shape[1:], directions=directions) is None:
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
    job = Job(DIRECTIONS, chunk, logits=True, lam=True, out_gate=True, skip=skip is not None)
    merge = jnp.broadcast_to(merge.astype(jnp.float32).reshape(4, -1), (4, x.shape[-1]))
    return _padded(job, Inputs(x, gates, lam, out_gate, skip, merge))


def line_scan(
    x: Float[Array, "B H W C"],
    left: Float[Array, "B H W G"],
    center: Float[Array, "B H W G"],
    right: Float[Array, "B H W G"],
    direction: str,
    chunk: int | None,
) -> Float[Array, "B H W C"]:
    """See `kernels.line_scan`; arguments are checked there."""
    job = Job((direction,), chunk, logits=False, lam=False, out_gate=False, skip=False)
    weights = jnp.stack([left, center, right], axis=3)[:, :, :, None]
    return _padded(job, Inputs(x, weights, None, None, None, None))


def _padded(job: Job, inputs: Inputs) -> Float[Array, "B H W C"]:
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
    filled = Inputs(*map(fill, inputs[:-1]), merge)
    return _run(job, (height, width), filled)[:, :height, :width, :channels]


def _plan(job: Job, height: int, width: int, channels: int) -> tiles.Plan:
    """One plan for both passes."""
    return tiles.make_plan(height, width, channels, directions=len(job.directions))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(job: Job, size: tuple[int, int], inputs: Inputs) -> Float[Array, "B H W C"]:
    return _forward(job, size, inputs, save=False)[0]


def _run_forward(job, size, inputs):
    y, states = _forward(job, size, inputs, save=True)
    return y, (inputs, states)


def _run_backward(job, size, saved, cotangent):
    inputs, states = saved
    return (_backward(job, size, inputs, states, cotangent),)


_run.defvjp(_run_forward, _run_backward)


def _forward(job: Job, size: tuple[int, int], inputs: Inputs, *, save: bool) -> tuple[Array, tuple[Array, ...]]:
    """(y, states of each direction if `save`)."""
    batch, _, _, channels = inputs.x.shape
    plan = _plan(job, *size, channels)
    body = functools.partial(bodies.forward, job=job, plan=plan, save=save)
    shape = inputs.x.shape if plan.joint else _with_directions(inputs.x.shape, job)
    outputs = [jax.ShapeDtypeStruct(shape, inputs.x.dtype)]
    if save:
        outputs += [jax.ShapeDtypeStruct(_state_shape(inputs.x.shape, d), inputs.x.dtype) for d in job.directions]
    y, *states = _launch(body, job, plan, _tiled_merge(inputs, plan), batch, outputs, states=1)
    return (y if plan.joint else _sum_directions(y)), tuple(states)


def _backward(
    job: Job, size: tuple[int, int], inputs: Inputs, states: tuple[Array, ...], cotangent: Array
) -> Inputs:
    """The cotangents of `inputs`."""
    batch, _, _, channels = inputs.x.shape
    plan = _plan(job, *size, channels)
    body = functools.partial(bodies.backward, job=job, plan=plan)
    by_merge = None
    if inputs.merge is not None:
        positions = _writers(plan) * max(plan.rows.positions, plan.columns.positions)
        by_merge = jax.ShapeDtypeStruct((batch, len(job.directions), plan.slabs, positions, plan.slab), jnp.float32)
    shape = inputs.x.shape if plan.joint else _with_directions(inputs.x.shape, job)
    outputs = Inputs(*(None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs))
    outputs = outputs._replace(x=jax.ShapeDtypeStruct(shape, inputs.x.dtype), merge=by_merge)
    flat, structure = jax.tree.flatten(outputs)
    arrays = (_tiled_merge(inputs, plan), (cotangent.astype(inputs.x.dtype), *states))
    found = _launch(body, job, plan, arrays, batch, flat, states=tiles.HANDED_ON[plan.joint])
    by = jax.tree.unflatten(structure, found)
    if not plan.joint:
        by = by._replace(x=_sum_directions(by.x))
    if by_merge is not None:
        by = by._replace(merge=_merge_cotangent(by.merge, job, plan))
    return by


def _with_directions(shape: tuple[int, ...], job: Job) -> tuple[int, ...]:
    return (*shape[:3], len(job.directions), shape[3])


def _sum_directions(y: Float[Array, "B H W K C"]) -> Float[Array, "B H W C"]:
    return y[..., 0, :] if y.shape[3] == 1 else y.astype(jnp.float32).sum(3).astype(y.dtype)


def _state_shape(shape: tuple[int, ...], direction: str) -> tuple[int, ...]:
    """States are kept with a position beyond each end of a line, never written, so that neighbours can be read."""
    batch, height, width, channels = shape
    rows = direction in ("down", "up")
    return (batch, height, width + 2, channels) if rows else (batch, height + 2, width, channels)


def _tiled_merge(inputs: Inputs, plan: tiles.Plan) -> Inputs:
    if inputs.merge is None:
        return inputs
    directions, channels = inputs.merge.shape
    positions = max(plan.rows.positions, plan.columns.positions)
    return inputs._replace(merge=jnp.broadcast_to(inputs.merge[:, None], (directions, positions, channels)))


def _writers(plan: tiles.Plan) -> int:
    """Warpgroups that work on one direction of a block."""
    return 1 if plan.joint else plan.warpgroups


def _merge_cotangent(partial: Float[Array, "B K S P slab"], job: Job, plan: tiles.Plan) -> Float[Array, "K C"]:
    """Sums what the warpgroups left; channels that the last slab shares with the one before it are counted once."""
    by_slab = jnp.stack([partial[:, k, :, :_writers(plan) * plan.lines(direction).positions].sum((0, 2))
                         for k, direction in enumerate(job.directions)])
    whole = by_slab[:, :-1].reshape(len(job.directions), -1)
    last = by_slab[:, -1, plan.slabs * plan.slab - plan.channels:]
    return jnp.concatenate([whole, last], axis=-1)


def _launch(
    body: Callable, job: Job, plan: tiles.Plan, inputs: Any, batch: int, outputs: Sequence, *, states: int
) -> tuple[Array, ...]:
    """Runs `body(inputs, outputs, state, total, turn, meeting)` over the grid; `inputs` is a tree of arrays."""
    directions = len(job.directions)
    flat, structure = jax.tree.flatten(inputs)

    def kernel_body(*refs):
        arrays, rest = refs[: len(flat)], refs[len(flat) :]
        body(jax.tree.unflatten(structure, arrays), rest[: len(outputs)], *rest[len(outputs) :])

    held = directions if plan.joint else 1
    total = (plan.height, plan.width, plan.slab) if plan.joint else (1, 1, tiles.QUANTUM)
    kernel_body.__name__ = f"line_scan_{body.func.__name__}"
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
