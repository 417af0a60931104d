"""Autoguidance by the model of another run: against a loop of its own, on meshes, by the command, and refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample
from gspn_jax import models
from gspn_jax.config import Config, ConfigError, DiffusionConfig, SamplerConfig
from gspn_jax.runs import checkpoints
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.sampling.sampler import Sampler
from gspn_jax.sampling.weights import Weights, guide_of
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import create_state
from tests.runs.saved import NAMES, mesh_of
from tests.training import tiny


def model(run, *, hidden=32, **changes) -> Config:
    config = tiny.config(run, steps=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=hidden, heads=2))
    return dataclasses.replace(config, **changes)


def saved(config: Config) -> str:
    """A run directory of the model that is not trained, with other parameters than the zeros it begins with."""
    state = create_state(DiffusionTask(config), mesh_of())
    leaves, structure = jax.tree.flatten(state.params)
    rng = np.random.default_rng(0)
    params = [leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    averages = {name: jax.tree.map(lambda p: 1.1 * p, jax.tree.unflatten(structure, params)) for name in state.ema}
    state = dataclasses.replace(state, params=jax.tree.unflatten(structure, params), ema=averages)
    with Checkpoints(config, "f", NAMES) as saver:
        saver.save(2, state)
    return config.run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(a run, that of a smaller model)."""
    folder = tmp_path_factory.mktemp("guide")
    return saved(model(folder / "main")), saved(model(folder / "guide", hidden=16))


def read(run, mesh, **which):
    step, config = checkpoints.read_config(run)
    return Weights(run, step, config, mesh, **which)


EULER = SamplerConfig(name="euler", steps=3, guidance_scale=2.5)


def drawn(runs, mesh, sampler, count=6):
    """Float images of a guided model."""
    main, guide = (read(run, mesh, ema=0.0) for run in runs)
    config = dataclasses.replace(main.config, sampler=sampler)
    draw = Sampler(config, mesh, guide=guide.config, decode=np.asarray)
    return draw((main.params, guide.params), np.arange(count), np.arange(count))


def test_images_are_those_of_a_loop_over_both_models(runs):
    mesh, labels = mesh_of(), np.arange(6)
    found = drawn(runs, mesh, EULER)
    networks = []
    for run in runs:
        weights = read(run, mesh, ema=0.0)
        graphdef = models.abstract(weights.config)[0]
        networks.append((graphdef, weights.params))
    key = jax.random.wrap_key_data(np.zeros(2, np.uint32), impl="threefry2x32")
    keys = [jax.random.fold_in(jax.random.fold_in(key, number), 0) for number in labels]
    x = np.stack([np.asarray(jax.random.normal(key, (8, 8, 1)), np.float64) for key in keys])
    for t in (1.0, 2 / 3, 1 / 3):
        told = jnp.full(6, 1000 * t, jnp.float32)
        own, other = (
            np.asarray(models.apply(graphdef, params, jnp.asarray(x, jnp.float32), told, labels), np.float64)
            for graphdef, params in networks
        )
        x = x - (other + 2.5 * (own - other)) / 3
    assert np.abs(x).max() > 0.1
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4 * np.abs(x).max())


@pytest.mark.parametrize("mesh", [(1, 4, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_a_guide_is_split_over_a_mesh_like_the_model(runs, mesh):
    found, wanted = drawn(runs, mesh_of(*mesh), EULER, count=8), drawn(runs, mesh_of(), EULER, count=8)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_a_guide_that_is_the_model_changes_nothing(runs):
    one = drawn((runs[0], runs[0]), mesh_of(), EULER)
    other = drawn(runs, mesh_of(), dataclasses.replace(EULER, guidance_scale=1.0))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_the_command_draws_with_a_guide_and_notes_it(runs, tmp_path):
    call = ["--run", runs[0], "--num-samples", "8", "--sampler.guidance-scale", "2"]
    for name, flags in (("guided", ["--sampler.guide", runs[1], "--sampler.guide-ema", "0.99"]), ("plain", [])):
        sample.main([*call, *flags, "--output", str(tmp_path / f"{name}.npz")])
    with np.load(tmp_path / "guided.npz") as guided, np.load(tmp_path / "plain.npz") as plain:
        assert (guided["arr_0"] != plain["arr_0"]).any()
        noted, before = (json.loads(str(file["settings"])) for file in (guided, plain))
    assert noted["guide"]["run"] == runs[1] and noted["guide"]["ema_decay"] == 0.99
    assert len(noted["guide"]["parameters_sha256"]) == 64
    assert "guide" not in before and "guide" not in before["sampler"] and noted["sampler"] == before["sampler"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"num_classes": 11}}, "data.num_classes must be 10, found 11 in"),
        ({"data": {"image_size": 16}}, "data.image_size must be 8, found 16 in"),
        ({"data": {"channels": 3}}, "data.channels must be 1, found 3 in"),
        ({"data": {"source": "latents", "path": "x"}}, "latents must be False, found True in"),
        ({"diffusion": {"objective": "ddpm"}}, "diffusion.objective must be 'flow', found 'ddpm' in"),
    ],
)
def test_a_guide_of_other_images_is_refused(tmp_path, monkeypatch, changes, said):
    own = model(tmp_path)
    other = dataclasses.replace(
        own, **{section: dataclasses.replace(getattr(own, section), **fields) for section, fields in changes.items()}
    )
    monkeypatch.setattr(checkpoints, "read_config", lambda run, step: (2, other))
    with pytest.raises(ConfigError, match=f"sampler.guide must be a model of the same classes, .*: {said} runs/small"):
        guide_of(SamplerConfig(guide="runs/small"), own, mesh_of())


def test_another_schedule_is_another_objective(tmp_path, monkeypatch):
    own = model(tmp_path, diffusion=DiffusionConfig())
    other = dataclasses.replace(own, diffusion=DiffusionConfig(beta_schedule="cosine"))
    monkeypatch.setattr(checkpoints, "read_config", lambda run, step: (2, other))
    with pytest.raises(ConfigError, match=r"diffusion.beta_schedule must be 'linear', found 'cosine'"):
        guide_of(SamplerConfig(guide="x"), own, mesh_of())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sampler.guide", "/none"], "no checkpoint in /none/checkpoints"),
        (["--sampler.guide-ema", "0.5"], "the EMA decay must be one that the run kept (0.9, 0.99), or 0"),
        (["--sampler.guide-step", "7"], "no checkpoint of step 7"),
        (["--sampler.guide-ema-width", "0.1"], "is made of power-function averages, which"),
        (["--ema-width", "0.1"], "which"),
        (["--ema-width", "0.5"], "--ema-width must be greater than 0 and at most 0.2887"),
        (["--ema-width", "0.1", "--ema", "0.9"], "--ema and --ema-width are one average, found 0.9 and 0.1"),
    ],
)
def test_a_wrong_guide_gets_one_sentence_and_code_2(runs, flags, said, capsys):
    given = [] if "--sampler.guide" in flags or flags[0] == "--ema-width" else ["--sampler.guide", runs[1]]
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--run", runs[0], *given, *flags])
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in shown and "Traceback" not in shown


def test_a_run_that_trains_has_no_guide(tmp_path):
    config = model(tmp_path, sampler=SamplerConfig(guide="runs/small"))
    with pytest.raises(ConfigError, match=r"sampler.guide must be None in training: it is for samples of a run, found"):
        DiffusionTask(config)
