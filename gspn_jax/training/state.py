"""The training state: born sharded, donated to each step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Int

from gspn_jax import models
from gspn_jax.config import Config, OptimizerConfig
from gspn_jax.parallel import sharding
from gspn_jax.runs import averages
from gspn_jax.training import ema


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and writes. `halted` is set by a non-finite loss; from then on steps change nothing.

    Parameters, moments and averages are as `sharding.stored` says: the axis that "fsdp" splits may be padded by zeros.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    ema: dict[str, Any]
    halted: Bool[Array, ""]

    def items(self) -> dict[str, Any]:
        """The items of a checkpoint, by name: each average apart, so that sampling reads only one."""
        return {"params": self.params, "opt_state": self.opt_state} | {
            averages.item_of(name): average for name, average in self.ema.items()
        }

    def of_items(self, step: int, items: dict[str, Any]) -> "TrainState":
        """The state at `step` of `items` that were read from a checkpoint; this one has its shapes and shardings."""
        number, halted = jax.jit(
            lambda: (jnp.asarray(step, jnp.int32), jnp.zeros((), jnp.bool_)),
            out_shardings=(self.step.sharding, self.halted.sharding),
        )()
        return TrainState(
            step=number,
            params=items["params"],
            opt_state=items["opt_state"],
            ema={name: items[averages.item_of(name)] for name in self.ema},
            halted=halted,
        )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then half a cosine down to `final_learning_rate` at `steps`."""
    if config.warmup_steps >= steps:  # nothing is left to decay over
        return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup_steps else config.learning_rate,
        config.learning_rate,
        config.warmup_steps,
        steps,
        config.final_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's global norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config, steps), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )


def _build(config: Config, mesh: Mesh | AbstractMesh, key: jax.Array) -> TrainState:
    params = sharding.pad(models.init(config, key), mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=ema.init(params, config.train.ema_decays),
        halted=jnp.zeros((), jnp.bool_),
    )


def abstract_state(config: Config, mesh: Mesh | AbstractMesh) -> TrainState:
    """The state's shapes, types and shardings, without allocating it."""
    shapes = jax.eval_shape(lambda: _build(config, mesh, jax.random.key(0)))
    params = sharding.param_shardings(models.abstract(config)[1], mesh)
    everywhere = sharding.replicated(mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, shapes.opt_state, params, transform_non_params=lambda _: everywhere
    )
    shardings = TrainState(
        step=everywhere, params=params, opt_state=opt_state, ema=dict.fromkeys(shapes.ema, params), halted=everywhere
    )
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)


def create_state(config: Config, mesh: Mesh) -> TrainState:
    """The initial state from `config.train.seed`; every shard is made on the device that holds it."""
    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh))
    return jax.jit(lambda key: _build(config, mesh, key), out_shardings=shardings)(jax.random.key(config.train.seed))
