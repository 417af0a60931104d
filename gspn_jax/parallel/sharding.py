"""The device mesh and where each parameter lives on it, from the names that its axes have."""

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gspn_jax.config import ConfigError, MeshConfig, RunConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

MESH_AXIS = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "channels": "tensor"}
"""Logical axis of a parameter (`models.parameters`) -> mesh axis; an axis of another name is not split by its name."""


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh ("data", "fsdp", "tensor") over `devices` (all by default).

    Raises ConfigError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = config.fsdp * config.tensor
    data = len(devices) // fixed if config.data == -1 else config.data
    if data * fixed != len(devices) or data == 0:
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor must be the {len(devices)} devices there are, "
            f"found {config.data} x {config.fsdp} x {config.tensor}"
        )
    return jax.make_mesh((data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_batch(config: RunConfig, mesh: Mesh) -> None:
    """Raises ConfigError unless each device gets the same number of images of each micro-batch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulate
    if config.train.batch_size % parts:
        raise ConfigError(
            f"train.batch_size must be a multiple of {parts} (mesh.data x mesh.fsdp x train.accumulate), "
            f"found {config.train.batch_size}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Images are split over every axis but "tensor"."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


MIN_SHARDED_SIZE = 2**10
"""Parameters that have fewer numbers a layer (merge weights, the narrow biases) are not worth a gather."""


def partition_spec(own: jax.ShapeDtypeStruct, mesh: Mesh | AbstractMesh, path: str | None = None) -> PartitionSpec:
    """Place of a parameter; `own` is its `ParamShape`, and a plain shape is that of one without named axes.

    "tensor" takes the axis whose name says so if it divides it. "fsdp" takes the axis that needs the least padding
    (`stored_shape`), of equals the one whose name says so and then the longest; the axis of layers is never split, for
    a scan runs over it. With its `path` a parameter that cannot be split is named in a log line.
    """
    shape, logical, first = own.shape, getattr(own, "axes", ()), int(getattr(own, "stacked", False))
    axes: list[str | None] = [None] * len(shape)
    offset = len(shape) - len(logical)
    for i, name in enumerate(logical, start=offset):
        if MESH_AXIS.get(name) == "tensor" and mesh.shape["tensor"] > 1 and shape[i] % mesh.shape["tensor"] == 0:
            axes[i] = "tensor"
    fsdp = mesh.shape["fsdp"]
    free = [i for i in range(first, len(shape)) if axes[i] is None]
    if fsdp > 1 and free and math.prod(shape[first:]) >= MIN_SHARDED_SIZE:
        named = {offset + i for i, name in enumerate(logical) if MESH_AXIS.get(name) == "fsdp"}
        best = min(free, key=lambda i: (_padded(shape[i], fsdp) / shape[i], i not in named, -shape[i]))
        if _padded(shape[best], fsdp) <= 2 * shape[best]:
            axes[best] = "fsdp"
        elif path is not None:
            logging.getLogger(__name__).warning(
                "no axis of %s %s can be split by mesh.fsdp=%d: it is kept whole on every device", path, shape, fsdp
            )
    return PartitionSpec(*axes)


def _padded(size: int, parts: int) -> int:
    return -(-size // parts) * parts


def stored_shape(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> tuple[int, ...]:
    """`shape` with the axis of "fsdp" rounded up, so that every device has an equal part: 1500 is 1504 for 8.

    What is added is zero, and stays so: its gradient is zero, and AdamW and averages then leave it alone.
    """
    return tuple(
        _padded(size, mesh.shape["fsdp"]) if axis == "fsdp" else size for size, axis in zip(shape, spec, strict=True)
    )


def stored(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Form of `params` (a tree of `ParamShape`, in their own shapes) on the devices: a tree of ShapeDtypeStruct with
    padded shapes and shardings."""

    def one(path, leaf):
        spec = partition_spec(leaf, mesh, jax.tree_util.keystr(path, simple=True, separator="/"))
        shape = stored_shape(leaf.shape, spec, mesh)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, params)


def param_shardings(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The shardings of `stored`."""
    return jax.tree.map(lambda s: s.sharding, stored(params, mesh))


def put(params: Any, shapes: Any, mesh: Mesh) -> Any:
    """Parameters of NumPy in their own `shapes`, whole on every host -> as they are stored, on the devices."""

    def one(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
        padded = np.pad(array, [(0, to - size) for size, to in zip(array.shape, target.shape, strict=True)])
        return jax.make_array_from_callback(target.shape, target.sharding, lambda index: padded[index])

    return jax.tree.map(one, params, stored(shapes, mesh))


def pad(params: Any, shapes: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Parameters in their own `shapes` -> as they are stored."""

    def one(leaf, target):
        return jnp.pad(leaf, [(0, to - size) for size, to in zip(leaf.shape, target.shape, strict=True)])

    return jax.tree.map(one, params, stored(shapes, mesh))
