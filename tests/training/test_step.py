"""A training step: the same on every mesh, exact about EMA and accumulation, unharmed by a loss that is not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gspn_jax import models
from gspn_jax.config import MeshConfig, OptimizerConfig
from gspn_jax.parallel import sharding
from gspn_jax.runs import averages
from gspn_jax.training import ema
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.optimizer import learning_rate, make_optimizer
from gspn_jax.training.state import create_state
from gspn_jax.training.step import make_gradient, make_loss, make_step
from tests.training import tiny
from tests.training.tiny import batches

WIDTH = 36
"""A multiple of 4 and not of 8: with mesh.fsdp = 8 weights are padded."""
MESHES = [(2, 2, 2)]
OTHER_MESHES = [
    (1, 8, 1),
    (2, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (4, 1, 1),
    (1, 4, 1),
    (1, 1, 4),
    (2, 2, 1),
    (2, 1, 2),
    (1, 2, 2),
    (8, 1, 1),
    (1, 1, 8),
    (4, 2, 1),
    (4, 1, 2),
    (2, 4, 1),
    (1, 4, 2),
    (2, 1, 4),
    (1, 2, 4),
]


def run(config, mesh_shape, steps=20):
    mesh = sharding.make_mesh(MeshConfig(*mesh_shape), jax.devices()[: int(np.prod(mesh_shape))])
    task = DiffusionTask(config)
    state, step, losses = create_state(task, mesh), make_step(task, mesh), []
    for batch in batches(config, steps):
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        state, metrics = step(state, batch)
        losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(losses), jax.device_get(state)


def assert_same_run(gspn, mesh_shape, remat="none", reference={}):  # noqa: B006 - one device's run, kept between tests
    config = tiny.config(gspn=gspn)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=WIDTH))
    if gspn not in reference:
        reference[gspn] = run(config, (1, 1, 1))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    losses, state = run(config, mesh_shape)
    expected_losses, expected = reference[gspn]
    np.testing.assert_allclose(losses[:, 0], expected_losses[:, 0], rtol=2e-5)
    np.testing.assert_allclose(losses[:, 1], expected_losses[:, 1], rtol=1e-4)  # Adam does not see a gradient's scale
    assert state.step == 20
    # Adam divides by the gradient's own size: the rounding of a gradient near 0 moves a parameter by up to the
    # learning rate, so parameters are compared with the distance that 20 steps can cover (20 * 1e-3)
    for tree, wanted in ((state.params, expected.params), (state.ema["0.99"], expected.ema["0.99"])):
        jax.tree.map(assert_same_weight, tree, wanted)


def assert_same_weight(found, wanted):
    """`found` may be padded, by zeros."""
    own = tuple(slice(size) for size in wanted.shape)
    np.testing.assert_allclose(found[own], wanted, rtol=1e-4, atol=1e-4)
    found = found.copy()
    found[own] = 0
    assert not found.any()


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_twenty_steps_are_the_same_on_every_mesh(mesh_shape):
    assert_same_run(True, mesh_shape)


@pytest.mark.slow
@pytest.mark.parametrize("gspn", [True, False])
@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("mesh_shape", [(1, 8, 1), (1, 4, 2)], ids=str)
def test_twenty_steps_are_the_same_with_remat(gspn, remat, mesh_shape):
    assert_same_run(gspn, mesh_shape, remat=remat)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", OTHER_MESHES, ids=str)
def test_twenty_steps_are_the_same_on_every_other_mesh(mesh_shape):
    assert_same_run(True, mesh_shape)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", MESHES + OTHER_MESHES, ids=str)
def test_twenty_steps_of_the_dit_are_the_same_on_every_mesh(mesh_shape):
    assert_same_run(False, mesh_shape)


@pytest.fixture(scope="module")
def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def test_training_lowers_the_loss(one_device):
    config = tiny.config(steps=60)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-3))
    task = DiffusionTask(config)
    state, step, losses = create_state(task, one_device), make_step(task, one_device), []
    white = {"image": np.full((16, 8, 8, 1), 255, np.uint8), "label": np.zeros(16, np.int32)}
    white = jax.device_put(white, sharding.batch_sharding(one_device))
    for _ in range(60):
        state, metrics = step(state, white)
        losses.append(float(metrics["loss"]))
    # the velocity noise - 1 has mean square 2; one who has learned its mean only is left with the noise's variance, 1
    assert np.mean(losses[:3]) == pytest.approx(2, abs=0.15) and np.mean(losses[-5:]) < 0.8


def test_accumulated_gradient_is_the_mean_over_micro_batches():
    config = tiny.config(accumulate=4)
    task = DiffusionTask(config)
    params = jax.tree.map(lambda p: p + 0.02, models.init(config, 0))
    batch, key = next(batches(config, 1)), jax.random.key(3)
    (loss, _), grads = jax.jit(make_gradient(task))(params, batch, key)

    single = jax.jit(jax.value_and_grad(make_loss(task), has_aux=True))
    parts = []
    for i, micro_key in enumerate(jax.random.split(key, 4)):  # images i, i+4, i+8, ...: each device keeps its own
        parts.append(single(params, {k: v[i::4] for k, v in batch.items()}, micro_key))
    np.testing.assert_allclose(loss, np.mean([p[0][0] for p in parts]), rtol=1e-5)
    mean = jax.tree.map(lambda *g: sum(g) / 4, *[p[1] for p in parts])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, mean)


def test_averages_follow_their_recurrence():
    rng = np.random.default_rng(0)
    path = rng.normal(size=(200, 3)).astype(np.float32)
    kept = ema.init({"w": jnp.asarray(path[0])}, ["0.9", "0.999"])
    wanted = {0.9: path[0].astype(np.float64), 0.999: path[0].astype(np.float64)}
    for step, value in enumerate(path[1:]):
        kept = ema.update(kept, {"w": jnp.asarray(value)}, jnp.asarray(step))
        for decay in wanted:
            d = min(decay, (1 + step) / (10 + step))
            wanted[decay] = d * wanted[decay] + (1 - d) * value
    for decay, expected in wanted.items():
        np.testing.assert_allclose(kept[averages.name(decay)]["w"], expected, rtol=1e-4, atol=1e-6)


def test_learning_rate_is_warm_up_then_half_cosine():
    schedule = learning_rate(OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-6, warmup_steps=10), 110)
    steps = np.arange(111)
    wanted = np.where(
        steps < 10, 1e-4 * steps / 10, 1e-6 + (1e-4 - 1e-6) * 0.5 * (1 + np.cos(np.pi * (steps - 10) / 100))
    )
    np.testing.assert_allclose([float(schedule(s)) for s in steps], wanted, rtol=1e-4, atol=1e-9)
    assert float(learning_rate(OptimizerConfig(learning_rate=1e-4), 10)(0)) == pytest.approx(1e-4)


def test_update_is_adamw_of_the_clipped_gradient():
    config = OptimizerConfig(learning_rate=0.1, final_learning_rate=0.1, clip_norm=1.0, weight_decay=0.01)
    optimizer = make_optimizer(config, 100)
    w, g = np.array([3.0, -2.0]), np.array([30.0, 40.0])  # norm 50 is clipped to 1: (0.6, 0.8)
    params = {"w": jnp.asarray(w, jnp.float32)}
    state = optimizer.init(params)
    updates, _ = optimizer.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
    clipped = g / 50
    wanted = w - 0.1 * (clipped / (np.abs(clipped) + 1e-8) + 0.01 * w)  # Adam's first step: m/sqrt(v) is the sign
    np.testing.assert_allclose(optax.apply_updates(params, updates)["w"], wanted, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_and_halts(one_device):
    config = tiny.config()
    task = DiffusionTask(config)
    state, step = create_state(task, one_device), make_step(task, one_device)
    good = [jax.device_put(b, sharding.batch_sharding(one_device)) for b in batches(config, 2)]
    state, metrics = step(state, good[0])
    assert metrics["finite"] and not state.halted
    broken = jax.tree.map(lambda p: p.at[...].set(jnp.nan), state.params)
    before = jax.device_get(dataclasses.replace(state, params=broken))
    state, metrics = step(dataclasses.replace(state, params=broken), good[1])
    assert not metrics["finite"] and state.halted and state.step == 1
    for name in ("opt_state", "ema", "step"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(jax.device_get(state), name))
    healed = dataclasses.replace(state, params=jax.tree.map(jnp.zeros_like, state.params))
    after, metrics = step(healed, good[1])  # halted: not even a finite step is applied
    assert metrics["finite"] and after.halted and after.step == 1
