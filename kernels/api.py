"""The public line scan: checks the arguments and hands them to a backend."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gspn_jax.kernels import low_rank, reference, scan
from gspn_jax.kernels.sharding import Shards, over_shards, split_by
from gspn_jax.kernels.weights import DIRECTIONS, check_direction

logger = logging.getLogger(__name__)


class _Backend(NamedTuple):
    """The two operators, taking checked arguments by position, and what they can do."""

    line_scan: Callable
    propagate: Callable
    missing: Callable[[], str | None] = lambda: None
    """Why this machine cannot run it, in words, or None."""
    refuses: Callable[[Array, int], str | None] = lambda x, directions: None
    """Why it cannot take x [B, H, W, C] in that many directions, in words, or None."""
    propagate_low_rank: Callable | None = None
    """None if XLA is to expand the proxy."""
    refuses_low_rank: Callable[[Array, Array, int, int | None], str | None] | None = None
    """Why it cannot take x [B, H, W, C], a proxy [B, H, W, d], this many kinds and a chunk, in words, or None."""
    expand: Callable = low_rank.expand
    """By XLA, what the backend does not expand by itself."""
    caveat: Callable[[], str | None] = lambda: None
    """What of it this machine cannot run, and what runs instead, in words, or None."""


def _mosaic_gpu() -> _Backend:
    """The GPU kernel; it is written in an experimental part of JAX, and a version that moves a name there costs no more
    than this backend."""
    try:
        from gspn_jax.kernels import mosaic_gpu
    except (ImportError, AttributeError) as error:
        reason = f"cannot be had from this JAX ({jax.__version__}: {error})"
        return _Backend(line_scan=scan.line_scan, propagate=scan.propagate, missing=lambda: reason)  # never called
    return _Backend(
        line_scan=over_shards(mosaic_gpu.line_scan, "bc bc bc bc"),
        propagate=over_shards(mosaic_gpu.propagate, "bc bc bc bc -c bc"),
        missing=mosaic_gpu.missing,
        refuses=mosaic_gpu.refuses,
        propagate_low_rank=over_shards(mosaic_gpu.propagate_low_rank, "bc b- -c -c -c -c -c"),
        refuses_low_rank=mosaic_gpu.refuses_low_rank,
        expand=low_rank.expand_at_once,
        caveat=mosaic_gpu.caveat,
    )


_BACKENDS = {
    "mosaic_gpu": _mosaic_gpu(),
    "scan": _Backend(line_scan=scan.line_scan, propagate=scan.propagate, refuses=scan.refuses),
    "reference": _Backend(line_scan=reference.line_scan, propagate=reference.propagate),
}
"""By name, best first; the last takes everything."""


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this machine can run, best first."""
    return tuple(name for name, backend in _BACKENDS.items() if backend.missing() is None)


def backend_caveats() -> dict[str, str]:
    """By name of a backend, what of it this machine cannot run and what runs instead."""
    found = {}
    for name, backend in _BACKENDS.items():
        if reason := backend.missing():
            found[name] = f"{reason}; {available_backends()[0]!r} runs instead"
        elif reason := backend.caveat():
            found[name] = reason
    return found


def line_scan(
    x: Float[Array, "B H W C"],
    left: Float[Array, "B H W G"],
    center: Float[Array, "B H W G"],
    right: Float[Array, "B H W G"],
    *,
    direction: str,
    chunk: int | None = None,
    backend: str | None = None,
    shards: Shards | None = None,
) -> Float[Array, "B H W C"]:
    """Scans `x` line by line with ready weights. Source: GSPN, arXiv 2501.12381, equation 1.

    On line t, counted in the direction of the scan, and image coordinate i along it:

        h[t,i] = left[t,i] h[t-1,i-1] + center[t,i] h[t-1,i] + right[t,i] h[t-1,i+1] + x[t,i],    h[-1] = 0

    Neighbours outside the map count as 0, whatever their weight. G divides C: group g weighs the C/G consecutive
    channels from g C/G. `direction`, where the scan goes: "down", "up" (lines are rows), "right", "left" (columns).
    `chunk=k` restarts h every k lines from the line where the scan starts; None never does.
    `backend`: a name from `available_backends()`, or None for the best of them that takes these arguments.
    `shards`: how a kernel is split over a mesh, where not as `sharded` says; XLA splits the other backends by itself.

    The state is float32 (float64 if `x` is, on "reference") and the result has the dtype of `x`. Differentiable in both
    modes, and again.
    Raises ValueError for wrong shapes, group counts, directions, chunks or backends.
    """
    _check_x(x)
    check_direction(direction)
    _check_chunk(chunk)
    _check_groups(center, x, "center", axis=3)
    for name, weight in (("left", left), ("center", center), ("right", right)):
        _check_shape(name, weight, (*x.shape[:3], center.shape[3]))
    with split_by(shards):
        return _choose(backend, x, 1).line_scan(x, left, center, right, direction, chunk)


