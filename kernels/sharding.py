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

    `axes` says of each array, in words, what its first and its last axis are, or, by a longer word, each: b for images,
    c for channels or whole heads of them, - for neither. Arrays may be None. An axis of channels of size 1, which all
    channels share, is not split.
    """

    @functools.wraps(operator)
    def wrapped(*arguments: Array | int | None) -> Array:
        if _current.get() is None:
            return operator(*arguments)
        mesh, batch_axes, channel_axes = _current.get()
        *arrays, chunk = arguments
        words = zip(arrays, axes.split(), strict=True)
        given = {i: (array, _letters(array, word)) for i, (array, word) in enumerate(words) if array is not None}

        def common(letter: str) -> int:
            return math.gcd(
                *(
                    size
                    for array, letters in given.values()
                    for size, of in zip(array.shape, letters, strict=True)
                    if of == letter
                )
            )

        split = {"b": _dividing(mesh, batch_axes, common("b")), "c": _dividing(mesh, channel_axes, common("c"))}
        specs = {i: PartitionSpec(*map(split.get, letters)) for i, (_, letters) in given.items()}

        def local(parts: dict[int, Array]) -> Array:
            return operator(*(parts.get(i) for i in range(len(arrays))), chunk)

        parts = {i: array for i, (array, _) in given.items()}
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=specs[0],
            axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
            check_vma=False,
        )(parts)

    return wrapped


def _letters(array: Array, word: str) -> str:
    """`word` with a letter for every axis; a vector that is given by its ends has the first of them."""
    letters = word if len(word) > 2 else (word[0] + "-" * (array.ndim - 2) + word[1])[: array.ndim]
    return "".join(
        "-" if letter == "c" and size == 1 else letter for letter, size in zip(letters, array.shape, strict=True)
    )


def _dividing(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """The first of the axes, as many as divide `size` together."""
    taken = ()
    for axis in axes:
        if size % math.prod(mesh.shape[a] for a in (*taken, axis)):
            break
        taken += (axis,)
    return taken or None
