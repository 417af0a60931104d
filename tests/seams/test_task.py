"""A task of one's own (`toy_task`): it trains, goes on, is scored and read, on one device and on a mesh."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gspn_jax import cli
from gspn_jax.config import ConfigError, MeshConfig
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.runs.evaluations import Record
from gspn_jax.training.train import train_task
from tests.seams.toy_task import ToyConfig, ToyModel, ToyTask, toy


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def devices(monkeypatch):
    """The mesh is built of so many devices."""
    make = sharding.make_mesh

    def use(count):
        monkeypatch.setattr(sharding, "make_mesh", lambda config: make(config, jax.devices()[:count]))

    return use


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on one device, to its end, and its parameters."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda config: make(config, jax.devices()[:1]))
        train_task(ToyTask(toy(folder)))
    return folder


def test_a_task_trains_is_scored_and_keeps_its_best_checkpoint(run):
    losses = [line["loss"] for line in lines(run) if "loss" in line]
    assert losses[0] > 3 and losses[-1] < losses[0] - 0.5  # without the teacher's offset it begins at 2.3
    scores = {line["step"]: line["eval/accuracy"] for line in lines(run) if "eval/accuracy" in line}
    record = Record.read(run)
    assert set(scores) == {4, 8} and record.best == max(scores.values()) and scores[record.best_step] == record.best
    assert (run / "samples" / "step_0000008.png").exists()


def test_a_task_goes_on_to_the_bit_and_is_known_by_name(run, tmp_path, devices):
    devices(1)
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(checkpoints.folder(tmp_path / "run") / "8")
    going_on = ToyTask(toy(tmp_path / "run"))
    train_task(going_on)
    found, wanted = (
        checkpoints.restore_average(
            folder, 8, (0.5,), going_on.shapes, sharding.make_mesh(going_on.config.mesh), ema_decay=0.0
        )
        for folder in (tmp_path / "run", run)
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert checkpoints.read_config(run, cls=ToyConfig)[1] == toy(run)
    with pytest.raises(ConfigError, match=r"the task of the run must be 'diffusion', found 'toy'"):
        checkpoints.read_config(run)
    with pytest.raises(checkpoints.CheckpointError, match=r"started with model.width 48, found 32"):
        train_task(ToyTask(dataclasses.replace(toy(tmp_path / "run"), model=ToyModel(32))))


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(1, 4, 1), id="fsdp 4"),
        pytest.param(MeshConfig(1, 1, 2), id="tensor 2", marks=pytest.mark.slow),
    ],
)
def test_a_task_is_the_same_on_a_mesh(run, tmp_path, devices, mesh):
    devices(mesh.fsdp * mesh.tensor)
    train_task(ToyTask(toy(tmp_path / "run", mesh=mesh)))
    one, other = ([line["loss"] for line in lines(folder) if "loss" in line] for folder in (run, tmp_path / "run"))
    np.testing.assert_allclose(other, one, rtol=1e-5)


def test_the_config_of_a_task_has_its_flags(tmp_path, capsys):
    file = tmp_path / "toy.py"
    file.write_text("from tests.seams.toy_task import ToyConfig\nconfig = ToyConfig(run_dir='r')\n")
    flags = {"program": "toy", "description": "A toy.", "cls": ToyConfig}
    assert cli.parse_config(["--config", str(file), "--model.width", "16"], **flags).model.width == 16
    with pytest.raises(SystemExit):
        cli.parse_config(["--config", str(file), "--help"], **flags)
    assert "--model.width" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"must define `config = Config\(...\)`, found ToyConfig"):
        cli.parse_config(["--config", str(file)], program="train_dit.py", description="")
