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


def current_mesh() -> Mesh | None:
    """The mesh of `sharded`, inside it."""
    return None if _current.get() is None else _current.get()[0]


def over_shards(operator: Callable, axes: str) -> Callable:
    """`operator`, which takes arrays and last the chunk, all by position, under `jax.shard_map` inside `sharded`.

    `axes` says of each array, in words, what its first and its last axis are: b for images, c for channels, - for
    neither. Arrays may be None. An axis of channels of size 1, which all channels share, is not split.
    """

    @functools.wraps(operator)
    def wrapped(*arguments: Array | int | None) -> Array:
        if _current.get() is None:
            return operator(*arguments)
        mesh, batch_axes, channel_axes = _current.get()
        *arrays, chunk = arguments
        given = {i: (array, word) for i, (array, word) in enumerate(zip(arrays, axes.split(), strict=True))
                 if array is not None}
        sizes = [a.shape[-1] for a, (_, last) in given.values() if last == "c" and a.ndim > 1 and a.shape[-1] > 1]
        batch = _dividing(mesh, batch_axes, math.gcd(*(a.shape[0] for a, (first, _) in given.values() if first == "b")))
        channel = _dividing(mesh, channel_axes, math.gcd(*sizes) if sizes else 1)

        def spec(array: Array, word: str) -> PartitionSpec:
            split = word[1] == "c" and array.ndim > 1 and array.shape[-1] > 1
            return PartitionSpec(batch if word[0] == "b" else None, *(None,) * (array.ndim - 2),
                                 *([channel if split else None] if array.ndim > 1 else []))

        def local(parts: dict[int, Array]) -> Array:
            return operator(*(parts.get(i) for i in range(len(arrays))), chunk)

        specs = {i: spec(*pair) for i, pair in given.items()}
        parts = {i: array for i, (array, _) in given.items()}
        return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=specs[0],
                             axis_names=set(mesh.axis_names) - set(mesh.manual_axes), check_vma=False)(parts)

    return wrapped


def _dividing(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """The first of the axes, as many as divide `size` together."""
    taken = ()
    for axis in axes:
        if size % math.prod(mesh.shape[a] for a in (*taken, axis)):
            break
        taken += (axis,)
    return taken or None
