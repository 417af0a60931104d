"""Tokens are aligned with features: the loss is that of its formula, a toy reaches what it can, the run is as any other
without its projector, on any mesh and when it goes on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax import convert, models, sample
from gspn_jax.cli import user_errors
from gspn_jax.config import Config, ConfigError, DataConfig, DiffusionConfig, DistillConfig
from gspn_jax.diffusion import flow
from gspn_jax.parallel import sharding
from gspn_jax.pixels import from_uint8
from gspn_jax.runs import checkpoints
from gspn_jax.runs.checkpoints import CheckpointError
from gspn_jax.training.alignment import PROJECTOR, AlignmentTask, cosine
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import TRAINING_ONLY, create_state
from gspn_jax.training.step import make_step
from gspn_jax.training.train import diffusion_task, train
from tests.runs import saved
from tests.training import aligned, processes, tiny


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return aligned.of_digits(tmp_path_factory.mktemp("features") / "set")


def certain(features, **changes) -> Config:
    """Nothing is drawn at random but times and noise."""
    config = aligned.with_features(tiny.config(ema_decays=(0.9,)), features)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, drop_path=0.0),
        diffusion=dataclasses.replace(config.diffusion, label_dropout=0.0),
        **changes,
    )


def batches(config: Config, count: int, width: int = 6):
    rng = np.random.default_rng(2)
    for batch in tiny.batches(config, count):
        shape = (len(batch["label"]), aligned.GRID, aligned.GRID, width)
        yield batch | {"features": rng.standard_normal(shape).astype(np.float16)}


def test_the_loss_is_that_of_the_objective_and_of_cosines(features):
    config = certain(features)
    task, key = AlignmentTask(config), jax.random.key(5)
    params = jax.tree.map(lambda a: a + 0.03, task.init(jax.random.key(3)))
    (batch,) = batches(config, 1)
    loss, metrics = jax.jit(task.loss)(params, batch, key)

    _, noise_key, _ = jax.random.split(key, 3)
    time_key, noise_key = jax.random.split(noise_key)
    t = flow.sample_times(time_key, 16, "logit_normal")
    x0 = from_uint8(jnp.asarray(batch["image"]))
    noise = jax.random.normal(noise_key, x0.shape)
    x_t = (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * noise
    graphdef = models.abstract(config)[0]
    network = {name: part for name, part in params.items() if name != PROJECTOR}
    output, found = jax.jit(lambda p: models.apply(graphdef, p, x_t, 1000 * t, batch["label"], features=(0,)))(network)
    x = np.asarray(found[0], np.float64)
    for name in ("fc1", "fc2", "fc3"):
        x = x @ np.asarray(params[PROJECTOR][name]["kernel"], np.float64) + np.asarray(params[PROJECTOR][name]["bias"])
        x = x if name == "fc3" else x / (1 + np.exp(-x))
    y = batch["features"].astype(np.float64)
    cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    data = np.square(np.asarray(output, np.float64) - np.asarray(noise - x0)).mean()
    assert float(metrics["alignment"]) == pytest.approx(cosines.mean(), abs=1e-6)
    assert float(metrics["data_loss"]) == pytest.approx(data, rel=1e-5)
    assert float(loss) == pytest.approx(data + 0.5 * (1 - cosines.mean()), rel=1e-5)


def test_the_denoiser_begins_as_it_would_without_features(features):
    config = certain(features)
    task, plain = AlignmentTask(config), DiffusionTask(config)
    ours, theirs = jax.eval_shape(task.init, jax.random.key(3)), jax.eval_shape(plain.init, jax.random.key(3))
    assert ours.keys() == theirs.keys() | {PROJECTOR}
    assert jax.tree.map(lambda a: a.shape, task.shapes) == jax.tree.map(lambda a: a.shape, ours)
    assert task.forward_flops() - plain.forward_flops() == 2 * 16 * 32 * (32 + 32 + 6)
    assert isinstance(diffusion_task(config), AlignmentTask)
    assert not isinstance(diffusion_task(tiny.config()), AlignmentTask)


def test_a_zero_vector_has_no_direction():
    x = jnp.array([[[[0.0, 0.0], [3.0, 4.0], [1e-4, 0.0]]]])
    np.testing.assert_allclose(cosine(x, jnp.array([[[[1.0, 0.0]] * 3]])), [[[0, 0.6, 1]]], atol=1e-6)
    gradient = jax.grad(lambda x: cosine(x, jnp.ones_like(x)).sum())(x)
    assert np.isfinite(gradient).all()


def stepped(config, mesh, given):
    task = AlignmentTask(config)
    state, step, losses = create_state(task, mesh), make_step(task, mesh), []
    for batch in given:
        state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        losses.append([float(metrics[name]) for name in ("loss", "grad_norm", "alignment")])
    return np.array(losses), state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "accumulate"), [((1, 4, 1), 1), ((2, 2, 2), 1), ((1, 1, 2), 1), ((2, 1, 1), 2)], ids=str
)
def test_steps_are_the_same_on_a_mesh(features, mesh, accumulate):
    config = certain(features)
    config = dataclasses.replace(config, align=dataclasses.replace(config.align, hidden=64))
    one, wanted = stepped(config, saved.mesh_of(), batches(config, 4))
    if accumulate > 1:  # other draws: against the same on one device
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=accumulate))
        one, wanted = stepped(config, saved.mesh_of(), batches(config, 4))
    several, state = stepped(config, saved.mesh_of(*mesh), batches(config, 4))
    np.testing.assert_allclose(several, one, rtol=1e-4)
    kernel, own = state.params[PROJECTOR]["fc2"]["kernel"], wanted.params[PROJECTOR]["fc2"]["kernel"]
    np.testing.assert_allclose(np.asarray(kernel), np.asarray(own), rtol=1e-3, atol=1e-4)
    assert kernel.addressable_shards[0].data.size * mesh[1] * mesh[2] == kernel.size
    assert all(PROJECTOR not in average for average in state.ema.values()) and PROJECTOR not in state.exported


def near_clean(features, tmp_path, **train) -> Config:
    """Images hardly noised, so that what is a function of a patch can be told from its token."""
    config = certain(features)
    return dataclasses.replace(
        config,
        run_dir=str(tmp_path / "run"),
        data=DataConfig(flip=True, in_memory=True),
        diffusion=dataclasses.replace(config.diffusion, time_mean=-6.0, time_std=0.1),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3),
        train=dataclasses.replace(config.train, **{"batch_size": 64, "log_every": 20, "save_every": 400} | train),
    )


def alignments(run_dir) -> list[float]:
    return [json.loads(line)["alignment"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_linear_function_of_the_images_is_reached_and_other_images_features_are_not(features, tmp_path):
    """The cosine of features that the tokens determine goes to 1; of those of another image it stays where the mean
    feature of a place leaves it."""
    views = np.stack([[features.view(i, m) for m in (False, True)] for i in range(len(features))])
    shifted = aligned.write(tmp_path / "shifted", np.roll(views, 1, axis=0))
    found = []
    for name, given in (("own", features), ("other", shifted)):
        config = near_clean(given, tmp_path / name, steps=160)
        train(config)
        found.append(alignments(tmp_path / name / "run")[-1])
    assert found[0] > 0.99 and found[1] < 0.7


def contents(run_dir) -> dict:
    return {path.name: path for path in (checkpoints.folder(run_dir) / "6").iterdir() if path.is_dir()}


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit_and_leaves_its_projector_out(features, tmp_path, capsys, caplog):
    config = dataclasses.replace(near_clean(features, tmp_path, steps=6, log_every=3, save_every=3), run_dir="unused")
    whole, parts = (dataclasses.replace(config, run_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    train(whole)
    train(dataclasses.replace(parts, train=dataclasses.replace(parts.train, steps=3)))
    moved = tmp_path / "moved"
    moved.symlink_to(features.path)
    train(dataclasses.replace(parts, align=dataclasses.replace(parts.align, features=str(moved))))
    assert contents(whole.run_dir).keys() == {"params", "opt_state", "ema_0.9", TRAINING_ONLY, "meta"}
    task, mesh = AlignmentTask(config), saved.mesh_of()
    target = create_state(task, mesh)
    states = [checkpoints.read_items(checkpoints.folder(one.run_dir) / "6", target.items()) for one in (whole, parts)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert states[0][TRAINING_ONLY].keys() == {PROJECTOR} and PROJECTOR not in states[0]["params"]
    assert not np.array_equal(
        states[0][TRAINING_ONLY][PROJECTOR]["fc1"]["kernel"], target.params[PROJECTOR]["fc1"]["kernel"]
    )

    # sampled, exported and begun with, it is a run as any other
    sample.main(["--run", whole.run_dir, "--per-class", "1", "--output", str(tmp_path / "grid.png")])
    convert.main(["export", "--run", whole.run_dir, "--output", str(tmp_path / "export")])
    assert "the projector of align.features, which only training needs, is left out" in capsys.readouterr().out
    for start in (whole.run_dir, str(tmp_path / "export")):
        begun = tiny.config(tmp_path / f"from_{start[-5:]}", steps=2, ema_decays=(0.9,))
        begun = dataclasses.replace(begun, init_from=start, model=config.model)
        caplog.clear()
        train(begun)
        assert "copied" in caplog.text and " anew" not in caplog.text and PROJECTOR + "/" not in caplog.text
        assert ("without the projector of its alignment" in caplog.text) == (start == whole.run_dir)
    again = dataclasses.replace(whole, run_dir=str(tmp_path / "again"), init_from=whole.run_dir)
    caplog.clear()
    train(again)
    assert "projector/fc1/kernel" in caplog.text and "anew: not there" in caplog.text

    # with features it stays with them
    without = dataclasses.replace(whole, align=type(whole.align)())
    with pytest.raises(CheckpointError, match="was started with align"):
        train(without)


@pytest.mark.slow
def test_two_hosts_are_one_run(features, tmp_path):
    flags = ("--align.features", features.path, "--align.depth", "2", "--align.hidden", "32", "--data.flip")
    for name, place in (("alone", {"devices": 2}), ("together", {"hosts": 2})):
        processes.finish(tmp_path / name, *flags, **place)
    processes.assert_same_run(tmp_path / "together", tmp_path / "alone")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"align": {"features": "/nowhere"}}, "align.features must be a folder written by .* found no metadata.json"),
        ({"align": {"depth": 3}}, "align.depth must be a number of blocks of the model, 1 to 2, found 3"),
        ({"data": {"bad_images": "skip"}}, "data.bad_images must be 'error' with align.features"),
        ({"model": {"patch": 4}}, "a feature for each of the 2x2 tokens of the model, found 4x4 .* --tokens 2"),
        ({"data": {"image_size": 16}}, "must be of images of 16 pixels, as those that are trained on, found 8"),
    ],
)
def test_what_does_not_fit_is_said(features, changes, said):
    config = certain(features)
    for section, values in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    with pytest.raises(ConfigError, match=said):
        AlignmentTask(config).source()


def test_other_objectives_and_tasks_are_refused(features):
    config = certain(features)
    with pytest.raises(ConfigError, match=r"align.features must be None with diffusion.objective='mean_flow'"):
        AlignmentTask(dataclasses.replace(config, diffusion=DiffusionConfig(objective="mean_flow")))
    with pytest.raises(ConfigError, match=r"align.features must be None with distill.teacher"):
        dataclasses.replace(config, distill=DistillConfig(teacher="runs/teacher"))


def test_features_of_other_images_end_a_run_before_device_time(features, tmp_path, capsys, monkeypatch):
    other = aligned.write(tmp_path / "other", np.ones((5, 1, 4, 4, 6)), images="1234")
    config = dataclasses.replace(certain(features), run_dir=str(tmp_path / "run"))
    monkeypatch.setattr("gspn_jax.training.train.create_state", lambda *_: pytest.fail("device time was spent"))
    for found, data, said in (
        (other, DataConfig(), "found features of 5 with fingerprint 1234 in"),
        (
            aligned.write(tmp_path / "one", np.ones((1797, 1, 4, 4, 6))),
            DataConfig(flip=True),
            "data.flip needs features of both views",
        ),
    ):
        wrong = dataclasses.replace(aligned.with_features(config, found), data=data)
        with pytest.raises(SystemExit) as stopped, user_errors():
            train(wrong)
        assert stopped.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
