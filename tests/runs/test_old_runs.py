"""Run directories of earlier versions go on, and are sampled, scored and exported, as ever."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sample
from gspn_jax import convert, evaluate
from gspn_jax.config import Config, ConfigError, MeshConfig, from_dict, to_dict
from gspn_jax.evaluate import scoring
from gspn_jax.metrics import inception
from gspn_jax.parallel import sharding
from gspn_jax.runs import averages, checkpoints, manifest
from gspn_jax.runs.checkpoints import CheckpointError
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state
from gspn_jax.training.train import train
from tests.runs.saved import NAMES, save
from tests.training import tiny
from tests.training.small_extractor import SmallExtractor

VERSION = Config.VERSION
OLD_RUN = pathlib.Path(__file__).parent / "old_run"
"""Three steps of a run, written by commit cea9c11, whose configs had no version (tests/record_bits.py)."""


@pytest.fixture
def old_run(tmp_path):
    return pathlib.Path(shutil.copytree(OLD_RUN, tmp_path / "run"))


def rewrite(run_dir, step, change):
    """Changes the saved config of a checkpoint as if another version had written it."""
    where = checkpoints.folder(run_dir) / str(step)
    path = where / "meta" / "metadata"
    meta = json.loads(path.read_text())
    change(meta["config"])
    path.write_text(json.dumps(meta))
    manifest.write(where)


def test_an_old_run_goes_on(old_run):
    step, config = checkpoints.read_config(old_run)
    before = json.loads((old_run / "metrics.jsonl").read_text().splitlines()[-1])
    config = dataclasses.replace(
        config, run_dir=str(old_run), mesh=MeshConfig(), train=dataclasses.replace(config.train, steps=5)
    )
    train(config)
    lines = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    assert (step, before["step"]) == (3, 3) and [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert checkpoints.steps(old_run) == [3, 5]


def test_an_old_run_is_sampled_scored_and_exported(old_run, tmp_path, monkeypatch):
    sample.main(["--run", str(old_run), "--num-samples", "6", "--output", str(tmp_path / "samples.npz")])
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (6, 8, 8, 1) and file["arr_0"].std() > 10
    monkeypatch.setattr(scoring, "Extractor", SmallExtractor)
    save_file(inception.random_state_dict(0), tmp_path / "inception.safetensors")
    evaluate.main(
        [
            "--run",
            str(old_run),
            "--num-samples",
            "6",
            "--inception",
            str(tmp_path / "inception.safetensors"),
            "--output",
            str(tmp_path / "scores.json"),
        ]
    )
    assert json.loads((tmp_path / "scores.json").read_text())["metrics"]["is"] >= 1
    convert.main(["export", "--run", str(old_run), "--output", str(tmp_path / "exported")])
    _, config = checkpoints.read_config(old_run)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = checkpoints.restore_params(old_run, 3, config, mesh)
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    assert sorted(t.tobytes() for t in tensors.values()) == sorted(
        np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)
    )


def test_a_field_that_is_new_has_its_default_in_an_old_run(tmp_path):
    """It stopped every old run, which was compared as it was saved."""
    save(tiny.config(tmp_path), 4)
    rewrite(tmp_path, 4, lambda config: config["model"].pop("skip"))
    target = abstract_state(DiffusionTask(tiny.config(tmp_path)), sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    with Checkpoints(tiny.config(tmp_path), "f", NAMES) as restorer:
        assert restorer.restore(target)[0] == 4
    changed = tiny.config(tmp_path)
    changed = dataclasses.replace(changed, model=dataclasses.replace(changed.model, skip=True))
    with (
        Checkpoints(changed, "f", NAMES) as restorer,
        pytest.raises(CheckpointError, match=r"started with model.skip False, found True"),
    ):
        restorer.restore(target)


def test_a_renamed_field_is_migrated(tmp_path, monkeypatch):
    save(tiny.config(tmp_path), 4)
    rewrite(tmp_path, 4, lambda config: config["model"].update(width=config["model"].pop("hidden")))
    with pytest.raises(ConfigError, match=r"model.width must be one of .*hidden"):
        checkpoints.read_config(tmp_path)

    def renamed(values):
        model = dict(values["model"])
        return values | {"model": model | {"hidden": model.pop("width")}} if "width" in model else values

    monkeypatch.setattr(Config, "VERSION", VERSION + 1)
    monkeypatch.setitem(
        Config.MIGRATIONS,
        VERSION,
        lambda values: {
            **values,
            "model": {name: value for name, value in renamed(values)["model"].items() if name != "width"},
        },
    )
    assert checkpoints.read_config(tmp_path)[1] == tiny.config(tmp_path)


def test_what_the_first_version_meant():
    for saved, means in ((None, "preset"), (0, None), (3, 3), ([2, 0], (2, None))):
        assert from_dict({"run_dir": "r", "model": {"chunk": saved}}).model.chunk == means
        current = from_dict({"run_dir": "r", "model": {"chunk": means}, "version": VERSION})
        assert from_dict(json.loads(json.dumps(to_dict(current)))) == current and current.model.chunk == means
    other_order = from_dict({"run_dir": "r", "train": {"precision": "compute=float32,params=float32"}})
    assert other_order.train.precision == "params=float32,compute=float32"


def test_a_config_of_a_later_version_gets_a_sentence(tmp_path):
    save(tiny.config(tmp_path), 4)
    rewrite(tmp_path, 4, lambda config: config.update(version=VERSION + 1))
    with pytest.raises(ConfigError, match=rf"version of the saved config must be 1 to {VERSION}.*found {VERSION + 1}"):
        checkpoints.read_config(tmp_path)


@pytest.mark.slow
def test_the_backend_is_no_part_of_a_checkpoint(tmp_path):
    config = tiny.config(tmp_path, gspn=True)
    with_backend = dataclasses.replace(config, model=dataclasses.replace(config.model, backend="scan"))
    assert from_dict(to_dict(with_backend)) == config and "backend" not in to_dict(with_backend)["model"]
    save(config, 4)

    def on_a_gpu(saved):  # as version 1 saved a run with --model.backend mosaic_gpu
        del saved["version"]
        saved["model"]["backend"] = "mosaic_gpu"

    rewrite(tmp_path, 4, on_a_gpu)
    sample.main(["--run", str(tmp_path), "--per-class", "1", "--classes", "3", "--output", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").exists()


def test_averages_have_names_with_all_digits(tmp_path):
    close = (0.9999999, 0.9999995)
    assert [averages.name(decay) for decay in (*close, 0.9999, 0.9, 0.0)] == [
        "0.9999999",
        "0.9999995",
        "0.9999",
        "0.9",
        "0",
    ]
    config = tiny.config(tmp_path / "new", ema_decays=close)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    state = save(config, 4, mesh=mesh)
    assert set(state.ema) == {"0.9999999", "0.9999995"}
    for decay in close:
        found = checkpoints.restore_params(tmp_path / "new", 4, config, mesh, ema_decay=decay)
        jax.tree.map(np.testing.assert_array_equal, found, state.ema[averages.name(decay)])
    # as it was named before
    old = tiny.config(tmp_path / "old", ema_decays=close[:1])
    state = save(old, 4, mesh=mesh)
    where = checkpoints.folder(tmp_path / "old") / "4"
    (where / "ema_0.9999999").rename(where / "ema_1")
    manifest.write(where)
    found = checkpoints.restore_params(tmp_path / "old", 4, old, mesh)
    jax.tree.map(np.testing.assert_array_equal, found, state.ema["0.9999999"])
    with Checkpoints(old, "f", NAMES) as restorer:
        _, restored = restorer.restore(abstract_state(DiffusionTask(old), mesh))
    jax.tree.map(np.testing.assert_array_equal, restored.ema, state.ema)
