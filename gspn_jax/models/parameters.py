"""Facts that a parameter carries: the names of its axes, whether it stays float32, whether it is a stack of layers.

A module says it where it makes the parameter, as metadata (`logical`); meshes, FSDP and casts read it from there
(`ParamShape`) and know no module by name.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

MATRIX = ("embed", None)
"""The axes of a parameter of two axes or more that names none: those of inputs and outputs are its last two."""


def logical(*axes: str | None, float32: bool = False) -> dict[str, Any]:
    """Metadata of a parameter: `axes` are its trailing ones by name (`sharding.MESH_AXIS`), None for those without.

    With `float32` blocks compute with it in that type, whatever theirs is; other parameters are cast first.
    """
    return {"axes": axes, "float32": float32}


class ParamShape(jax.ShapeDtypeStruct):
    """Shape and type of a parameter in its own shape, with what it says of itself.

    `stacked`: the first axis runs over layers, and is not among the trailing `axes`.
    """

    def __init__(self, shape, dtype, *, axes: tuple[str | None, ...] = (), stacked=False, float32=False, **others):
        super().__init__(shape, dtype, **others)
        self.axes, self.stacked, self.float32 = axes, stacked, float32

    @property
    def layer(self) -> "ParamShape":
        """Facts of one layer."""
        return ParamShape(self.shape[1:], self.dtype, axes=self.axes, float32=self.float32) if self.stacked else self


def shapes_of(state: nnx.State) -> dict[str, Any]:
    """The parameters of a network that `nnx.split` took apart, as a nested dict of `ParamShape`; `stack` marks stacks
    by the metadata "layer", the shape of a layer, which stored parameters may exceed (`sharding.stored`)."""

    def one(variable: nnx.Variable) -> ParamShape:
        metadata = variable.get_metadata()
        layer = metadata.get("layer")
        shape = variable.shape if layer is None else (variable.shape[0], *layer)
        default = MATRIX if len(shape if layer is None else layer) > 1 else ()
        axes, float32 = metadata.get("axes", default), metadata.get("float32", False)
        return ParamShape(shape, variable.dtype, axes=axes, stacked=layer is not None, float32=float32)

    shapes: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        inner = shapes
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = one(variable)
    return shapes


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves of nested dicts by their paths, such as "trunk/blocks/mixer/qkv/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def cast(params: Any, shapes: Any, dtype: DTypeLike) -> Any:
    """Parameters of blocks in the type that blocks compute in, but for those that stay float32."""
    return jax.tree.map(lambda leaf, own: leaf.astype(jnp.float32 if own.float32 else dtype), params, shapes)


class _Stream(nnx.RngStream):
    """Keys one after the other, those of a stream of `nnx.Rngs`. Their number is not an array: JAX traces nothing for
    it, and a model in half of the time."""

    def __init__(self, key: Key[Array, ""], *, tag: str):
        self.tag, self.key, self._given = tag, nnx.RngKey(key, tag=tag), 0

    def __call__(self) -> Key[Array, ""]:
        self._given += 1
        return jax.random.fold_in(self.key[...], self._given - 1)


def rngs_of(key: Key[Array, ""]) -> nnx.Rngs:
    """`nnx.Rngs(key)` for a module that keeps none of it: the same keys, in less time."""
    rngs = nnx.Rngs(key)
    rngs.default = _Stream(key, tag="default")
    return rngs


def abstract_of(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Static part of the network that `build` makes, and the `ParamShape` of each parameter in its place; allocates
    nothing."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(rngs_of(jax.random.key(0)))))
    return graphdef, shapes_of(state)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` blocks made by `make` of an `nnx.Rngs` as one module whose every parameter has a leading axis of that
    length.

    They are drawn one after the other: a vmap would compile several times longer.
    """
    graphdefs = []

    def draw(key: Key[Array, ""]) -> dict[str, Any]:
        block = make(rngs_of(key))
        for _, node in nnx.iter_graph(block):
            if isinstance(node, nnx.Variable):
                node.set_metadata(layer=node.shape)
        graphdef, state = nnx.split(block)
        graphdefs.append(graphdef)
        return nnx.to_pure_dict(state)

    params = jax.lax.map(draw, jax.random.split(rngs.params(), count))
    return nnx.merge(graphdefs[0], params)
