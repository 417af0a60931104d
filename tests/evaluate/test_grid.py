"""A grid of averages and guidance scales, as a user calls it: drawn once, found again, hashed, drawn and refused."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from gspn_jax import evaluate
from gspn_jax.evaluate import grid, runs
from gspn_jax.files import claim, sha256_of
from gspn_jax.parallel import sharding
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.sampling.sampler import Sampler
from gspn_jax.tables import FEATURE_NETWORKS, METRICS
from gspn_jax.training import ema
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import create_state
from tests.runs.saved import NAMES, mesh_of
from tests.seams import toys
from tests.training import tiny


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """And a metric that needs no Inception."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METRICS, "glare", toys.GLARE)
        patch.setitem(FEATURE_NETWORKS, "brightness", toys.Brightness())
        make = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda config, devices=None: make(config, devices or jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A run of six steps, whose parameters move at random, with snapshots of every second step; and ref.npz."""
    folder = tmp_path_factory.mktemp("grid") / "run"
    config = tiny.config(folder, steps=6, snapshot_every=2, ema_decays=(0.5,))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=16, heads=2))
    state, rng = create_state(DiffusionTask(config), mesh_of()), np.random.default_rng(0)
    with Checkpoints(config, "f", NAMES) as saver:
        for step in range(6):
            moved = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), state.params)
            averages = ema.update(state.ema, moved, state.step)
            state = dataclasses.replace(state, params=moved, ema=averages, step=state.step + 1)
            if step % 2:
                saver.save(step + 1, state)
    np.savez(folder / "ref.npz", arr_0=np.full((4, 8, 8, 3), 100, np.uint8))
    return folder


def call(run, *flags: str) -> None:
    wanted = ["--metrics", "glare", "--networks", "brightness=1", "--reference", str(run / "ref.npz")]
    evaluate.main(["--run", str(run), *wanted, "--num-samples", "8", "--batch-size", "8", *flags])


GRID = ("--ema-decays", "0.5", "--ema-widths", "0.05", "0.08", "--guidance-scales", "1", "2")


@pytest.fixture(scope="module")
def first(run):
    """The grid's file, after a call that was killed in its third cell, and the same call again."""
    drawn, draw = [], Sampler.draw

    def counted(self, *arguments):
        drawn.append(self._config.sampler.guidance_scale)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "draw", counted)
        with pytest.raises(SystemExit, match="130"):
            call(run, *GRID)
        assert len(list((run / "evaluation").glob("*.json"))) == 2
        call(run, *GRID)
    assert drawn == [1, 2, 1, 1, 2, 1, 2]  # each cell once, but for the one that was interrupted
    return run / "evaluation" / "grids" / "step_0000006.json"


def test_each_cell_is_what_a_call_of_its_own_gives(run, first, monkeypatch):
    monkeypatch.setattr(runs, "ROUGH", 0.0)
    content = json.loads(first.read_text())
    assert content["averages"] == ["EMA 0.5", "EMA width 0.05", "EMA width 0.08"]
    assert content["guidance_scales"] == [1.0, 2.0] and first.with_suffix(".png").exists()
    for row, values in zip(content["cells"], content["metrics"]["glare"], strict=True):
        for cell, value in zip(row, values, strict=True):
            path = run / "evaluation" / cell["file"]
            assert sha256_of(path) == cell["sha256"] and json.loads(path.read_text())["metrics"]["glare"] == value
    assert len({value for values in content["metrics"]["glare"] for value in values}) == 6
    call(run, "--ema-widths", "0.08", "--sampler.guidance-scale", "2", "--output", str(run / "own.json"))
    own = json.loads((run / "own.json").read_text())
    assert own["metrics"]["glare"] == content["metrics"]["glare"][2][1]
    made = own["samples"]
    assert made["ema_decay"] is None and made["ema_width"] == 0.08 and made["ema_terms"] == 6 and made["ema_error"] > 0
    assert any("the average of width 0.08 is made of 6 others with an error of" in text for text in own["warnings"])


def test_a_grid_that_is_there_is_neither_drawn_nor_written_again(run, first, monkeypatch, capsys):
    monkeypatch.setattr(Sampler, "draw", None)
    capsys.readouterr()
    call(run, *GRID)
    said = capsys.readouterr().out
    assert said.count("which has it already") == 6 and f"{first} has this grid already" in said
    assert sorted(path.name for path in first.parent.iterdir()) == ["step_0000006.json", "step_0000006.png"]
    call(run, "--ema-widths", "0.05", "0.08", "--guidance-scales", "2")
    assert (first.parent / "step_0000006_1.json").exists()  # another grid of the same cells


def test_the_table_has_a_star_at_the_best_cell(first):
    content = json.loads(first.read_text())
    lowest = min(value for values in content["metrics"]["glare"] for value in values)
    (starred,) = (line for line in grid.table(content).splitlines() if "*" in line)
    assert f"{lowest:.6g}*" in starred
    assert grid.best_of("is", [[1.0, 3.0], [float("nan"), 2.0]]) == (0, 1)


def test_a_grid_that_another_process_draws_is_not_drawn(run, first, capsys):
    with claim(first.parent), pytest.raises(SystemExit, match="2"):
        call(run, *GRID)
    assert "is being made by process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ema-widths", "0.4"], "--ema-widths must be greater than 0 and at most 0.2887"),
        (["--ema-widths", "0.1", "0.1"], "--ema-widths must have each number once, found 0.1 0.1"),
        (["--ema-decays", "0.9"], "the EMA decay must be one that the run kept (0.5), or 0"),
        (["--ema", "0.5", "--ema-widths", "0.1"], "--ema is in place of --ema-decays and --ema-widths, found 0.5"),
        (["--ema-widths", "0.1", "0.2", "--output", "x.json"], "are for one average, found 0.1 0.2"),
        (["--ema-widths", "-0.1"], "--ema-widths must be greater than 0"),
        (["--ema-widths", "nan"], "--ema-widths must be finite, found nan"),
    ],
)
def test_a_wrong_grid_gets_one_sentence(run, flags, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(run, *flags)
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
