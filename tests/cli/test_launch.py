"""The launch files give the command that they promise, checked without a cluster."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import yaml

from gspn_jax import cli
from gspn_jax.cli.hosts import HOSTS
from gspn_jax.config import ConfigError

LAUNCH = pathlib.Path(__file__).parents[2] / "docs" / "launch"


@pytest.fixture
def commands(tmp_path):
    """srun and scontrol that only note how they were called; srun ends with the code in $CODE."""
    for name, code in (("srun", "${CODE:-0}"), ("scontrol", "0")):
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/called\nexit {code}\n')
        path.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, "0", False), (1, "0", False), (2, "0", False), (75, "0", True), (75, "999", True), (75, "1000", False)],
)
def test_the_slurm_script_starts_the_run_and_queues_it_again_when_it_was_stopped(commands, code, restarts, requeued):
    env = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CODE": str(code),
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": restarts,
        "PYTHON": "python",
    }
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sh", "--config", "configs/gspn_xl_2.py", "--data.path", "my data"], env=env, timeout=20
    )
    assert done.returncode == code
    called = (commands / "called").read_text().splitlines()
    assert called[0] == "srun python train_dit.py --config configs/gspn_xl_2.py --data.path my data"
    assert called[1:] == (["scontrol requeue 77"] if requeued else [])


def test_the_slurm_script_asks_for_a_task_a_host_and_a_signal_before_the_end():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    for option in ("--ntasks-per-node=1", "--requeue", "--signal=TERM@120"):
        assert f"#SBATCH {option}" in lines


def test_the_kubernetes_job_starts_the_run_on_every_host():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "train_dit.py"]
    config = cli.parse_config(container["args"], program="train_dit.py", description="")
    assert config.run_dir == "/runs/xl" and config.data.path == "/data/latents"
    env = {variable["name"]: variable for variable in container["env"]}
    assert set(env) == {*HOSTS.values(), "GSPN_JOIN_SECONDS"}
    assert int(env["JAX_NUM_PROCESSES"]["value"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    name = job["metadata"]["name"]
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == f"{name}-0.{pod['subdomain']}:1234"
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["selector"] == {"job-name": name}
    ignored = [
        code
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if rule["action"] == "Ignore"
        for code in rule["onExitCodes"]["values"]
    ]
    assert ignored == [cli.INTERRUPTED]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coordinator", "a:1"], "found no --num-processes or JAX_NUM_PROCESSES"),
        (["--num-processes", "2", "--process-id", "0"], "found no --coordinator or JAX_COORDINATOR_ADDRESS"),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "must be a number below --num-processes",
        ),
        (["--coordinator", "a:1", "--num-processes", "two", "--process-id", "0"], "found '0' of 'two'"),
        (["--coordinator", "a", "--num-processes", "2", "--process-id", "0"], "must be HOST:PORT, found 'a'"),
    ],
)
def test_half_of_a_place_among_the_hosts_is_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        cli.join_other_hosts(flags)


@pytest.mark.parametrize("seconds", ["soon", "0", "-3"])
def test_a_heartbeat_that_is_no_time_is_refused(seconds, monkeypatch):
    monkeypatch.setenv("GSPN_HEARTBEAT_SECONDS", seconds)
    with pytest.raises(ConfigError, match=f"must be a number of seconds greater than 0, found '{seconds}'"):
        cli.join_other_hosts(["--coordinator", "a:1", "--num-processes", "2", "--process-id", "0"])


CHILD = """
import os, signal, sys, time
from gspn_jax import cli
parent = os.getpid()
cli.setup()
print(os.getpid(), os.getpid() != parent, flush=True)
exec(sys.argv[1])
"""


def one_of_two(tmp_path, script):
    env = os.environ | {"JAX_PROCESS_ID": "0", "PYTHONPATH": str(LAUNCH.parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, script],
        env=env,
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (
            "os.abort()",
            75,
            "another host, or the connection to it, was lost (JAX ended this process, see above); the same "
            "command on all hosts goes on from the newest checkpoint\n",
        ),
        ("sys.exit(0)", 0, ""),
        ("sys.exit('error: x')", 1, "error: x\n"),
        ("os._exit(2)", 2, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_one_of_several_hosts_ends_as_its_child_does_but_for_an_abort(tmp_path, script, code, said):
    process = one_of_two(tmp_path, script)
    output, errors = process.communicate(timeout=60)
    assert output.endswith("True\n")
    assert (process.returncode, errors) == (code, said)


def test_sigterm_is_passed_on_and_a_kill_takes_the_child_along(tmp_path):
    """`communicate` returns when the child, which has the pipes too, is gone."""
    script = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
print("ready", flush=True)
while True:
    time.sleep(0.05)  # which any thread may be told to end
"""
    for send, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        process = one_of_two(tmp_path, script)
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        process.send_signal(send)
        assert process.communicate(timeout=60) == ("", "") and process.returncode == code


JOINED = """
import sys
from gspn_jax import cli
cli.join_other_hosts([])
import jax
print(jax.process_index(), jax.process_count(), jax.config.values["jax_cuda_visible_devices"])
"""


@pytest.mark.parametrize(
    ("hosts", "more", "devices"),
    [
        ("2", {}, ["all", "all"]),  # one task a host, as in slurm.sh
        ("1", {}, ["0", "1"]),  # two tasks on one host
        ("2", {"JAX_LOCAL_DEVICE_IDS": "2,3"}, ["2,3", "2,3"]),
    ],
)
def test_tasks_of_slurm_find_one_another_and_their_devices(hosts, more, devices):
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": hosts,
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ
            | job
            | more
            | {"PYTHONPATH": str(LAUNCH.parents[2]), "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "XLA_FLAGS": ""},
        )
        for i in range(2)
    ]
    said = [task.communicate(timeout=60) for task in tasks]
    assert [output.split() for output, _ in said] == [[str(i), "2", devices[i]] for i in range(2)], said


def test_a_single_process_joins_nobody_and_keeps_its_flags():
    flags = ["--config", "c.py", "--train.steps", "3"]
    assert cli.join_other_hosts(flags) == flags
