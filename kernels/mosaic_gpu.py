"""The line scan as one Pallas kernel for NVIDIA GPUs (Mosaic GPU): all directions of a batch in one launch.

docs/kernel.md shows how it walks the image, what is kept where, and the bytes and operations an element costs.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gspn_jax.kernels import compat, devices, from_proxy, launch, local, low_rank, reference, tiles
from gspn_jax.kernels.derivatives import differentiable
from gspn_jax.kernels.terms import Inputs, Job
from gspn_jax.kernels.weights import DIRECTIONS

missing = devices.missing


def caveat() -> str | None:
    """Reason why this JAX cannot make all of the kernel, with what runs instead, or None."""
    if compat.multiplies_registers():
        return None
    but = "" if devices.current().local.missing else f", but for chunk={local.CHUNK}"
    return f"{_too_old()}: XLA expands them for propagate_low_rank{but}"


def _too_old() -> str:
    return f"needs JAX 0.11.2 or newer to expand proxies, and this is {jax.__version__}"


def refuses(x: Float[Array, "B H W C"], directions: int) -> str | None:
    """Why the kernel cannot take `x` in that many directions, or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {x.dtype}"
    if tiles.make_plan(*x.shape[1:], directions=directions, device=devices.current()) is None:
        return f"has no room on chip for lines of {max(x.shape[1:3])} positions"
    return None


def refuses_low_rank(
    x: Float[Array, "B H W C"], proxy: Float[Array, "B H W d"], kinds: int, chunk: int | None
) -> str | None:
    """Why the kernel cannot expand `proxy` to so many kinds of terms by itself, or None."""
    if chunk == local.CHUNK and local.refuses(x, proxy, kinds) is None:
        return None
    if x.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {x.dtype}"
    if not compat.multiplies_registers():
        return _too_old()
    if _expanding_plan(x, proxy, kinds) is None:
        return f"has no room on chip for a proxy of {proxy.shape[-1]} and lines of {max(x.shape[1:3])} positions"
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
    """See `gspn_jax.kernels.propagate`; arguments are checked there."""
    job = Job(directions=DIRECTIONS, chunk=chunk, logits=True, lam=True, out_gate=True, skip=skip is not None)
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
    """See `gspn_jax.kernels.line_scan`; arguments are checked there."""
    job = Job(directions=(direction,), chunk=chunk, logits=False, lam=False, out_gate=False, skip=False)
    weights = jnp.stack([left, center, right], axis=3)[:, :, :, None]
    return _padded(job, Inputs(x, weights, None, None, None, None))


