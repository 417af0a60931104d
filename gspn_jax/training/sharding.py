"""The device mesh and where each parameter lives on it, from one table of logical names."""

import logging
import math
import re
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import kernels
from gspn_jax.config import Config, ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

MESH_AXIS = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "channels": "tensor", None: None}
"""Logical axis of a weight -> mesh axis."""

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # attention and MLP of the DiT layout
    (r"mixer/qkv/kernel$", ("embed", None, "heads")),
    (r"mixer/proj/kernel$", ("heads", "embed")),
    (r"mlp/fc1/kernel$", ("embed", "mlp")),
    (r"mlp/fc2/kernel$", ("mlp", "embed")),
    # GSPN: channels are independent from the first projection to the last
    (r"mixer/in_proj/kernel$", ("embed", "channels")),
    (r"mixer/conv/kernel$", (None, None, "channels")),
    (r"mixer/proxy/kernel$", ("channels", "embed")),
    (r"mixer/(gates|lam|out_gate|skip)/kernel$", (None, None, "channels")),
    (r"mixer/out_proj/kernel$", ("channels", "embed")),
    (r"modulation/linear/kernel$", ("embed", None, None)),
    # everything else: input by output
    (r"kernel$", ("embed", None)),
    (r"embedding$", (None, "embed")),
)
"""The first pattern that matches a parameter's path names its trailing axes; a stack of layers has one in front."""


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh ("data", "fsdp", "tensor") over `devices` (all by default).

    Raises ConfigError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = config.fsdp * config.tensor
    data = len(devices) // fixed if config.data == -1 else config.data
    if data * fixed != len(devices) or data == 0:
        raise ConfigError(f"mesh.data x mesh.fsdp x mesh.tensor must be the {len(devices)} devices there are, "
                          f"found {config.data} x {config.fsdp} x {config.tensor}")
    return jax.make_mesh((data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError unless each device gets the same number of images of each micro-batch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.accumulate
    if config.train.batch_size % parts:
        raise ConfigError(f"train.batch_size must be a multiple of {parts} (mesh.data x mesh.fsdp x train.accumulate), "
                          f"found {config.train.batch_size}")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Images are split over every axis but "tensor"."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def sharded_operator(mesh: Mesh) -> AbstractContextManager[None]:
    """Inside, line scans are traced for the part of a batch and of the channels that each device has."""
    return kernels.sharded(mesh, batch=BATCH_AXES, channels=("tensor",))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where the parameter at `path` ("in_blocks/mixer/in_proj/kernel") lives.

    An axis that the mesh does not divide stays whole; then "fsdp" takes the largest other axis that it divides.
    """
    logical = next((axes for pattern, axes in RULES if re.search(pattern, path)), ())
    axes = [None] * len(shape)
    offset = len(shape) - len(logical)
    for i, name in enumerate(logical):
        mesh_axis = MESH_AXIS[name]
        if offset >= 0 and mesh_axis and mesh.shape[mesh_axis] > 1 and shape[offset + i] % mesh.shape[mesh_axis] == 0:
            axes[offset + i] = mesh_axis
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and "fsdp" not in axes and math.prod(shape) >= MIN_SHARDED_SIZE:
        free = [i for i, size in enumerate(shape) if axes[i] is None and size % fsdp == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = "fsdp"
        else:
            logging.getLogger(__name__).warning(
                "no axis of %s %s is a multiple of mesh.fsdp=%d: it is kept whole on every device", path, shape, fsdp)
    return PartitionSpec(*axes)


MIN_SHARDED_SIZE = 2**14
"""Smaller parameters (biases, merge weights) are not worth a gather."""


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding in the shape of `params` (arrays or ShapeDtypeStructs)."""
    def one(path, leaf):
        return NamedSharding(mesh, partition_spec(jax.tree_util.keystr(path, simple=True, separator="/"),
                                                  leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(one, params)
