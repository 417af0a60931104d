"""One optimizer step, as a pure function of state, batch and seed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gspn_jax import models
from gspn_jax.config import Config
from gspn_jax.diffusion import objectives
from gspn_jax.parallel import fsdp, sharding
from gspn_jax.pixels import from_uint8
from gspn_jax.training import ema
from gspn_jax.training.state import TrainState, abstract_state, learning_rate, make_optimizer

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]


def _micro_batches(array: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B/count, ...], every device keeping the images it has."""
    return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)


def make_loss(config: Config, graphdef: Any, mesh: Mesh | None = None) -> Callable:
    """loss(params, batch, key) -> (mean loss, metrics); dropped labels, t, noise and DropPath come from `key`.

    `params` are in their own shapes, or as they are stored on `mesh` (then inside of `fsdp.sharded_model`).
    """
    arch = models.resolve(config.model)

    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Metrics]:
        params = fsdp.outside_blocks(config, mesh, params) if mesh else params
        label_key, noise_key, path_key = jax.random.split(key, 3)
        y = objectives.drop_labels(label_key, batch["label"], config.diffusion.label_dropout, config.data.num_classes)

        def denoise(x, t, y):
            return models.apply(graphdef, params, x, t, y, drop_path_key=path_key if arch.drop_path else None)

        image = batch["image"]
        x0 = from_uint8(image) if image.dtype == jnp.uint8 else image  # latents are floats, in their final scale
        losses, metrics = objectives.loss(config.diffusion, denoise, x0, y, noise_key)
        return losses.mean(), {name: value.mean() for name, value in metrics.items()}

    return loss


def make_gradient(config: Config, graphdef: Any, mesh: Mesh | None = None) -> Callable:
    """gradient(params, batch, key) -> ((loss, metrics), gradient), the mean over `train.accumulate` micro-batches."""
    value_and_grad = jax.value_and_grad(make_loss(config, graphdef, mesh), has_aux=True)
    count = config.train.accumulate
    if count == 1:
        return value_and_grad

    def accumulated(params: Any, batch: dict[str, jax.Array], key: jax.Array):
        def body(total, micro):
            return jax.tree.map(jnp.add, total, value_and_grad(params, *micro)), None

        micro = (jax.tree.map(lambda a: _micro_batches(a, count), batch), jax.random.split(key, count))
        shapes = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda a: a[0], micro))
        total, _ = jax.lax.scan(body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), micro)
        return jax.tree.map(lambda a: a / count, total)

    return accumulated


def make_step(config: Config, mesh: Mesh) -> Step:
    """The jitted step: (state, {"image", "label"} global arrays) -> (state, metrics).

    The state is donated. The randomness of a step is fold_in(key(seed), step). A step whose loss or gradient is not
    finite changes nothing, and neither does any step after it (`state.halted`); metrics["finite"] says so. With
    guard.nonfinite "skip" only the step's number grows, and the next one goes on.
    """
    graphdef, _ = models.abstract(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    schedule = learning_rate(config.optimizer, config.train.steps)
    gradient = make_gradient(config, graphdef, mesh)
    seed = config.train.seed

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        with fsdp.sharded_model(config, mesh):
            (loss, metrics), grads = gradient(state.params, batch, key)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema.update(state.ema, params, state.step),
            halted=jnp.zeros((), jnp.bool_),
        )
        good = finite & ~state.halted
        new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, state)
        new = dataclasses.replace(new, halted=~good)
        if config.guard.nonfinite == "skip":
            new = dataclasses.replace(new, step=state.step + 1, halted=jnp.zeros((), jnp.bool_))
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step)),
            "finite": finite,
        }
        return new, metrics

    state_shardings = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh))
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_shardings, sharding.batch_sharding(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )
