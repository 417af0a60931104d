"""The training state: born sharded, donated to each step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Int

from gspn_jax.parallel import sharding
from gspn_jax.runs import averages
from gspn_jax.training import ema, only
from gspn_jax.training.task import Task

TRAINING_ONLY = "training_only"
"""The item of a checkpoint that holds the parameters that only training needs."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State that a step reads and writes. `halted` is set by a non-finite loss; from then on steps change nothing.
    `apart` is that of the task.

    Parameters, moments and averages are as `sharding.stored` says: the axis that "fsdp" splits may be padded by zeros.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    ema: dict[str, Any]
    halted: Bool[Array, ""]
    apart: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def exported(self) -> Any:
        """The parameters but for those that only training needs."""
        return only.without(self.params, self.apart)

    def items(self) -> dict[str, Any]:
        """The items of a checkpoint, by name: each average apart, so that sampling reads only one."""
        items = {"params": self.exported, "opt_state": self.opt_state}
        items |= {averages.item_of(name): average for name, average in self.ema.items()}
        return items | ({TRAINING_ONLY: {name: self.params[name] for name in self.apart}} if self.apart else {})

    def of_items(self, step: int, items: dict[str, Any]) -> "TrainState":
        """The state at `step` of `items` that were read from a checkpoint; this one has its shapes and shardings."""
        number, halted = jax.jit(
            lambda: (jnp.asarray(step, jnp.int32), jnp.zeros((), jnp.bool_)),
            out_shardings=(self.step.sharding, self.halted.sharding),
        )()
        return TrainState(
            step=number,
            params=items["params"] | items[TRAINING_ONLY] if self.apart else items["params"],
            opt_state=items["opt_state"],
            ema={name: items[averages.item_of(name)] for name in self.ema},
            halted=halted,
            apart=self.apart,
        )


def _build(task: Task, mesh: Mesh | AbstractMesh, key: jax.Array) -> TrainState:
    return _begin(task, sharding.pad(task.init(key), task.shapes, mesh))


def _begin(task: Task, params: Any) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=task.optimizer().init(only.part(params, only.trained(task.config.train, task.shapes))),
        ema=ema.init(only.without(params, task.apart), averages.names(task.config.train)),
        halted=jnp.zeros((), jnp.bool_),
        apart=task.apart,
    )


def abstract_state(task: Task, mesh: Mesh | AbstractMesh) -> TrainState:
    """The state's shapes, types and shardings, without allocating it."""
    shapes = jax.eval_shape(lambda: _build(task, mesh, jax.random.key(0)))
    params = sharding.param_shardings(task.shapes, mesh)
    everywhere = sharding.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        task.optimizer(),
        lambda leaf, place: leaf if _masked(leaf) else place,
        shapes.opt_state,
        only.part(params, only.trained(task.config.train, task.shapes)),
        transform_non_params=lambda _: everywhere,
        is_leaf=_masked,
    )
    shardings = TrainState(
        step=everywhere,
        params=params,
        opt_state=opt_state,
        ema=dict.fromkeys(shapes.ema, only.without(params, task.apart)),
        halted=everywhere,
        apart=task.apart,
    )
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)


def _masked(node: Any) -> bool:
    """Tells whether a part of an optimizer has nothing at the place of a parameter, which another part moves."""
    return isinstance(node, optax.MaskedNode)


def create_state(task: Task, mesh: Mesh, params: Any = None) -> TrainState:
    """The initial state, of `params` as they are stored on `mesh`, or from `train.seed`; every shard is made on the
    device that holds it."""
    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(task, mesh))
    if params is not None:
        return jax.jit(lambda params: _begin(task, params), out_shardings=shardings)(params)
    key = jax.random.key(task.config.train.seed)
    return jax.jit(lambda key: _build(task, mesh, key), out_shardings=shardings)(key)
