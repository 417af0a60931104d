"""Runs in processes of their own, as a user starts them: one, or several that are one job; what they leave."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from tests.quick_compile import QUICK_COMPILE

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 40
CONFIG = """from tests.training import tiny
config = tiny.config({run_dir!r}, gspn=True, steps={steps}, save_every=4, log_every=1)
"""
HEARTBEAT_SECONDS = 10


def command(run_dir: pathlib.Path, *flags: str) -> list[str]:
    path = run_dir.parent / f"{run_dir.name}.py"
    path.write_text(CONFIG.format(run_dir=str(run_dir), steps=STEPS))
    return [str(ROOT / "train_dit.py"), "--config", str(path), *flags]


def start(arguments: list[str], *, devices: int = 1, **more: str) -> subprocess.Popen:
    """A Python process of its own session, so that a signal can be sent to all that belongs to it."""
    flags = f"{QUICK_COMPILE} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | more
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=env,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def start_hosts(arguments: list[str] | list[list[str]], count: int, **settings) -> list[subprocess.Popen]:
    """Processes of the same arguments, or each of its own, that are one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            arguments[i] if isinstance(arguments[0], list) else arguments,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(i),
            GSPN_HEARTBEAT_SECONDS=str(HEARTBEAT_SECONDS),
            **settings,
        )
        for i in range(count)
    ]


def end(*processes: subprocess.Popen, timeout: float = 300) -> list[tuple[int, str]]:
    """Exit code and stderr of each; fails when one of them goes on waiting for the others."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


def finish(run_dir: pathlib.Path, *flags: str, hosts: int = 1, devices: int = 1) -> str:
    """Runs to the last step; returns what the first host says."""
    arguments = command(run_dir, *flags)
    processes = start_hosts(arguments, hosts, devices=devices) if hosts > 1 else [start(arguments, devices=devices)]
    ended = end(*processes)
    assert [code for code, _ in ended] == [0] * hosts, ended
    return ended[0][1]


def wait_for_step(process: subprocess.Popen, run_dir: pathlib.Path, step: int) -> None:
    """Until the run has logged `step`; fails when it ends before."""
    path = run_dir / "metrics.jsonl"
    while not (path.exists() and any(f'"step": {s},' in path.read_text() for s in range(step, STEPS + 1))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def preempt(run_dir, count, step, *, hosts, times=1):
    """SIGTERM for some of the hosts after `step`: all stop after the same step, which is saved."""
    processes = start_hosts(command(run_dir), count)
    wait_for_step(processes[0], run_dir, step)
    for _ in range(times):
        for host in hosts:
            processes[host].send_signal(signal.SIGTERM)
        time.sleep(0.05)
    ended, saved = end(*processes), checkpoints.steps(run_dir)[-1]
    for code, errors in ended:
        assert code == 75 and f"stopped by SIGTERM and saved at step {saved}" in errors, errors


def everything(run_dir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint that can be sampled from, on one device."""
    step, config = checkpoints.read_config(run_dir)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    return {"step": step} | {
        str(decay): checkpoints.restore_params(run_dir, step, config, mesh, ema_decay=decay)
        for decay in (0.0, *config.train.ema_decays)
    }


def losses(run_dir: pathlib.Path) -> list[float]:
    """The whole curve: the loss of each step, each logged once."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Bit by bit: every loss, the parameters and their averages, and the steps that are kept."""
    assert losses(one) == losses(other)
    jax.tree.map(np.testing.assert_array_equal, everything(one), everything(other))
    assert checkpoints.steps(one) == checkpoints.steps(other)


def assert_same_run_but_for_rounding(one: pathlib.Path, other: pathlib.Path) -> None:
    """As above, where float32 sums over the devices were made in another order.

    Seen over 60 steps: 2e-7 relative in the losses (two units in the last place), 3e-7 in parameters of up to 0.4.
    """
    np.testing.assert_allclose(losses(one), losses(other), rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-6), everything(one), everything(other))
    assert checkpoints.steps(one) == checkpoints.steps(other)
