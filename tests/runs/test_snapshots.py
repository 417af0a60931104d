"""Snapshots of a run that trains: what they hold, what they survive, and the averages that are made of them."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from gspn_jax.files import sha256_of
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints, power, snapshots
from gspn_jax.runs.checkpoints import CheckpointError
from gspn_jax.training.train import train_task
from tests.runs.saved import mesh_of
from tests.seams.toy_task import ToyTask, toy

STEPS, EVERY = 12, 2


class Plain(ToyTask):
    """The toy without evaluations, which would save, too."""

    def evaluation(self, mesh):
        return None


def task(folder, **train) -> Plain:
    return Plain(toy(folder, **{"steps": STEPS, "snapshot_every": EVERY, "save_every": 4, "sample_every": 0} | train))


def trained(folder, **train) -> None:
    """A run on one device."""
    with pytest.MonkeyPatch.context() as patch:
        make = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda config: make(config, jax.devices()[:1]))
        train_task(task(folder, **train))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose every step is kept."""
    folder = tmp_path_factory.mktemp("snapshots") / "run"
    trained(folder, save_every=1, keep_every=1)
    return folder


def files(folder) -> dict[str, str]:
    """Hashes of the arrays of the averages of a snapshot: of what the manifest names beside orbax's own notes."""
    named = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: file["sha256"] for name, file in named.items() if name.startswith("ema_width")}


def values(made_of, shapes, mesh=None):
    return jax.device_get(snapshots.restore(made_of, shapes, mesh or mesh_of()))


def test_an_average_of_any_width_is_the_direct_average_of_all_steps(run):
    """Of twelve steps and six snapshots sums are rough, but their error is known, and that of the profiles is what the
    parameters differ by: equal to 1e-6 of the float64 sum of all steps with the weights of the recipe, and for a width
    that is stored with those of the closed form."""
    shapes = task(run).shapes
    steps = [
        jax.device_get(checkpoints.restore_average(run, step, (0.5,), shapes, mesh_of(), ema_decay=0.0))
        for step in range(1, STEPS + 1)
    ]
    path = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float64), *steps)

    def profile(width: float, step: int) -> np.ndarray:
        edges = np.minimum(np.arange(STEPS + 1), step) / step
        return np.diff(edges ** (power.exponent(width) + 1))

    for width in (0.05, 0.1, 0.07, 0.15):
        made_of = snapshots.recipe(run, STEPS, width)
        assert (made_of.error == 0) == (len(made_of.terms) == 1) == (width in (0.05, 0.1))
        stored = [(term.coefficient, term.width, int(term.where.name)) for term in made_of.terms]
        weights = sum(coefficient * profile(w, step) for coefficient, w, step in stored)
        if made_of.error == 0:
            np.testing.assert_allclose(weights, profile(width, STEPS), rtol=1e-12)
        wanted = jax.tree.map(lambda p, w=weights: np.tensordot(w, p, 1), path)
        found = values(made_of, shapes)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6), found, wanted)


@pytest.mark.slow
def test_it_is_the_same_on_another_mesh(run):
    shapes, made_of = task(run).shapes, snapshots.recipe(run, STEPS, 0.07)
    split = values(made_of, shapes, mesh_of(1, 4, 1))
    own = jax.tree.map(lambda a, s: a[tuple(map(slice, s.shape))], split, shapes)
    jax.tree.map(np.testing.assert_array_equal, own, values(made_of, shapes))


