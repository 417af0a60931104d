"""The launch files give the command that they promise, checked without a cluster."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
import yaml

from gspn_jax import cli
from gspn_jax.cli import launchers
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


LISTENING = """
import json, socket, sys
from gspn_jax import cli
cli.join_other_hosts(sys.argv[1:])
import jax
from jax.experimental import multihost_utils
listening = []
for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
    for line in open(f"/proc/self/net/{name}").read().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        host, port = local.split(":")
        if state == "0A":
            words = [bytes.fromhex(host[i:i + 8])[::-1] for i in range(0, len(host), 8)]
            listening.append([socket.inet_ntop(family, b"".join(words)), int(port, 16)])
multihost_utils.sync_global_devices("looked")
print(json.dumps([jax.process_index(), jax.process_count(), listening]))
"""


def own_address() -> str:
    """An address of this machine on a network; that of the loopback device where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return route.getsockname()[0]


def slurm(index: int, port: int, **more: str) -> dict[str, str]:
    """Variables of one of two tasks of Slurm on one machine."""
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": str(port),
    } | more


def open_mpi(index: int, port: int, **more: str) -> dict[str, str]:
    """Variables of one of two processes of mpirun (Open MPI 4)."""
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,10.0.0.9:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "JAX_COORDINATOR_PORT": str(port),
    } | more


def mpich(index: int, port: int, **more: str) -> dict[str, str]:
    """Variables of one of two processes of MPICH, which tells no address."""
    return {"PMI_SIZE": "2", "PMI_RANK": str(index), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"} | more


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("variables", "more", "flags", "where"),
    [
        (slurm, {}, (), "127.0.0.1"),
        # a node whose own name is a loopback address, as Debian has it
        slow(slurm, {"SLURM_STEP_NUM_NODES": "2", "SLURM_LAUNCH_NODE_IPADDR": own_address()}, (), own_address()),
        slow(slurm, {}, ("--coordinator", "127.0.0.2:{port}"), "127.0.0.2"),
        slow(slurm, {"JAX_COORDINATOR_BIND_ADDRESS": "0.0.0.0:{port}"}, (), "::"),
        slow(open_mpi, {}, (), "127.0.0.1"),
        slow(mpich, {}, (), "127.0.0.1"),
    ],
    ids=["slurm", "loopback name", "told by a flag", "told where to listen", "Open MPI", "MPICH"],
)
def test_the_coordinator_listens_where_the_launcher_says_and_nowhere_else(variables, more, flags, where):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags, more = [[one.format(port=port) for one in flags], {n: v.format(port=port) for n, v in more.items()}]
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", LISTENING, *flags],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(LAUNCH.parents[2]), "XLA_FLAGS": ""} | variables(i, port, **more),
        )
        for i in range(2)
    ]
    said = [task.communicate(timeout=60) for task in tasks]
    found = [json.loads(output.splitlines()[-1] if output else "[]") for output, _ in said]
    assert [one[:2] for one in found] == [[0, 2], [1, 2]], said
    assert [address.removeprefix("::ffff:") for address, at in found[0][2] if at == port] == [where]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("node[7-9]-ib", "node7-ib"),
        ("rack[0-1]node[3-4]", "rack0node3"),
        ("gpu-a.cluster.local,b", "gpu-a.cluster.local"),
    ],
)
def test_the_first_node_of_a_list_of_slurm(nodes, first):
    """As `scontrol show hostnames` expands them."""
    assert launchers.first_node(nodes) == first


SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (SLURM, "no SLURM_STEP_NODELIST"),
        (SLURM | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS must be a whole number"),
        (SLURM | {"SLURM_PROCID": "2"}, "SLURM_PROCID must be below SLURM_NTASKS, found 2 of 2"),
        (SLURM | {"SLURM_JOB_ID": "x", "SLURM_STEP_NODELIST": "localhost"}, "SLURM_JOB_ID must be a whole number"),
        (
            SLURM | {"JAX_COORDINATOR_PORT": "http", "SLURM_STEP_NODELIST": "localhost"},
            "the coordinator's address by Slurm must be HOST:PORT, found 'localhost:http'",
        ),
        (OPEN_MPI, "Open MPI, which started them, does not"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "nonsense"}, "Open MPI, which started them, does not"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "where the first of 4 processes is to listen"),
        ({"PMI_SIZE": "4", "PMI_RANK": ""}, "PMI_RANK must be a whole number"),
    ],
)
def test_a_launcher_that_tells_half_is_a_sentence(variables, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as found:
        cli.join_other_hosts([])
    assert said in str(found.value)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert cli.join_other_hosts(["--config", "c"]) == ["--config", "c"]


def test_a_single_process_joins_nobody_and_keeps_its_flags():
    flags = ["--config", "c.py", "--train.steps", "3"]
    assert cli.join_other_hosts(flags) == flags
