"""The operator over a mesh: images and channels are independent, so that each device works on its own part.

XLA partitions the scan backend by itself; a kernel it would give whole arrays, gathered on every device.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

_current = contextvars.ContextVar("sharding of the operator", default=None)


@contextlib.contextmanager
def sharded(mesh: Mesh, *, batch: tuple[str, ...] = (), channels: tuple[str, ...] = ()) -> Iterator[None]:
    """Operators traced inside run on each device's part: images split over the mesh axes `batch`, channels over
    `channels`. Axes that the arrays do not divide into are left out: there every device does the same work.

    Inside one's own `jax.shard_map` this is not needed.
    """
    token = _current.set((mesh, tuple(batch), tuple(channels)))
    try:
        yield
    finally:
        _current.reset(token)


def over_shards(propagate: Callable) -> Callable:
    """`propagate` by position (x, gates, lam, out_gate, merge, skip, chunk), under `jax.shard_map` inside `sharded`."""

    @functools.wraps(propagate)
    def wrapped(x: Array, gates: Array, lam: Array, out_gate: Array, merge: Array, skip: Array | None, chunk):
        if _current.get() is None:
            return propagate(x, gates, lam, out_gate, merge, skip, chunk)
        mesh, batch_axes, channel_axes = _current.get()
        groups, channels = gates.shape[-1], x.shape[-1]
        batch = _dividing(mesh, batch_axes, x.shape[0])
        channel = _dividing(mesh, channel_axes, channels if groups == 1 else math.gcd(groups, channels))

        def spec(array: Array, split: bool = True) -> PartitionSpec:
            return PartitionSpec(batch, *(None,) * (array.ndim - 2), channel if split else None)

        arrays = {"x": x, "gates": gates, "lam": lam, "out_gate": out_gate, "skip": skip}
        specs = {name: spec(a, name != "gates" or groups > 1) for name, a in arrays.items() if a is not None}
        specs["merge"] = PartitionSpec(None, channel) if merge.ndim == 2 else PartitionSpec()

        def local(parts: dict[str, Array]) -> Array:
            return propagate(parts["x"], parts["gates"], parts["lam"], parts["out_gate"], parts["merge"],
                             parts.get("skip"), chunk)  # fmt: skip

        arrays = {name: {**arrays, "merge": merge}[name] for name in specs}
        return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=spec(x),
                             axis_names=set(mesh.axis_names) - set(mesh.manual_axes), check_vma=False)(arrays)

    return wrapped


def _dividing(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """The first of the axes, as many as divide `size` together."""
    taken = ()
    for axis in axes:
        if size % math.prod(mesh.shape[a] for a in (*taken, axis)):
            break
        taken += (axis,)
    return taken or None
