"""--log.wandb: what metrics.jsonl and samples/ have is in a wandb run, too, and in the same one when a run goes on."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from gspn_jax.config import ConfigError, LogConfig, to_dict
from gspn_jax.extras import MissingExtra
from gspn_jax.training import train as training
from gspn_jax.training.train import train
from gspn_jax.training.weights_and_biases import wandb_log
from tests.training import tiny


class StandIn(types.ModuleType):
    """wandb, as far as it is used; `runs` are the runs that were started."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **settings):
        self.runs.append(StandInRun(settings))
        return self.runs[-1]

    @staticmethod
    def Image(image):
        return np.asarray(image)


class StandInRun:
    def __init__(self, settings):
        self.settings, self.logged, self.metrics, self.exit_code = settings, [], {}, None

    def define_metric(self, name, **settings):
        self.metrics[name] = settings

    def log(self, values):
        assert self.exit_code is None
        self.logged.append(values)

    def finish(self, exit_code=0):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def config(folder, **settings):
    made = tiny.config(folder / "run", **{"steps": 2, "save_every": 2, "log_every": 1, "sample_every": 2} | settings)
    return dataclasses.replace(made, log=LogConfig(wandb="digits"))


@pytest.mark.slow
def test_a_run_and_what_goes_on_from_it_log_to_one_wandb_run(wandb, tmp_path):
    first, longer = config(tmp_path), config(tmp_path, steps=4)
    train(first)
    train(longer)
    assert [run.settings["config"] for run in wandb.runs] == [to_dict(first), to_dict(longer)]
    ids = {run.settings["id"] for run in wandb.runs}
    assert len(ids) == 1 and ids == {(tmp_path / "run/wandb_id").read_text().strip()}
    for run in wandb.runs:
        assert run.settings["project"] == "digits" and run.settings["resume"] == "allow" and run.exit_code == 0
        assert "mode" not in run.settings  # WANDB_MODE decides
        assert run.metrics["*"] == {"step_metric": "step"}

    logged = [values for run in wandb.runs for values in run.logged]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    assert [values for values in logged if "samples" not in values] == lines and len(lines) == 4
    grids = {values["step"]: values["samples"] for values in logged if "samples" in values}
    assert grids.keys() == {2, 4}
    for step, grid in grids.items():
        np.testing.assert_array_equal(grid, Image.open(tmp_path / f"run/samples/step_{step:07d}.png"))


def test_without_wandb_one_sentence_comes_before_anything_else(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(training.sharding, "make_mesh", lambda *_: pytest.fail("devices were touched"))
    with pytest.raises(MissingExtra, match=r"--log.wandb needs wandb, .*: pip install 'gspn-jax\[wandb\]'"):
        train(config(tmp_path))
    assert not (tmp_path / "run").exists()


def test_the_first_host_alone_logs(wandb, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with wandb_log(config(tmp_path)) as log:
        assert log is None
    assert not wandb.runs


def test_a_wandb_that_cannot_start_is_one_sentence_and_a_run_that_fails_is_marked(wandb, monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ZeroDivisionError), wandb_log(config(tmp_path)):
        raise ZeroDivisionError
    assert wandb.runs[0].exit_code == 1

    def refuse(**_):
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"could not start a run of 'digits' \(no API key\): `wandb login`"):
        wandb_log(config(tmp_path)).__enter__()


def test_a_wandb_that_ends_costs_its_own_log_alone(wandb, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    with wandb_log(config(tmp_path)) as log:
        wandb.runs[0].log = lambda values: (_ for _ in ()).throw(ConnectionResetError("the service is gone"))
        log.metrics(1, {"loss": 1.0})
        log.metrics(2, {"loss": 1.0})
    assert [r.message for r in caplog.records] == [
        "nothing more goes to wandb (the service is gone); the run directory has all of it"
    ]
