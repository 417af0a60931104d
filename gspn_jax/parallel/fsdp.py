"""A denoiser over a mesh: each device computes on its images, and gathers the weights of one block at a time.

Where a mesh has "fsdp", every block runs under `jax.shard_map`: its weights, split and padded as `sharding.stored`
says, are gathered in the type they are computed in, and the transpose of that is one reduce-scatter of their gradient
in float32. Left to itself the compiler splits products over "fsdp" as if it were "tensor", and gathers activations.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from gspn_jax import kernels, models
from gspn_jax.config import Config
from gspn_jax.kernels.derivatives import linear_call
from gspn_jax.models import blocks
from gspn_jax.parallel import sharding


@contextlib.contextmanager
def sharded_model(config: Config, mesh: Mesh, *, forward_only: bool = False) -> Iterator[None]:
    """Inside, denoisers are traced for what each device has: images over "data" and "fsdp", channels over "tensor"."""
    with sharded_blocks(models.abstract(config)[1], mesh, config.train.compute, forward_only=forward_only):
        yield


@contextlib.contextmanager
def sharded_blocks(shapes: Any, mesh: Mesh, compute: DTypeLike, *, forward_only: bool = False) -> Iterator[None]:
    """`sharded_model` for any network whose stacks run by `blocks.run_stack`, computed in the type `compute`.

    `shapes` are those of its parameters, unpadded; they are read where the mesh has "fsdp".
    """
    tensor_cores = uses_tensor_cores(mesh)
    if mesh.shape["fsdp"] == 1:
        machine = blocks.Machine(tensor_cores=tensor_cores, forward_only=forward_only)
        with blocks.run_blocks_on(machine), kernels.sharded(mesh, batch=sharding.BATCH_AXES, channels=("tensor",)):
            yield
        return
    with blocks.run_blocks_on(blocks.Machine(_runner(shapes, mesh, compute), tensor_cores, forward_only)):
        yield


def uses_tensor_cores(mesh: Mesh) -> bool:
    """Whether blocks are laid out for tensor cores: on GPUs, unless "tensor" splits channels, which padding would move
    from one device to another."""
    return mesh.devices.flat[0].platform == "gpu" and mesh.shape["tensor"] == 1


def outside_blocks(shapes: Any, mesh: Mesh, params: Any) -> Any:
    """Stored parameters with those that are in no block gathered, in their own `shapes`; the others as they are."""
    if mesh.shape["fsdp"] == 1:
        return params

    def one(path, leaf, shape):
        name = _name(path)
        if sharding.STACK.search(name):
            return leaf
        spec = sharding.partition_spec(name, shape.shape, mesh)
        whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
        leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, whole))
        return jax.lax.slice(leaf, (0,) * leaf.ndim, shape.shape)

    return jax.tree_util.tree_map_with_path(one, params, shapes)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _runner(shapes: Any, mesh: Mesh, compute: DTypeLike):
    """For `blocks.Machine`."""
    layers = {}  # path -> (where, shape) of the weight of one block
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        if sharding.STACK.search(_name(path)):
            spec = sharding.partition_spec(_name(path), leaf.shape, mesh)
            layers[_name(path)] = (PartitionSpec(*spec[1:]), leaf.shape[1:])
    by_image = PartitionSpec(sharding.BATCH_AXES)
    manual = set(sharding.BATCH_AXES if mesh.shape["tensor"] > 1 else sharding.AXES)

    def gathered(stack, path, leaf):
        spec, shape = layers[f"{stack}/{_name(path)}"]
        if "fsdp" not in spec:
            return leaf
        axis = spec.index("fsdp")
        return _gather(leaf, axis, shape[axis], compute if _name(path).endswith("kernel") else leaf.dtype)

    def runner(apply, stack):
        def local(params, *arrays):
            params = jax.tree_util.tree_map_with_path(functools.partial(gathered, stack), params)
            if mesh.shape["tensor"] == 1:
                return apply(params, *arrays)
            with kernels.sharded(jax.sharding.get_abstract_mesh(), channels=("tensor",)):
                return apply(params, *arrays)

        def run(params, *arrays):
            where = jax.tree_util.tree_map_with_path(
                lambda path, _: _over_fsdp(layers[f"{stack}/{_name(path)}"][0]), params
            )
            return jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(where, *(by_image,) * len(arrays)),
                out_specs=by_image,
                axis_names=manual,
                check_vma=False,
            )(params, *arrays)

        return run

    return runner


def _over_fsdp(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(axis if axis == "fsdp" else None for axis in spec))


def _gather(part: Array, axis: int, size: int, dtype: DTypeLike) -> Array:
    """The whole of a weight of which every device of "fsdp" has a part: `size` of the gathered `axis`, as `dtype`.

    Every block casts its kernels to `compute` before anything else, so that the cast may come first; vectors, such as
    scales of norms, are gathered as they are. The gradient is summed in float32.
    """

    def gather(_: None, part: Array) -> Array:
        whole = jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True)
        return jax.lax.slice_in_dim(whole, 0, size, axis=axis)

    def scatter(_: None, gradient: Array) -> Array:
        padding = -size % jax.lax.axis_size("fsdp")
        gradient = gradient.astype(jnp.float32)
        gradient = jnp.pad(gradient, [(0, padding if i == axis else 0) for i in range(gradient.ndim)])
        return jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=axis, tiled=True)

    return linear_call(gather, scatter, None, part)