def test_snapshots_are_links_to_checkpoints_and_stay_when_those_are_deleted(run, tmp_path):
    trained(tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run") == [10, 12]  # but for snapshots they would be 8 and 12
    assert snapshots.steps(tmp_path / "run") == [2, 4, 6, 8, 10, 12]
    for step in (10, 12):
        snapshot, checkpoint = snapshots.folder(tmp_path / "run") / str(step), checkpoints.folder(tmp_path / "run")
        for name in files(snapshot):
            assert os.path.samefile(snapshot / name, checkpoint / str(step) / name)
        assert sorted(p.name for p in snapshot.iterdir() if p.is_dir()) == ["ema_width_0.05", "ema_width_0.1", "meta"]
    shapes = task(run).shapes
    for width in (0.08, 0.1):
        made = [values(snapshots.recipe(folder, STEPS, width), shapes) for folder in (run, tmp_path / "run")]
        jax.tree.map(np.testing.assert_array_equal, *made)  # whatever else was saved


def test_a_run_that_goes_on_makes_the_same_snapshots_to_the_bit(run, tmp_path, caplog):
    """It lost the last checkpoints to a fault, and was killed before the snapshot of the one before was made."""
    shutil.copytree(run, tmp_path / "run")
    for step in range(9, STEPS + 1):
        shutil.rmtree(checkpoints.folder(tmp_path / "run") / str(step))
    shutil.rmtree(snapshots.folder(tmp_path / "run") / "8")
    trained(tmp_path / "run")
    assert snapshots.steps(tmp_path / "run") == snapshots.steps(run)
    aside = sorted(path.name.split("-")[0] for path in (snapshots.folder(tmp_path / "run") / "aside").iterdir())
    assert aside == ["10", "12"] and "the run goes on from step 8: its snapshot of step 10 is now in" in caplog.text
    shapes = task(run).shapes
    for step in snapshots.steps(run):
        for width in (0.05, 0.1):
            made = [values(snapshots.recipe(folder, step, width), shapes) for folder in (run, tmp_path / "run")]
            jax.tree.map(np.testing.assert_array_equal, *made)


def test_snapshots_begin_with_a_run_and_may_end_before_it(run, tmp_path):
    trained(tmp_path / "run", steps=4, snapshot_every=0, ema_widths=(0.2,))
    with pytest.raises(
        CheckpointError, match=r"those that a run began with, found the widths 0.05 0.1, which the check"
    ):
        trained(tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"is made of power-function averages, which .* has none of up to step 4: "
    ):
        snapshots.recipe(tmp_path / "run", 4, 0.1)
    shutil.copytree(run, tmp_path / "other")
    for step in range(5, STEPS + 1):
        shutil.rmtree(checkpoints.folder(tmp_path / "other") / str(step))
    trained(tmp_path / "other", steps=6, snapshot_every=0)
    assert snapshots.steps(tmp_path / "other") == [2, 4]


def test_a_damaged_snapshot_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    where = snapshots.folder(tmp_path / "run") / "6"
    name = max(files(where), key=lambda name: (where / name).stat().st_size)
    content = bytearray((where / name).read_bytes())
    content[len(content) // 2] ^= 1
    (where / name).unlink()  # the checkpoint has the same file
    (where / name).write_bytes(content)
    assert sha256_of(where / name) != files(where)[name]
    with pytest.raises(
        CheckpointError, match=rf"{where} must be as it was saved, but the content of {name} has changed"
    ):
        values(snapshots.recipe(tmp_path / "run", STEPS, 0.07), task(run).shapes)
    shutil.rmtree(where)  # without it there is an average still, not as near
    rougher = snapshots.recipe(tmp_path / "run", STEPS, 0.07)
    assert rougher.error > snapshots.recipe(run, STEPS, 0.07).error


def test_where_there_are_no_hard_links_files_are_copied(run, tmp_path, monkeypatch):
    shutil.copytree(checkpoints.folder(run), checkpoints.folder(tmp_path))

    def refused(*_):
        raise OSError(1, "not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refused)
        snapshots.keep(tmp_path, 6)
    where = snapshots.folder(tmp_path) / "6"
    assert files(where) == files(snapshots.folder(run) / "6")
    assert not any(os.path.samefile(where / name, checkpoints.folder(tmp_path) / "6" / name) for name in files(where))
