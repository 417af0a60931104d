"""A student that learns from a teacher: its loss is that of its formula, the teacher stays as it is, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax import models
from gspn_jax.config import Config, ConfigError, DiffusionConfig, DistillConfig
from gspn_jax.diffusion import flow
from gspn_jax.parallel import sharding
from gspn_jax.pixels import from_uint8
from gspn_jax.runs import checkpoints
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.distillation import DistillationTask
from gspn_jax.training.state import create_state
from gspn_jax.training.step import make_step
from gspn_jax.training.train import train
from tests.runs import saved
from tests.training import tiny

WEIGHTS = {"prediction_weight": 2.0, "features": (0, 1), "feature_weight": 0.5, "data_weight": 0.25}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    config = tiny.config(tmp_path_factory.mktemp("teacher") / "run", ema_decays=(0.01, 0.02))
    saved.save(config, 4)
    return config


def student(teacher: Config, **changes) -> Config:
    """The teacher's network with line scans, without what is drawn at random but for times and noise."""
    config = dataclasses.replace(
        teacher,
        run_dir="unused",
        model=dataclasses.replace(teacher.model, mixer="gspn", heads=None, drop_path=0.0),
        diffusion=dataclasses.replace(teacher.diffusion, label_dropout=0.0),
        distill=DistillConfig(teacher=teacher.run_dir, **WEIGHTS),
    )
    return dataclasses.replace(config, **changes)


def test_the_loss_is_that_of_predictions_features_and_data(teacher, caplog):
    config = student(teacher)
    task, mesh = DistillationTask(config), saved.mesh_of()
    params = jax.tree.map(lambda a: a + 0.03, task.init(jax.random.key(3)))
    (batch,), key = tiny.batches(config, 1), jax.random.key(5)
    loss, metrics = jax.jit(task.loss)(params, batch, key, *task.frozen(mesh))

    _, noise_key, _ = jax.random.split(key, 3)
    time_key, noise_key = jax.random.split(noise_key)
    t = flow.sample_times(time_key, 16, "logit_normal")
    x0 = from_uint8(jnp.asarray(batch["image"]))
    noise = jax.random.normal(noise_key, x0.shape)
    x_t = (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * noise
    theirs = checkpoints.restore_params(teacher.run_dir, 4, teacher, mesh)

    def called(config, params):
        graphdef = models.abstract(config)[0]
        output, found = jax.jit(lambda p: models.apply(graphdef, p, x_t, 1000 * t, batch["label"], features=(0, 1)))(
            params
        )
        return [np.asarray(a, np.float64) for a in (output, found[0], found[1])]

    (output, *tokens), (wanted, *features) = called(config, params), called(teacher, theirs)
    prediction = np.square(output - wanted).mean()
    feature = np.mean([np.square(a - b).mean() / np.square(b).mean() for a, b in zip(tokens, features, strict=True)])
    data = np.square(output - np.asarray(noise - x0)).mean()
    found = [float(metrics[name]) for name in ("prediction_loss", "feature_loss", "data_loss")]
    np.testing.assert_allclose(found, [prediction, feature, data], rtol=1e-5)
    assert float(loss) == pytest.approx(2 * prediction + 0.5 * feature + 0.25 * data, rel=1e-5)
    assert "the teacher's tokens have positions and the student's have none" in caplog.text


def stepped(config, mesh, steps=2):
    """(losses of the first steps, the teacher's parameters afterwards)."""
    task = DistillationTask(config)
    frozen = task.frozen(mesh)
    state, step, losses = create_state(task, mesh), make_step(task, mesh, frozen), []
    for batch in tiny.batches(config, steps):
        state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)), *frozen)
        losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return losses, frozen[0]


@pytest.mark.slow
def test_the_teacher_is_split_as_the_student_and_gives_the_same_on_a_mesh(teacher):
    one, _ = stepped(student(teacher), saved.mesh_of())
    mesh = saved.mesh_of(1, 4, 1)
    split, theirs = stepped(student(teacher), mesh)
    np.testing.assert_allclose(split, one, rtol=1e-4)
    kernel = theirs["trunk"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert theirs["final"]["linear"]["kernel"].sharding.is_fully_replicated


@pytest.mark.slow
def test_a_student_begins_with_the_teachers_other_weights_and_leaves_it_alone(teacher, tmp_path, caplog):
    from gspn_jax import sample

    before = {path: path.read_bytes() for path in checkpoints.folder(teacher.run_dir).rglob("*") if path.is_file()}
    config = student(teacher, run_dir=str(tmp_path / "run"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2, save_every=2, only="mixer"))
    train(config)
    assert before == {path: path.read_bytes() for path in before}
    assert "trunk/blocks/mixer/in_proj/kernel" in caplog.text and "mixer gspn, attention there" in caplog.text
    mesh = saved.mesh_of()
    ours, theirs = (
        checkpoints.restore_params(one.run_dir, step, one, mesh) for one, step in ((config, 2), (teacher, 4))
    )
    assert ours["trunk"]["blocks"]["mixer"].keys() != theirs["trunk"]["blocks"]["mixer"].keys()
    jax.tree.map(np.testing.assert_array_equal, ours["trunk"]["blocks"]["mlp"], theirs["trunk"]["blocks"]["mlp"])
    items = {path.name for path in (checkpoints.folder(config.run_dir) / "2").iterdir() if path.is_dir()}
    assert items == {"params", "opt_state", "ema_0.01", "ema_0.02", "meta"}  # the teacher is not saved
    sample.main(["--run", config.run_dir, "--per-class", "1", "--output", str(tmp_path / "grid.png")])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"diffusion": DiffusionConfig(objective="ddpm")},
            r"diffusion.objective must be that of the teacher .* 'flow'",
        ),
        (
            {"diffusion": DiffusionConfig(objective="mean_flow")},
            r"must be None with diffusion.objective='mean_flow', which differentiates the denoiser",
        ),
        ({"distill": DistillConfig(teacher="/nowhere")}, "no checkpoint in /nowhere"),
        ({"distill": DistillConfig(features=(0,))}, r"distill.teacher must be the run directory .*found None"),
    ],
)
def test_a_teacher_that_does_not_fit_is_said(teacher, changes, said):
    with pytest.raises((ConfigError, checkpoints.CheckpointError), match=said):
        DistillationTask(student(teacher, **changes)).given()


def test_features_are_of_blocks_that_both_have(teacher):
    far = dataclasses.replace(student(teacher).distill, features=(0, 2))
    with pytest.raises(ConfigError, match=r"numbers of blocks in 0..1, .* found \(0, 2\)"):
        DistillationTask(student(teacher, distill=far)).given()
    wide = dataclasses.replace(student(teacher).model, hidden=64)
    with pytest.raises(ConfigError, match=r"a student of the teacher's width and patch, \(32, 2\), found \(64, 2\)"):
        DistillationTask(student(teacher, model=wide)).given()
    assert DiffusionTask(student(teacher)).forward_flops() < DistillationTask(student(teacher)).forward_flops()
