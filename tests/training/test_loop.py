"""A run as a user starts it: killed, interrupted, extended, fed a number that is not finite."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from gspn_jax.training import checkpoints, sharding
from gspn_jax.training.loop import NonFiniteError, train
from tests.training import tiny

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "from tests.training import tiny\nconfig = tiny.config({run_dir!r}, gspn=True, steps=60, save_every=4)\n"


def command(run_dir: pathlib.Path) -> list[str]:
    path = run_dir.parent / f"{run_dir.name}.py"
    path.write_text(CONFIG.format(run_dir=str(run_dir)))
    return [sys.executable, str(ROOT / "train_dit.py"), "--config", str(path)]


def start(run_dir: pathlib.Path, arguments: list[str] | None = None, **more: str) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)} | more
    return subprocess.Popen(arguments or command(run_dir), env=env, text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def finish(run_dir: pathlib.Path) -> None:
    process = start(run_dir)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def wait_for_step(process: subprocess.Popen, run_dir: pathlib.Path, step: int) -> None:
    """Until the run has logged `step`; fails when it ends before."""
    path = run_dir / "metrics.jsonl"
    while not (path.exists() and any(f'"step": {s},' in path.read_text() for s in range(step, 61))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def everything(run_dir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint."""
    step, config = checkpoints.read_config(run_dir)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return {"step": step} | {str(decay): checkpoints.restore_params(run_dir, step, config, mesh, ema_decay=decay)
                             for decay in (0.0, *config.train.ema_decays)}


def losses(run_dir: pathlib.Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    return {line["step"]: line["loss"] for line in lines}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(run_dir)
    return run_dir


def assert_survives_kills(run_dir, uninterrupted, kills, seed):
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(run_dir)
        found = checkpoints.steps(run_dir)
        wait_for_step(process, run_dir, min((found[-1] if found else 0) + 5, 60))
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(run_dir)
    jax.tree.map(np.testing.assert_array_equal, everything(run_dir), everything(uninterrupted))
    # windows of the mean loss begin at the restart, so only steps whose whole window was run in one go compare
    assert losses(run_dir)[60] == losses(uninterrupted)[60]


def test_a_killed_run_ends_with_the_same_bits(tmp_path, uninterrupted):
    assert_survives_kills(tmp_path / "run", uninterrupted, kills=2, seed=time.time_ns())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_often_ends_with_the_same_bits(tmp_path, uninterrupted, seed):
    assert_survives_kills(tmp_path / "run", uninterrupted, kills=6, seed=seed)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(process, run_dir, 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    if process.returncode != 0:  # 0: it was done before the signal came
        assert process.returncode == 75, errors
        step = checkpoints.steps(run_dir)[-1]
        assert f"stopped by SIGTERM and saved at step {step}" in errors
        finish(run_dir)
    jax.tree.map(np.testing.assert_array_equal, everything(run_dir), everything(uninterrupted))


def start_hosts(run_dir: pathlib.Path, count: int, arguments: list[str] | None = None) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [start(run_dir, arguments, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count),
                  JAX_PROCESS_ID=str(i), GSPN_HEARTBEAT_SECONDS="20") for i in range(count)]


def end(processes: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str]]:
    """Exit code and stderr of each; fails when one of them goes on waiting for the others."""
    errors = [process.communicate(timeout=timeout)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


def assert_is_one_run(run_dir: pathlib.Path, uninterrupted: pathlib.Path) -> None:
    """What one process alone ends with, but for the order of float32 sums; logs and checkpoints are written once."""
    found, wanted = losses(run_dir), losses(uninterrupted)
    assert found[60] == pytest.approx(wanted[60], rel=1e-3)
    # Adam turns the rounding of a gradient near 0 into up to its whole step; 60 of them with 1e-3 could make 6e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=0), everything(run_dir),
                 everything(uninterrupted))
    assert checkpoints.steps(run_dir) == checkpoints.steps(uninterrupted)


