"""A run laid out for tensor cores is the run it would be without: the same steps, and checkpoints that both read."""

import dataclasses

import jax
import numpy as np
import pytest

from gspn_jax import models
from gspn_jax.config import MeshConfig
from gspn_jax.parallel import fsdp, sharding
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.sampling.sampler import Sampler
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state, create_state
from gspn_jax.training.step import make_step
from tests.training import tiny

NAMES = [str(i) for i in range(10)]


def make_config(run_dir, remat="names"):
    """36 channels are computed as 64, where that is asked for."""
    config = tiny.config(run_dir, gspn=True)
    model = dataclasses.replace(config.model, hidden=36, chunk=2, remat=remat)
    return dataclasses.replace(config, model=model, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.1))


def train(config, mesh, *, tensor_cores, monkeypatch, state=None, steps=2):
    """As on GPUs with `tensor_cores`: padded, and without loops over blocks."""
    monkeypatch.setattr(fsdp, "uses_tensor_cores", lambda mesh: tensor_cores)
    monkeypatch.setattr(fsdp, "unrolls", lambda mesh: tensor_cores)
    state = create_state(DiffusionTask(config), mesh) if state is None else state
    step, losses = make_step(DiffusionTask(config), mesh), []
    for number in range(int(state.step), int(state.step) + steps):
        rng = np.random.default_rng(number)
        batch = {"image": rng.integers(0, 256, (16, 8, 8, 1), np.uint8), "label": rng.integers(0, 10, 16, np.int32)}
        state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (1, 4, 1)], ids=str)
@pytest.mark.parametrize("first", [pytest.param(True, id="saved padded"), pytest.param(False, id="read padded")])
def test_a_run_goes_on_with_or_without_padding(mesh_shape, first, tmp_path, monkeypatch):
    config = make_config(tmp_path)
    mesh = sharding.make_mesh(MeshConfig(*mesh_shape), jax.devices()[: int(np.prod(mesh_shape))])
    wanted, losses = train(config, mesh, tensor_cores=False, monkeypatch=monkeypatch, steps=4)

    state, begun = train(config, mesh, tensor_cores=first, monkeypatch=monkeypatch)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, wanted)
    with Checkpoints(config, "f", NAMES) as saver:
        saver.save(2, state)
    with Checkpoints(config, "f", NAMES) as reader:
        _, state = reader.restore(abstract_state(DiffusionTask(config), mesh))
    state, ended = train(config, mesh, tensor_cores=not first, monkeypatch=monkeypatch, state=state)
    np.testing.assert_allclose(begun + ended, losses, rtol=2e-5)


@pytest.mark.slow
def test_samples_are_the_same_when_weights_are_cast_once(tmp_path, monkeypatch):
    """Bit for bit: what blocks would cast at every evaluation is cast before the first."""
    config = make_config(tmp_path)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, precision="params=float32,compute=bfloat16")
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.tree.map(lambda a: a + 0.02, create_state(DiffusionTask(config), mesh).params)
    once = Sampler(config, mesh)(params, [1, 2], [3, 4])
    monkeypatch.setattr(models, "prepared", lambda config, params: params)
    np.testing.assert_array_equal(once, Sampler(config, mesh)(params, [1, 2], [3, 4]))
