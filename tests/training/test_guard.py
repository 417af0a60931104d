"""Numbers that go bad: spikes are told from noise, runs go back, and updates that are not finite are left out."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from gspn_jax.config import GuardConfig
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.runs.evaluations import RECORD, Record
from gspn_jax.training import batches as stream
from gspn_jax.training import train as page
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.guard import DivergedError, Guard
from gspn_jax.training.state import create_state
from gspn_jax.training.step import make_step
from gspn_jax.training.train import train
from tests.training import tiny
from tests.training.tiny import batches

LOOKING = GuardConfig(spike_factor=6, spike_steps=3, spike_window=40, max_rollbacks=1)


def feed(guard, losses):
    """The index of the first spike; None for none."""
    return next((i for i, loss in enumerate(losses) if guard.see([loss]) is not None), None)


def test_a_jump_is_a_spike_and_noise_is_none():
    rng = np.random.default_rng(0)
    noise = 1 + 0.05 * rng.standard_normal(5000)
    assert feed(Guard(LOOKING, {}), noise) is None
    # three steps at +0.6 are 12 sigma; their mean passes 6 sigma = 0.3 with the second of them
    jump = noise[:300].copy()
    jump[250:] += 0.6
    assert feed(Guard(LOOKING, {}), jump) in (250, 251)
    assert feed(Guard(LOOKING, {}), np.linspace(2, 1, 300) + 0.02 * rng.standard_normal(300)) is None  # it falls
    assert feed(Guard(GuardConfig(), {}), jump) is None  # off by default
    assert feed(Guard(LOOKING, {}), jump[240:]) is None  # less than half a window seen before


def test_sigma_is_that_of_a_normal_distribution():
    """The threshold is where the definition puts it: median + 6 * median |x - median| / 0.6745 of the window."""
    rng = np.random.default_rng(1)
    before = rng.standard_normal(40)
    median = np.median(before)
    threshold = median + 6 * np.median(np.abs(before - median)) / 0.6745
    for offset, found in ((-1e-6, None), (1e-6, 2)):
        guard = Guard(LOOKING, {"losses": [*before[:-1]]})
        last = np.array([before[-1], *[threshold + offset] * 3])
        guard.see(last[:1])
        # the mean of three passes the threshold with the third only: the first two are mixed with what came before
        assert feed(guard, last[1:]) == found


def test_a_run_that_goes_on_judges_as_if_it_had_never_stopped():
    losses = 1 + 0.05 * np.random.default_rng(0).standard_normal(100)
    losses[80:] += 0.5
    whole = feed(Guard(LOOKING, {}), losses)
    first = Guard(LOOKING, {})
    assert feed(first, losses[:70]) is None
    again = Guard(LOOKING, json.loads(json.dumps(first.notes)))
    assert 70 + feed(again, losses[70:]) == whole


def test_each_rollback_gives_another_order_and_their_number_has_a_limit():
    guard = Guard(LOOKING, {})
    assert guard.data_seed(5) == 5
    normal = [{"finite": True, "loss": loss} for loss in np.tile([1.0, 1.1, 0.9], 10)]
    spike = [{"finite": True, "loss": 4.0}] * 3
    assert guard.judge(30, normal, saved=20).action == "continue"
    assert guard.judge(33, spike, saved=20)[::3] == ("roll back", pytest.approx(2, abs=0.1))  # 4, 1, 1
    guard.went_back(33, 20, {})  # the notes of the checkpoint know of no rollback
    assert guard.notes["rollbacks"] == [[33, 20]]
    assert guard.data_seed(5) not in (5, Guard(LOOKING, {}).data_seed(6))
    assert guard.judge(50, normal, saved=20).action == "continue"
    verdict = guard.judge(53, spike, saved=20)
    assert verdict.action == "stop" and isinstance(verdict.error, DivergedError)
    assert "before step 53 again after 1 rollbacks, all that guard.max_rollbacks allows" in str(verdict.error)
    assert "the checkpoint of step 20 is kept" in str(verdict.error)
    assert Guard(LOOKING, guard.notes).judge(53, spike, saved=0).action == "continue"  # there is nowhere to go back to


@pytest.fixture
def spoiled(monkeypatch):
    """spoil(calls, change): the metrics of these calls of the step (counted over the process) are changed."""

    def spoil(calls, change):
        made, count = page.make_step, iter(range(1, 10**6))

        def make(*arguments):
            step = made(*arguments)

            def spoiled_step(state, batch):
                state, metrics = step(state, batch)
                return (state, change(metrics)) if next(count) in calls else (state, metrics)

            return spoiled_step

        monkeypatch.setattr(page, "make_step", make)

    return spoil


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def guarded(run_dir, guard, **settings):
    settings = {"steps": 40, "log_every": 5, "save_every": 10} | settings
    return dataclasses.replace(tiny.config(run_dir, **settings), guard=guard)


def high(metrics):
    return metrics | {"loss": jax.device_put(np.float32(50))}


def test_a_spike_sends_the_run_back_and_on_with_other_data(tmp_path, spoiled, caplog):
    seeds = []
    guard = dataclasses.replace(LOOKING, spike_steps=2, spike_window=20)
    spoiled({27, 28}, high)
    make_loader = stream.data.make_loader

    def loader(*arguments, **settings):
        seeds.append((settings["seed"], settings["start_step"]))
        if len(seeds) == 1:
            Record(25, 25, 1.0).write(tmp_path / "run")  # as an evaluation that the run goes back behind
        return make_loader(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(stream.data, "make_loader", loader)
        train(guarded(tmp_path / "run", guard))
    assert "before step 30: back to step 20, and on with another order" in caplog.text
    assert seeds == [(0, 0), (1_000_003, 20)]
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == list(range(5, 41, 5))
    assert max(line["loss"] for line in logged) < 10  # the spike's own lines are gone with its steps
    step, meta = checkpoints.read_meta(tmp_path / "run")
    assert step == 40 and meta["notes"]["rollbacks"] == [[30, 20]]
    assert json.loads((tmp_path / "run" / RECORD).read_text()) == dataclasses.asdict(Record(20, None, None))


@pytest.mark.slow
def test_a_spike_that_comes_back_stops_the_run(tmp_path, spoiled):
    spoiled(set(range(24, 100)), high)
    with pytest.raises(DivergedError, match=r"again after 1 rollbacks.*checkpoint of step 20 is kept"):
        train(guarded(tmp_path / "run", dataclasses.replace(LOOKING, spike_steps=2, spike_window=20)))
    assert checkpoints.steps(tmp_path / "run") == [10, 20]


@pytest.mark.slow
def test_updates_that_are_not_finite_are_left_out_and_counted(tmp_path, spoiled):
    def broken(metrics):
        return metrics | {"finite": jax.device_put(np.bool_(False)), "loss": jax.device_put(np.float32("nan"))}

    spoiled({3, 4, 12}, broken)
    train(guarded(tmp_path / "run", GuardConfig(nonfinite="skip", nonfinite_limit=3), steps=15))
    logged = lines(tmp_path / "run")
    assert [line.get("skipped", 0) for line in logged] == [2, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in logged)
    spoiled({3, 4, 5}, broken)
    with pytest.raises(DivergedError, match=r"6 steps up to step 20 were not finite .* guard.nonfinite_limit \(3\)"):
        train(guarded(tmp_path / "run", GuardConfig(nonfinite="skip", nonfinite_limit=3), steps=40))


def test_a_skipped_update_changes_nothing_but_the_number_of_the_step():
    config = dataclasses.replace(tiny.config(), guard=GuardConfig(nonfinite="skip"))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    task = DiffusionTask(config)
    state, step = create_state(task, mesh), make_step(task, mesh)
    good = [jax.device_put(b, sharding.batch_sharding(mesh)) for b in batches(config, 2)]
    broken = dataclasses.replace(state, params=jax.tree.map(lambda p: p.at[...].set(np.nan), state.params))
    before = jax.device_get(broken)
    after, metrics = step(broken, good[0])
    assert not metrics["finite"] and after.step == 1 and not after.halted
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(jax.device_get(after), name))
    healed = dataclasses.replace(after, params=create_state(DiffusionTask(config), mesh).params)
    after, metrics = step(healed, good[1])
    assert metrics["finite"] and after.step == 2  # and on it goes