def _padded(job: Job, inputs: Inputs) -> Float[Array, "B H W C"]:
    """Fills a map up that is shorter than a tile, and spreads weights over their channels if the channels of a block
    would have several groups; neither happens to our presets."""
    _, height, width, channels = inputs.x.shape
    groups = inputs.weights.shape[-1]
    plan, job = _plan(job, height, width, channels, groups)
    if groups != channels and not job.shared:
        # in float32, so that their gradients are summed in it
        spread = jnp.repeat(inputs.weights.astype(jnp.float32), channels // groups, axis=-1)
        inputs = inputs._replace(weights=spread.astype(inputs.weights.dtype))
    wider = plan.channels - channels

    def fill(array: Array | None) -> Array | None:
        if array is None:
            return None
        return _filled(plan, array, wider if array.shape[-1] == channels else 0)

    merge = None if inputs.merge is None else jnp.pad(inputs.merge, ((0, 0), (0, wider)))
    filled = Inputs(*map(fill, inputs[:5]), merge)
    return _run(job, plan, filled)[:, :height, :width, :channels]


def _filled(plan: tiles.Plan, array: Float[Array, "B H W ..."], more: int = 0) -> Float[Array, "B P Q ..."]:
    """Zeros in what the plan has and the map has not, and in so many more of the last axis."""
    axes = [(0, 0)] * array.ndim
    axes[1:3] = (0, plan.height - array.shape[1]), (0, plan.width - array.shape[2])
    axes[-1] = 0, more
    return jnp.pad(array, axes)


def _plan(job: Job, height: int, width: int, channels: int, groups: int) -> tuple[tiles.Plan, Job]:
    """The plan, and the job with whether its blocks read weights that their channels share: where the narrower slabs
    that this may take do not fill the map up more."""
    make_plan = functools.partial(
        tiles.make_plan, height, width, channels, directions=len(job.directions), device=devices.current()
    )
    plan, sharing = make_plan(), None
    if groups < channels:
        sharing = make_plan(group=channels // groups)
    if sharing and sharing.height * sharing.width <= plan.height * plan.width:
        return sharing, dataclasses.replace(job, shared=True)
    return plan, job


def _run(job: Job, plan: tiles.Plan, inputs: Inputs) -> Float[Array, "B H W C"]:
    def forward(inputs: Inputs, *, save: bool) -> tuple[Array, tuple[Array, ...]]:
        return launch.forward(job, plan, inputs, save=save)

    def pull_back(inputs: Inputs, states: tuple[Array, ...], cotangent: Array) -> Inputs:
        return launch.backward(job, plan, inputs, states, cotangent)

    return _differentiable(forward, functools.partial(_plain, job, plan), pull_back)(inputs)


def _differentiable(forward: Callable, plain: Callable, pull_back: Callable) -> Callable:
    """`differentiable` of forward(arrays, save=...), which gives (y, states)."""
    return differentiable(
        lambda arrays: forward(arrays, save=False)[0],
        plain=plain,
        pull_back=pull_back,
        save=functools.partial(forward, save=True),
    )


def _plain(job: Job, plan: tiles.Plan, inputs: Inputs) -> Float[Array, "B H W C"]:
    """The same by `reference`: of the map itself, beyond which what fills it up is zero."""
    height, width = plan.rows.count, plan.columns.count
    x, weights, lam, out_gate, skip = (None if a is None else a[:, :height, :width] for a in inputs[:5])
    if job.logits:
        y = reference.propagate(x, weights, lam, out_gate, inputs.merge, skip, job.chunk)
    else:
        y = reference.line_scan(x, *(weights[:, :, :, 0, n] for n in range(3)), *job.directions, job.chunk)
    return jnp.pad(y, ((0, 0), (0, plan.height - height), (0, plan.width - width), (0, 0)))


def propagate_low_rank(
    x: Float[Array, "B H W C"],
    proxy: Float[Array, "B H W d"],
    gates: Float[Array, "d 4 3 G"],
    lam: Float[Array, "d 4 C"],
    out_gate: Float[Array, "d 4 C"],
    merge: Float[Array, "4"] | Float[Array, "4 C"],
    skip: Float[Array, "d 4 C"] | None,
    chunk: int | None,
) -> Float[Array, "B H W C"]:
    """See `gspn_jax.kernels.propagate_low_rank`; arguments are checked there."""
    channels = x.shape[-1]
    job = Job(directions=DIRECTIONS, chunk=chunk, logits=True, lam=True, out_gate=True, skip=skip is not None)
    merge = jnp.broadcast_to(merge.astype(jnp.float32).reshape(4, -1), (4, channels))
    gates = jnp.repeat(gates.astype(jnp.float32), channels // gates.shape[-1], axis=-1)
    others = [a[:, :, None].astype(jnp.float32) for a in (lam, out_gate, skip) if a is not None]
    # in float32, so that gradients of weights that channels share are summed in it
    up = jnp.concatenate([gates, *others], axis=2).transpose(1, 2, 3, 0)
    if chunk == local.CHUNK and local.refuses(x, proxy, up.shape[1]) is None:
        return local.propagate(job, x, proxy, up, merge)
    return _run_low_rank(job, _expanding_plan(x, proxy, up.shape[1]), x, proxy, up, merge)


def _expanding_plan(x: Float[Array, "B H W C"], proxy: Float[Array, "B H W d"], kinds: int) -> tiles.Plan | None:
    """The plan of a kernel that expands the proxy, if need be forward alone, or None where it has no room on chip."""
    make_plan = functools.partial(
        tiles.make_plan,
        *x.shape[1:],
        directions=len(DIRECTIONS),
        device=devices.current(),
        rank=from_proxy.filled_up(proxy.shape[-1]),
        kinds=kinds,
    )
    return make_plan() or make_plan(backward=False)


def _run_low_rank(
    job: Job,
    plan: tiles.Plan,
    x: Float[Array, "B H W C"],
    proxy: Float[Array, "B H W d"],
    up: Float[Array, "4 N C d"],
    merge: Float[Array, "4 C"],
) -> Float[Array, "B H W C"]:
    _, height, width, channels = x.shape
    if job.chunk is None:  # of what fills the map up nothing reaches it, there or back
        plan = plan.walked_whole()

    fill, wider = functools.partial(_filled, plan), plan.channels - channels

    def cut(array: Array) -> Array:
        return array[:, :height, :width, ..., :channels]

    def inputs(x: Array, proxy: Array, up: Array, merge: Array) -> Inputs:
        deeper = plan.rank - proxy.shape[-1]
        up = jnp.pad(up, ((0, 0), (0, 0), (0, wider), (0, deeper)))
        return Inputs(
            fill(x, wider),
            *(None,) * 4,
            merge=jnp.pad(merge, ((0, 0), (0, wider))),
            proxy=fill(proxy.astype(x.dtype), deeper),
            up=low_rank.by_slab(up, from_proxy.channels(plan.slab), x.dtype),
        )

    def forward(arrays: tuple[Array, ...], *, save: bool) -> tuple[Array, tuple[Array, ...]]:
        y, states = launch.forward(job, plan, inputs(*arrays), save=save)
        return cut(y), states

    def pull_back(arrays: tuple[Array, ...], states: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
        _, proxy, up, _ = arrays
        by = launch.backward(job, plan, inputs(*arrays), states, fill(cotangent.astype(x.dtype), wider))
        terms = by.weights, by.lam, by.out_gate, by.skip
        if job.chunk is not None:  # lines that nobody walked have no values
            terms = jax.tree.map(lambda array: fill(cut(array)), terms)
        terms = jax.tree.map(lambda array: array[..., :channels], terms)
        _, pull = jax.vjp(lambda proxy, up: low_rank.expand_all(job, fill(proxy.astype(x.dtype)), up), proxy, up)
        return cut(by.x), *pull(terms), by.merge[:, :channels]

    plain, arrays = functools.partial(low_rank.plain, job), (x, proxy, up, merge)
    if plan.backward:
        return _differentiable(forward, plain, pull_back)(arrays)
    by_xla = functools.partial(_pull_back_expanded, job)
    return differentiable(lambda arrays: forward(arrays, save=False)[0], plain=plain, pull_back=by_xla)(arrays)


def _pull_back_expanded(job: Job, arrays: tuple[Array, ...], _: tuple, cotangent: Array) -> tuple[Array, ...]:
    """The backward pass where the kernel that expands the proxy has no room for it: XLA expands it, and the plain
    kernel scans there and back."""

    def run(x: Array, proxy: Array, up: Array, merge: Array) -> Array:
        return _padded(job, Inputs(x, *low_rank.expand_all(job, proxy.astype(x.dtype), up), merge))

    return jax.vjp(run, *arrays)[1](cotangent)