def preempt(run_dir: pathlib.Path, count: int, step: int) -> None:
    """SIGTERM for the last of the hosts after `step`, and another one for all: they stop after the same step."""
    processes = start_hosts(run_dir, count)
    wait_for_step(processes[0], run_dir, step)
    processes[-1].send_signal(signal.SIGTERM)
    time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    ended, saved = end(processes), checkpoints.steps(run_dir)[-1]
    for code, errors in ended:
        assert code == 75 and f"stopped by SIGTERM and saved at step {saved}" in errors, errors


def lose_one(run_dir: pathlib.Path, count: int, step: int) -> None:
    """SIGKILL for the last of the hosts after `step`: the others stop and say why.

    One that waits for the lost host in a barrier rather than in an exchange is ended by JAX's watch over the hosts.
    """
    processes = start_hosts(run_dir, count)
    wait_for_step(processes[0], run_dir, step)
    processes[-1].send_signal(signal.SIGKILL)
    *others, (killed, _) = end(processes)
    assert killed == -signal.SIGKILL
    for code, errors in others:
        said = {75: "another host, or the connection to it, was lost", -signal.SIGABRT: "another task died"}
        assert code in said and said[code] in errors, errors


def test_two_processes_are_one_run(tmp_path, uninterrupted):
    """Through a preemption; one process alone ends what two began."""
    run_dir = tmp_path / "run"
    preempt(run_dir, 2, 20)
    finish(run_dir)
    assert_is_one_run(run_dir, uninterrupted)


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tmp_path, uninterrupted):
    outputs = []
    for count in (1, 2):
        flags = ["--run", str(uninterrupted), "--num-samples", "20", "--batch-size", "8", "--output",
                 str(tmp_path / f"{count}.npz")]
        for code, errors in end(start_hosts(uninterrupted, count, [sys.executable, str(ROOT / "sample.py"), *flags])):
            assert code == 0, errors
        with np.load(tmp_path / f"{count}.npz") as file:
            outputs.append((file["arr_0"].astype(int), file["arr_1"]))
    (one, labels), (two, same_labels) = outputs
    np.testing.assert_array_equal(labels, same_labels)
    assert np.abs(one - two).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_are_one_run_to_the_end(tmp_path, uninterrupted, count):
    run_dir = tmp_path / "run"
    lose_one(run_dir, count, 5)
    preempt(run_dir, count, 15)
    for code, errors in end(start_hosts(run_dir, count), timeout=600):
        assert code == 0, errors
    assert_is_one_run(run_dir, uninterrupted)
    assert len(list((run_dir / "tensorboard").iterdir())) == 3  # a file a start, from one host


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path, uninterrupted):
    run_dir = shutil.copytree(uninterrupted, tmp_path / "run")
    data = max((run_dir / "checkpoints" / "60" / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    process = start(run_dir)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "the checkpoint of step 60" in errors and "going back to step 56" in errors
    jax.tree.map(np.testing.assert_array_equal, everything(run_dir), everything(uninterrupted))


def test_a_finished_run_is_left_alone(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_text()
    finish(uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_text() == before
    assert checkpoints.steps(uninterrupted)[-1] == 60


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


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(tmp_path):
    config = tiny.config(tmp_path / "run", steps=20, log_every=3, save_every=20)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(
        config.optimizer, learning_rate=1e30, final_learning_rate=1e30, warmup_steps=0))
    with pytest.raises(NonFiniteError, match=r"step (\d+) gave a loss of .* lower optimizer.learning_rate") as error:
        train(config)
    bad_step = int(str(error.value).split()[1])
    step, saved = checkpoints.read_config(config.run_dir)
    assert step == bad_step - 1
    mesh = sharding.make_mesh(config.mesh)
    params = checkpoints.restore_params(config.run_dir, step, saved, mesh, ema_decay=0.0)
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(params))
