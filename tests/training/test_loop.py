"""A run as a user starts it: killed, interrupted, extended, fed a number that is not finite."""

import dataclasses
import gzip
import json
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from gspn_jax.config import ConfigError, ProfileConfig
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.training.guard import NonFiniteError
from gspn_jax.training.train import train
from tests.training import tiny
from tests.training.processes import (
    STEPS,
    assert_same_run,
    assert_same_run_but_for_rounding,
    command,
    end,
    finish,
    preempt,
    start,
    wait_for_step,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(run_dir)
    return run_dir


def assert_survives_kills(run_dir, uninterrupted, kills, seed):
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(command(run_dir))
        found = checkpoints.steps(run_dir)
        wait_for_step(process, run_dir, min((found[-1] if found else 0) + 5, STEPS))
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(run_dir)
    assert_same_run(run_dir, uninterrupted)


def test_a_killed_run_ends_with_the_same_bits(tmp_path, uninterrupted):
    assert_survives_kills(tmp_path / "run", uninterrupted, kills=1, seed=time.time_ns())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_often_ends_with_the_same_bits(tmp_path, uninterrupted, seed):
    assert_survives_kills(tmp_path / "run", uninterrupted, kills=6, seed=seed)


@pytest.mark.slow  # two hosts that are preempted go the same way
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    process = start(command(run_dir))
    wait_for_step(process, run_dir, 5)
    process.send_signal(signal.SIGTERM)
    ((code, errors),) = end(process)
    if code != 0:  # 0: it was done before the signal came
        assert code == 75, errors
        step = checkpoints.steps(run_dir)[-1]
        assert f"stopped by SIGTERM and saved at step {step}" in errors
        finish(run_dir)
    assert_same_run(run_dir, uninterrupted)


def test_two_processes_are_one_run(tmp_path, uninterrupted):
    """Through a preemption; one process alone, of one device, ends what two began."""
    run_dir = tmp_path / "run"
    preempt(run_dir, 2, 5, hosts=[1, 0, 1], times=2)
    finish(run_dir)
    assert_same_run_but_for_rounding(run_dir, uninterrupted)


@pytest.mark.slow  # in one process: test_faults
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, uninterrupted):
    run_dir = shutil.copytree(uninterrupted, tmp_path / "run")
    newest = run_dir / "checkpoints" / str(STEPS) / "params"
    data = max(newest.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    errors = finish(run_dir)
    assert f"the checkpoint of step {STEPS}" in errors and f"going back to step {STEPS - 4}" in errors
    assert_same_run(run_dir, uninterrupted)


def test_a_finished_run_is_left_alone(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_text()
    finish(uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_text() == before
    assert checkpoints.steps(uninterrupted)[-1] == STEPS


def test_a_run_leaves_metrics_events_grids_and_its_config(tmp_path):
    config = tiny.config(tmp_path / "run", steps=6, log_every=2, sample_every=3, save_every=6)
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    for line in lines:
        assert {"loss", "grad_norm", "learning_rate", "images_per_second", "data_wait", "time"} <= line.keys()
        assert np.isfinite(line["loss"])
    grids = sorted(p.name for p in (tmp_path / "run" / "samples").iterdir())
    assert grids == ["step_0000003.png", "step_0000006.png"]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert checkpoints.read_config(tmp_path / "run") == (6, config)


@pytest.mark.slow
def test_chosen_steps_are_traced(tmp_path):
    for steps, said in (("3:2", "1 <= FIRST <= LAST, found '3:2'"), ("0:1", "found '0:1'"), ("x", "found 'x'")):
        with pytest.raises(ConfigError, match=said):
            ProfileConfig(steps)
    config = tiny.config(tmp_path / "run", steps=5, log_every=5, save_every=5)
    train(dataclasses.replace(config, profile=ProfileConfig("2:3")))
    (trace,) = (tmp_path / "run" / "profile").rglob("*.trace.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["2", "3"]
    assert any((tmp_path / "run" / "profile").rglob("*.xplane.pb"))  # what xprof and TensorBoard open


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(tmp_path):
    config = tiny.config(tmp_path / "run", steps=20, log_every=3, save_every=20)
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30, final_learning_rate=1e30, warmup_steps=0),
    )
    with pytest.raises(NonFiniteError, match=r"step (\d+) gave a loss of .* lower optimizer.learning_rate") as error:
        train(config)
    bad_step = int(str(error.value).split()[1])
    step, saved = checkpoints.read_config(config.run_dir)
    assert step == bad_step - 1
    mesh = sharding.make_mesh(config.mesh)
    params = checkpoints.restore_params(config.run_dir, step, saved, mesh, ema_decay=0.0)
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGHUP", "the reader of stderr ends"])
def test_a_connection_that_ends_costs_nothing(tmp_path, how):
    """A terminal or ssh connection sends SIGHUP; a dead `tee` only leaves nobody to write to."""
    run_dir = tmp_path / "run"
    process = start(command(run_dir, "--train.save-every", "1000", "--train.steps", "2000"))
    wait_for_step(process, run_dir, 5)
    if how == "SIGHUP":
        process.send_signal(signal.SIGHUP)
    else:
        process.stderr.close()
    try:
        assert process.wait(timeout=120) == 75
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    (step,) = checkpoints.steps(run_dir)
    assert 5 <= step < 2000
    lines = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, step + 1))
