"""One optimizer step of a task, as a pure function of state, batch and seed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gspn_jax.parallel import fsdp, sharding
from gspn_jax.training import ema, only
from gspn_jax.training.batches import READ
from gspn_jax.training.state import TrainState, abstract_state
from gspn_jax.training.task import Batch, Metrics, Task

Step = Callable[..., tuple[TrainState, Metrics]]
"""step(state, batch, *frozen) -> (state, metrics)."""


def _micro_batches(array: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B/count, ...], every device keeping the images it has."""
    return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)


def make_loss(task: Task, mesh: Mesh | None = None) -> Callable:
    """loss(params, batch, key, *frozen) -> (mean loss, metrics), as `Task.loss`.

    `params` are in their own shapes, or as they are stored on `mesh` (then inside of `fsdp.sharded_blocks`).
    """

    def loss(params: Any, batch: Batch, key: jax.Array, *frozen: Any) -> tuple[jax.Array, Metrics]:
        params = fsdp.outside_blocks(task.shapes, mesh, params) if mesh else params
        return task.loss(params, batch, key, *frozen)

    return loss


def make_gradient(task: Task, mesh: Mesh | None = None) -> Callable:
    """gradient(params, batch, key, *frozen) -> ((loss, metrics), gradient), the mean over `train.accumulate`
    micro-batches; of the parameters that are trained (`only.part`)."""
    loss, trained = make_loss(task, mesh), only.trained(task.config.train, task.shapes)

    def of_part(part: Any, params: Any, *arguments: Any) -> tuple[jax.Array, Metrics]:
        return loss(only.merged(part, params), *arguments)

    def value_and_grad(params: Any, *arguments: Any):
        return jax.value_and_grad(of_part, has_aux=True)(only.part(params, trained), params, *arguments)

    count = task.config.train.accumulate
    if count == 1:
        return value_and_grad

    def accumulated(params: Any, batch: Batch, key: jax.Array, *frozen: Any):
        def body(total, micro):
            return jax.tree.map(jnp.add, total, value_and_grad(params, *micro, *frozen)), None

        micro = (jax.tree.map(lambda a: _micro_batches(a, count), batch), jax.random.split(key, count))
        shapes = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda a: a[0], micro), *frozen)
        total, _ = jax.lax.scan(body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), micro)
        return jax.tree.map(lambda a: a / count, total)

    return accumulated


def make_step(task: Task, mesh: Mesh, frozen: Sequence[Any] = ()) -> Step:
    """The jitted step: (state, batch of global arrays, *frozen) -> (state, metrics); `frozen` is that of the task.

    The state is donated. The randomness of a step is fold_in(key(seed), step). A step whose loss or gradient is not
    finite changes nothing, and neither does any step after it (`state.halted`); metrics["finite"] says so. With
    guard.nonfinite "skip" only the step's number grows, and the next one goes on. The same holds for a batch that some
    host could not read: metrics["read"] says so among several hosts.
    """
    optimizer, schedule, gradient = task.optimizer(), task.learning_rate(), make_gradient(task, mesh)
    trained = only.trained(task.config.train, task.shapes)
    averaged = trained and only.without(trained, task.apart)
    train, skips = task.config.train, task.config.guard.nonfinite == "skip"

    def step(state: TrainState, batch: Batch, *frozen: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(train.seed), state.step)
        read = batch.get(READ)
        batch = {name: rows for name, rows in batch.items() if name != READ}
        with fsdp.sharded_blocks(mesh, train.compute):
            (loss, metrics), grads = gradient(state.params, batch, key, *frozen)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        usable = finite if read is None else finite & read.all()
        part = only.part(state.params, trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, part)
        part = optax.apply_updates(part, updates)
        averages = {name: only.part(average, averaged) for name, average in state.ema.items()}
        averages = ema.update(averages, only.without(part, task.apart), state.step)
        new = TrainState(
            step=state.step + 1,
            params=only.merged(part, state.params),
            opt_state=opt_state,
            ema={name: only.merged(average, state.ema[name]) for name, average in averages.items()},
            halted=jnp.zeros((), jnp.bool_),
            apart=state.apart,
        )
        good = usable & ~state.halted
        new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, state)
        new = dataclasses.replace(new, halted=~good)
        if skips:
            new = dataclasses.replace(new, step=state.step + 1, halted=jnp.zeros((), jnp.bool_))
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step)),
            "finite": finite,
        } | ({} if read is None else {READ: read.all()})
        return new, metrics

    state_shardings = jax.tree.map(lambda s: s.sharding, abstract_state(task, mesh))
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(
            state_shardings,
            sharding.batch_sharding(mesh),
            *jax.tree.map(lambda a: a.sharding, tuple(frozen)),
        ),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )
