"""The operator over a mesh: images and channels are independent, so that each device works on its own part.

XLA partitions the scan backend by itself; a kernel it would give whole arrays, gathered on every device.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shards:
    """Split of the operator: images over the mesh axes `batch`, channels over `channels`. Axes that the arrays do
    not divide into are left out: there every device does the same work."""

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()


_current = jax.make_user_context(default_value=None)
"""The `Shards` of the code that is traced. JAX has it in the key of everything that it traced before: a jitted function
is traced anew where it is called under others."""


def sharded(
    mesh: Mesh | AbstractMesh, *, batch: tuple[str, ...] = (), channels: tuple[str, ...] = ()
) -> contextlib.AbstractContextManager:
    """Inside, the operators that are given no `shards` run on each device's part, as `Shards` says.

    This is not needed inside one's own `jax.shard_map`, nor where the mesh axes are `AxisType.Explicit`: there the type
    of `x` says how it is split.
    """
    return split_by(Shards(mesh=mesh, batch=tuple(batch), channels=tuple(channels)))


def split_by(shards: Shards | None) -> contextlib.AbstractContextManager:
    """Inside, operators are split by `shards`; None changes nothing."""
    return contextlib.nullcontext() if shards is None else _current(shards)


def current_mesh() -> Mesh | AbstractMesh | None:
    """The mesh of `sharded`, inside it."""
    return None if _current.value is None else _current.value.mesh


def over_shards(operator: Callable, axes: str) -> Callable:
    """`operator`, which takes arrays and then what is static, all by position, under `jax.shard_map` inside `sharded`.

    `axes` says of each array, in words, what its first and its last axis are, or, by a longer word, each: b for images,
    c for channels or whole heads of them, - for neither. Arrays may be None. An axis of channels of size 1, which all
    channels share, is not split.
    """

    @functools.wraps(operator)
    def wrapped(*arguments: Any) -> Array:
        shards = _current.value or _of_type(arguments[0])
        if shards is None:
            _log_whole(_axes_in_use())
            return operator(*arguments)
        mesh = shards.mesh
        words = axes.split()
        arrays, static = arguments[: len(words)], arguments[len(words) :]
        with_words = enumerate(zip(arrays, words, strict=True))
        given = {i: (array, _letters(array, word)) for i, (array, word) in with_words if array is not None}

        def common(letter: str) -> int:
            return math.gcd(
                *(
                    size
                    for array, letters in given.values()
                    for size, of in zip(array.shape, letters, strict=True)
                    if of == letter
                )
            )

        split = {"b": _dividing(mesh, shards.batch, common("b")), "c": _dividing(mesh, shards.channels, common("c"))}
        specs = {i: PartitionSpec(*map(split.get, letters)) for i, (_, letters) in given.items()}

        def local(parts: dict[int, Array]) -> Array:
            return operator(*(parts.get(i) for i in range(len(arrays))), *static)

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


def _of_type(x: Array) -> Shards | None:
    """As the first and the last axis of `x` are split by its type, where mesh axes are `AxisType.Explicit`."""
    sharding = jax.typeof(x).sharding
    ends = (sharding.spec[0], sharding.spec[-1]) if x.ndim > 1 else ()
    batch, channels = (axes if isinstance(axes, tuple) else (axes,) if axes else () for axes in ends or ((), ()))
    return Shards(mesh=sharding.mesh, batch=batch, channels=channels) if batch or channels else None


def _axes_in_use() -> tuple[str, ...]:
    """Axes of the mesh of the call (`jax.set_mesh`) over several devices that no `jax.shard_map` has split."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in mesh.manual_axes)


@functools.cache
def _log_whole(axes: tuple[str, ...]) -> None:
    if axes:
        logger.warning(
            "A kernel is called over the mesh axes %s without `shards`: every device computes the whole of it.",
            ", ".join(map(repr, axes)),
        )