def propagate(
    x: Float[Array, "B H W C"],
    gates: Float[Array, "B H W 4 3 G"],
    lam: Float[Array, "B H W 4 C"],
    out_gate: Float[Array, "B H W 4 C"],
    merge: Float[Array, "4"] | Float[Array, "4 C"],
    *,
    skip: Float[Array, "B H W 4 C"] | None = None,
    chunk: int | None = None,
    backend: str | None = None,
    shards: Shards | None = None,
) -> Float[Array, "B H W C"]:
    """Scans `x` in four directions and merges the results. Source: GSPN, arXiv 2501.12381, sections 3.2 and 3.3.

        y = sum_k merge[k] ( out_gate[k] scan_k(lam[k] x) + skip[k] x ),    k = down, up, right, left

    `gates` holds the logits of the left, center and right weight (see `stochastic_weights`) in the image's frame.
    scan_k, `chunk`, `backend`, `shards`, types, derivatives and the group count G are those of `line_scan`; skip None
    leaves that term out. Sums have the type of the state.

    Raises ValueError for wrong shapes, group counts, chunks or backends.
    """
    _check_x(x)
    _check_chunk(chunk)
    _check_groups(gates, x, "gates", axis=5)
    _check_shape("gates", gates, (*x.shape[:3], 4, 3, gates.shape[5]))
    for name, array in (("lam", lam), ("out_gate", out_gate), ("skip", skip)):
        if array is not None:
            _check_shape(name, array, (*x.shape[:3], 4, x.shape[3]))
    _check_merge(merge, x)
    with split_by(shards):
        return _choose(backend, x, len(DIRECTIONS)).propagate(x, gates, lam, out_gate, merge, skip, chunk)


def propagate_low_rank(
    x: Float[Array, "B H W C"],
    proxy: Float[Array, "B H W d"],
    gates: Float[Array, "d 4 3 G"],
    lam: Float[Array, "d 4 C"],
    out_gate: Float[Array, "d 4 C"],
    merge: Float[Array, "4"] | Float[Array, "4 C"],
    *,
    skip: Float[Array, "d 4 C"] | None = None,
    chunk: int | None = None,
    backend: str | None = None,
    shards: Shards | None = None,
) -> Float[Array, "B H W C"]:
    """`propagate` with terms of low rank, each of which is a product of a narrow `proxy` of the pixel:

        propagate(x, proxy gates, 1 + proxy lam, 1 + proxy out_gate, merge, skip=proxy skip)

    The "mosaic_gpu" backend expands bfloat16 proxies by itself, on tensor cores: the terms, 20 times as wide as x, are
    never in device memory; what they get in the backward pass is. Long lines leave no room on chip for the backward
    pass, and longer ones for neither: then, and on other backends, XLA expands. Products have the dtype of `x`.

    The rest is that of `propagate`, the errors included. Source: GSPN, arXiv 2501.12381, section 4.
    """
    _check_x(x)
    _check_chunk(chunk)
    if proxy.ndim != 4 or proxy.shape[:3] != x.shape[:3]:
        raise ValueError(f"proxy must have shape {[*x.shape[:3], 'd']}, found {list(proxy.shape)}.")
    rank, channels = proxy.shape[3], x.shape[3]
    if gates.ndim != 4 or gates.shape[3] < 1 or channels % gates.shape[3]:
        raise ValueError(
            f"gates must have shape [d, 4, 3, G] with G a divisor of the {channels} channels of x, "
            f"found {list(gates.shape)}."
        )
    _check_shape("gates", gates, (rank, 4, 3, gates.shape[3]))
    for name, array in (("lam", lam), ("out_gate", out_gate), ("skip", skip)):
        if array is not None:
            _check_shape(name, array, (rank, 4, channels))
    _check_merge(merge, x)
    with split_by(shards):
        chosen = _choose(backend, x, len(DIRECTIONS))
        if chosen.propagate_low_rank is not None:
            reason = chosen.refuses_low_rank(x, proxy, 5 if skip is None else 6, chunk)
            if reason is None:
                return chosen.propagate_low_rank(x, proxy, gates, lam, out_gate, merge, skip, chunk)
            _log_expansion(reason)
        *terms, skip = chosen.expand(proxy, gates, lam, out_gate, skip)
        return chosen.propagate(x, *terms, merge, skip, chunk)


def _choose(name: str | None, x: Array, directions: int) -> _Backend:
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, _BACKENDS))}, found {name!r}.")
    reasons = []
    for candidate in _BACKENDS if name is None else (name,):
        backend = _BACKENDS[candidate]
        reason = backend.missing() or backend.refuses(x, directions)
        if reason is None:
            _log_choice(candidate, "".join(reasons))
            return backend
        reasons.append(f" The {candidate!r} backend {reason}.")
    other = "reference" if x.dtype == jnp.float64 else "scan"
    raise ValueError(
        f"backend must be one that can run this, found {name!r}, which {reason}; {other!r} runs everywhere."
    )


@functools.cache
def _log_choice(name: str, reasons: str) -> None:
    logger.info("Line scans run on the %r backend.%s", name, reasons)


@functools.cache
def _log_expansion(reason: str) -> None:
    logger.info("XLA expands the proxy, and the plain kernel scans: the one that does both %s.", reason)


def _check_merge(merge: Array, x: Array) -> None:
    if merge.shape not in ((4,), (4, x.shape[3])):
        raise ValueError(f"merge must have shape [4] or {[4, x.shape[3]]}, found {list(merge.shape)}.")


def _check_x(x: Array) -> None:
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must have shape [B, H, W, C] with no empty axis, found {list(x.shape)}.")
    if x.dtype not in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"x must be float64, float32, bfloat16 or float16, found {x.dtype}.")


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be None or a whole number of lines from 1, found {chunk!r}.")


def _check_groups(weights: Array, x: Array, name: str, axis: int) -> None:
    if weights.ndim != axis + 1:
        shape = "[B, H, W, G]" if axis == 3 else "[B, H, W, 4, 3, G]"
        raise ValueError(f"{name} must have shape {shape}, found {list(weights.shape)}.")
    groups, channels = weights.shape[axis], x.shape[3]
    if groups < 1 or channels % groups:
        raise ValueError(f"The group count of {name} must divide the {channels} channels of x, found {groups}.")


def _check_shape(name: str, array: Array, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ValueError(f"{name} must have shape {list(expected)}, found {list(array.shape)}.")
