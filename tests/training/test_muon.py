"""Muon on stacks of blocks: optax's on each matrix, AdamW on the rest, the same on any mesh, resumed to the bit."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gspn_jax import models
from gspn_jax.config import ConfigError, MeshConfig, ModelConfig, OptimizerConfig
from gspn_jax.models.parameters import by_path
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.training import muon
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.optimizer import learning_rate, make_optimizer
from gspn_jax.training.state import abstract_state, create_state
from gspn_jax.training.step import make_step
from gspn_jax.training.train import train
from tests.training import tiny

SETTINGS = OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=2, weight_decay=0.1, b2=0.9, clip_norm=1e9)


def config(run_dir="unused", *, gspn=False, mesh=None, hidden=32, **train):
    """AdamW of a gradient near 0 is not the same on two meshes (see `test_step`): momentum alone is compared there."""
    built = tiny.config(run_dir, gspn=gspn, mesh=mesh, **train)
    return dataclasses.replace(built, model=dataclasses.replace(built.model, hidden=hidden), optimizer=SETTINGS)


def test_which_parameters_go_where():
    dit, gspn = (models.abstract(config(gspn=which))[1] for which in (False, True))
    block = {"modulation/linear": (32, 32), "mixer/qkv": (32, 32), "mixer/proj": (32, 32), "mlp/fc1": (32, 128)}
    block["mlp/fc2"] = (128, 32)
    assert muon.matrices(dit) == {f"trunk/blocks/{name}/kernel": size for name, size in block.items()}
    square = ("mixer/in_proj", "mixer/out_proj", "out_proj")
    narrow = {"mixer/proxy": (32, 2), "mixer/gates": (2, 32), "mixer/lam": (2, 32), "mixer/out_gate": (2, 32)}
    both = {f"trunk/{stack}/{name}/kernel": (32, 32) for stack in ("in_blocks", "out_blocks") for name in square}
    both |= {
        f"trunk/{stack}/{name}/kernel": size for stack in ("in_blocks", "out_blocks") for name, size in narrow.items()
    }
    assert muon.matrices(gspn) == both | {"trunk/out_blocks/join/kernel": (64, 32)}
    shared = dataclasses.replace(config(gspn=True), model=ModelConfig(preset="GSPN-S/2", hidden=32, depth=2, groups=1))
    assert not any("gates" in name for name in muon.matrices(models.abstract(shared)[1]))  # a column is no matrix
    line = muon.describe(dit)
    assert "trunk/blocks/mixer/qkv/kernel, " in line and line.endswith("; AdamW trains the rest")


def runs(optimizer):
    """run(params, gradients) -> params after a step a gradient."""
    update = jax.jit(optimizer.update)

    def run(params, gradients):
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return run


def test_updates_are_optaxs_on_each_matrix_and_adamws_on_the_rest():
    """Four steps of random gradients; every layer, and every matrix between its axes, for itself. A part that is not
    trained, None in its place, changes nothing of the others."""
    task = DiffusionTask(config())
    shapes = task.shapes | {"label_embed": {"embedding": None}}
    rng = np.random.default_rng(0)
    params, *gradients = (
        jax.tree.map(lambda own: jnp.asarray(rng.standard_normal(own.shape), jnp.float32), shapes) for _ in range(5)
    )
    found = by_path(runs(task.optimizer())(params, gradients))
    matrices, rate = muon.matrices(task.shapes), learning_rate(SETTINGS, 20)
    alone = runs(optax.contrib.muon(rate, beta=0.95, weight_decay=0.1, consistent_rms=0.2))
    before, drawn = by_path(params), [by_path(gradient) for gradient in gradients]

    def cut(array, inputs, outputs):
        """[L, inputs, ..., outputs] as matrices [n, inputs, outputs]."""
        parts = np.asarray(array).reshape(2, inputs, -1, outputs)
        return np.moveaxis(parts, 2, 1).reshape(-1, inputs, outputs)

    for name in ("trunk/blocks/mixer/qkv/kernel", "trunk/blocks/mlp/fc2/kernel"):
        stacks = [cut(array, *matrices[name]) for array in (found[name], before[name], *(one[name] for one in drawn))]
        for ours, first, *rest in zip(*stacks, strict=True):
            wanted = alone({"w": first}, [{"w": gradient} for gradient in rest])["w"]
            np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)
    rest = {name: leaf for name, leaf in before.items() if name not in matrices}
    plain = runs(optax.adamw(rate, b1=0.9, b2=0.9, weight_decay=0.1))
    wanted = plain(rest, [{name: gradient[name] for name in rest} for gradient in drawn])
    for name in rest:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


def steps_on(mesh_shape, settings, count=6):
    mesh = sharding.make_mesh(MeshConfig(*mesh_shape), jax.devices()[: int(np.prod(mesh_shape))])
    task = DiffusionTask(settings)
    state, step, losses = create_state(task, mesh), make_step(task, mesh), []
    for batch in tiny.batches(settings, count):
        state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
    return losses, state


def test_the_moment_is_split_as_the_parameters_are():
    """Known before anything is allocated; Adam's two moments are those of the rest alone."""
    task = DiffusionTask(config(hidden=36))
    state = abstract_state(task, sharding.make_mesh(MeshConfig(1, 8, 1)))
    params = by_path(state.params)
    for name, leaf in by_path(state.opt_state).items():
        path = name.partition("/mu/")[2] or name.partition("/nu/")[2]
        if path:
            assert (leaf.shape, leaf.sharding) == (params[path].shape, params[path].sharding)
            assert ("/muon/" in name) == (path in muon.matrices(task.shapes)), name
    moments = [name for name in by_path(state.opt_state) if "/mu/" in name or "/nu/" in name]
    assert len(moments) == 2 * len(params) - len(muon.matrices(task.shapes))
    assert "fsdp" in by_path(state.opt_state)[next(n for n in moments if "qkv/kernel" in n)].sharding.spec


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 4, 1)], ids=str)
def test_over_a_mesh_steps_are_those_of_one_device_and_the_state_is_split(mesh):
    """At a width that is stored padded: 36 in 8 parts."""
    settings = config(hidden=36)
    wanted, alone = steps_on((1, 1, 1), settings)
    found, state = steps_on(mesh, settings)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
    for name, leaf in by_path(jax.device_get(state.params)).items():
        own = by_path(alone.params)[name]
        np.testing.assert_allclose(leaf[tuple(map(slice, own.shape))], own, rtol=1e-4, atol=1e-4, err_msg=name)
    moments = {name: leaf for name, leaf in by_path(state.opt_state).items() if "mu" in name and "qkv/kernel" in name}
    assert moments and all("fsdp" in leaf.sharding.spec for leaf in moments.values())
    abstract = abstract_state(DiffusionTask(settings), state.step.sharding.mesh).opt_state
    jax.tree.map(lambda leaf, s: np.testing.assert_(leaf.sharding == s.sharding), state.opt_state, abstract)


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit_and_no_other_optimizer_takes_it_up(tmp_path, monkeypatch, caplog):
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh: make(mesh, jax.devices()[:1]))
    settings = config(tmp_path / "run", steps=4, save_every=2)
    train(settings)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(checkpoints.folder(tmp_path / "again") / "4")
    again = dataclasses.replace(settings, run_dir=str(tmp_path / "again"))
    train(again)
    one, other = (
        checkpoints.restore_params(which.run_dir, 4, which, make(MeshConfig(), jax.devices()[:1]), ema_decay=0.0)
        for which in (settings, again)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    changed = dataclasses.replace(again, optimizer=OptimizerConfig())
    with pytest.raises(checkpoints.CheckpointError, match=r"was started with optimizer.name 'muon', found 'adamw'"):
        train(changed)


def test_what_has_no_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer.name must be 'adamw' for a network without stacks of blocks"):
        make_optimizer(SETTINGS, 10, shapes={"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)})
