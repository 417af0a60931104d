"""A denoiser over a mesh: each device computes on its images, and gathers the weights of one block at a time.

Where a mesh has "fsdp", every block runs under `jax.shard_map`: its weights, split and padded as `sharding.stored`
says, are gathered in the type they are computed in, and the transpose of that is one reduce-scatter of their gradient
in float32. Left to itself the compiler splits products over "fsdp" as if it were "tensor", and gathers activations.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from gspn_jax import kernels
from gspn_jax.kernels.derivatives import linear_call
from gspn_jax.models import stack
from gspn_jax.parallel import sharding


@contextlib.contextmanager
def sharded_blocks(
    mesh: Mesh, compute: DTypeLike, *, forward_only: bool = False, repeats: bool = False
) -> Iterator[None]:
    """Inside, blocks that compute in the type `compute` are traced for what each device has: images over "data" and
    "fsdp", channels over "tensor".

    `repeats`: the program evaluates a network many times, in a loop. Loops over blocks read their weights where they
    are; without one XLA:GPU would copy some of them in each evaluation.
    """
    each = unrolls(mesh) and not repeats
    machine = stack.Machine(tensor_cores=uses_tensor_cores(mesh), forward_only=forward_only, unrolls=each)
    if mesh.shape["fsdp"] == 1:
        with stack.run_blocks_on(machine), kernels.sharded(mesh, batch=sharding.BATCH_AXES, channels=("tensor",)):
            yield
        return
    with stack.run_blocks_on(machine._replace(runner=_runner(mesh, compute))):
        yield


def uses_tensor_cores(mesh: Mesh) -> bool:
    """Tells whether blocks are laid out for tensor cores: on GPUs, unless "tensor" splits channels, which padding would
    move from one device to another."""
    return mesh.devices.flat[0].platform == "gpu" and mesh.shape["tensor"] == 1


def unrolls(mesh: Mesh) -> bool:
    """Tells whether programs have every block of a stack in place of a loop, where a config does not say: on GPUs,
    whose compiler takes no longer for it (docs/performance.md)."""
    return mesh.devices.flat[0].platform == "gpu"


def outside_blocks(shapes: Any, mesh: Mesh, params: Any) -> Any:
    """Stored parameters with those that are in no block gathered, in their own `shapes`; the others as they are."""
    if mesh.shape["fsdp"] == 1:
        return params

    def one(leaf, own):
        if getattr(own, "stacked", False):
            return leaf
        spec = sharding.partition_spec(own, mesh)
        whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
        leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, whole))
        return jax.lax.slice(leaf, (0,) * leaf.ndim, own.shape)

    return jax.tree.map(one, params, shapes)


def gathered_outside_blocks(stored: Any, shapes: Any, mesh: Mesh) -> Any:
    """Parameters as they are stored -> as `placed` puts them, once for all steps."""
    gather = jax.jit(lambda params: outside_blocks(shapes, mesh, params), out_shardings=_where_read(shapes, mesh))
    return gather(stored)


def _where_read(shapes: Any, mesh: Mesh) -> Any:
    """Shardings of parameters that a step reads and does not train."""
    whole = sharding.replicated(mesh)
    return jax.tree.map(
        lambda own, stored: stored.sharding if getattr(own, "stacked", False) else whole,
        shapes,
        sharding.stored(shapes, mesh),
    )


def placed(make: Callable[[], Any], shapes: Any, mesh: Mesh) -> Any:
    """Parameters of these `shapes` as `make` makes them, where a step reads what it does not train (`Task.frozen`):
    stacks of blocks as they are stored, what is in no block whole on every device."""

    def one(own, leaf, padded):
        return padded if getattr(own, "stacked", False) else leaf

    def build():
        params = make()
        return jax.tree.map(one, shapes, params, sharding.pad(params, shapes, mesh))

    return jax.jit(build, out_shardings=_where_read(shapes, mesh))()


@functools.cache  # one object, so that nothing is traced twice for it
def _runner(mesh: Mesh, compute: DTypeLike):
    """For `stack.Machine`."""
    by_image = PartitionSpec(sharding.BATCH_AXES)
    manual = set(sharding.BATCH_AXES if mesh.shape["tensor"] > 1 else sharding.AXES)

    def gathered(leaf, own):
        spec = sharding.partition_spec(own, mesh)
        if "fsdp" not in spec:
            return leaf
        axis = spec.index("fsdp")
        return _gather(leaf, axis, own.shape[axis], leaf.dtype if own.float32 else compute)

    def runner(apply, shapes):
        where = jax.tree.map(lambda own: _over_fsdp(sharding.partition_spec(own, mesh)), shapes)

        def local(params, *arrays):
            params = jax.tree.map(gathered, params, shapes)
            if mesh.shape["tensor"] == 1:
                return apply(params, *arrays)
            with kernels.sharded(jax.sharding.get_abstract_mesh(), channels=("tensor",)):
                return apply(params, *arrays)

        def run(params, *arrays):
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
    """The whole of a parameter of which every device of "fsdp" has a part: `size` of the gathered `axis`, as `dtype`.

    Every block casts to the type it computes in before anything else, so that the cast may come first; what stays
    float32 (`parameters.logical`) is gathered as it is. The gradient is summed in float32.
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
