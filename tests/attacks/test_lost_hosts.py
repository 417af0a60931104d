"""Attacks on hosts that are one job, and on seeds (A): nothing is a mixture of two, or the same as another."""

import contextlib
import json
import socket
import sys

import pytest

import train_dit
from gspn_jax import sample
from tests.attacks.attack import GOES_ON, Attack, Call, draw, rows, train
from tests.attacks.attack import evaluate as evaluated
from tests.attacks.lost import function
from tests.training import tiny

# --- A2: hosts that differ

SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}


def host_that_fails(error):
    """What the first host says where the second has raised `error`."""

    def action(given, here, patch):
        import jax

        from gspn_jax.parallel import agreement

        patch.setattr(jax.distributed, "is_initialized", lambda: True)
        patch.setattr(agreement, "texts", lambda own: [own, agreement._said_by(error)])
        patch.setattr("gspn_jax.cli.exits._leave", lambda code, *_: sys.exit(code))
        agreement.on_every_host(lambda: None)

    return function(action)


def two_hosts(check, **other):
    """`check()` where another host says `other` of what is compared."""

    def action(given, here, patch):
        import jax

        from gspn_jax.parallel import agreement

        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(agreement, "texts", lambda own: [own, json.dumps(json.loads(own) | other)])
        check()

    return function(action)


def same_run():
    from gspn_jax.runs import same_hosts

    same_hosts.check(tiny.config("run"))


def same_data():
    from gspn_jax.runs import same_hosts

    same_hosts.check_data("f", ["cat", "dog"])


def same_samples():
    from gspn_jax.runs import same_hosts

    same_hosts.check_flags(sample.Arguments(run="run", seed=1))


def launched(**variables):
    """train_dit.py as one of several processes that a launcher has started."""

    def make(given, here):
        def main(argv):
            with pytest.MonkeyPatch.context() as patch:
                for name, value in {"GSPN_JOIN_SECONDS": "1", **variables}.items():
                    patch.setenv(name, value)
                train_dit.main(["--config", str(given.digits), "--run-dir", str(here / "run")])

        return Call(main)

    return make


def joined(address, index, *, environment=(), listening=None):
    """train_dit.py as one of two processes; `listening` makes a port that is in use."""

    def make(given, here):
        def main(argv):
            with contextlib.ExitStack() as stack:
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                for name, value in (("GSPN_JOIN_SECONDS", "1"), *environment):
                    patch.setenv(name, value)
                port = 1
                if listening is not None:
                    other = stack.enter_context(socket.socket())
                    other.bind(("127.0.0.1", 0))
                    port = other.getsockname()[1]
                    if listening:
                        other.listen()
                place = ("--coordinator", address.format(port=port), "--num-processes", "2", "--process-id", str(index))
                train_dit.main(["--config", str(given.digits), *place])

        return Call(main)

    return make


A2 = [
    Attack("A2", f"another host has {what}", two_hosts(check, **{name: value}), f"{name} is {said} on host 1")
    for what, name, value, said, check in (
        ("another learning rate", "optimizer.learning_rate", 0.1, "0.001 on host 0 and 0.1", same_run),
        ("another seed", "train.seed", 9, "0 on host 0 and 9", same_run),
        ("another number of steps", "train.steps", 99, "20 on host 0 and 99", same_run),
        ("another run directory", "run_dir", "other", '"run" on host 0 and "other"', same_run),
        ("other data", "the fingerprint of the data", "g", '"f" on host 0 and "g"', same_data),
        (
            "the classes in another order",
            "the class names",
            ["dog", "cat"],
            '["cat", "dog"] on host 0 and ["dog", "cat"]',
            same_data,
        ),
    )
] + [
    Attack("A2", "another host has another JAX", two_hosts(same_run, **{"the version of JAX": "0.1"}), "JAX is"),
    Attack("A2", "another host has other code", two_hosts(same_run, **{"the digest of the code": "0"}), "code is"),
    Attack(
        "A2", "another host samples with another seed", two_hosts(same_samples, seed=2), "seed is 1 on host 0 and 2"
    ),
    Attack("A2", "another host has nothing else", two_hosts(same_run), "", code=GOES_ON),
    Attack(
        "A2",
        "a coordinator of a name that no host has",
        joined("no-such-host.invalid:1234", 1),
        ("--coordinator must be where", "no such host"),
    ),
    Attack(
        "A2",
        "a coordinator where nothing listens",
        joined("127.0.0.1:{port}", 1, listening=False),
        ("--coordinator must be where", "Connection refused", "GSPN_JOIN_SECONDS waits longer"),
    ),
    Attack(
        "A2",
        "the first process on a port that is in use",
        joined("127.0.0.1:{port}", 0, listening=True),
        "is in use by another program",
    ),
    Attack(
        "A2",
        "the first process at an address of another machine",
        joined("192.0.2.1:1234", 0),
        ("--coordinator must be an address of the host of process 0", "JAX_COORDINATOR_BIND_ADDRESS says"),
    ),
    *(
        Attack("A2", what, launched(**variables), says)
        for what, variables, says in (
            ("Slurm's tasks without srun", SLURM, "start them with srun"),
            ("Slurm's number of tasks is none", SLURM | {"SLURM_NTASKS": "²"}, "SLURM_NTASKS must be a whole number"),
            ("Slurm's task 2 of 2", SLURM | {"SLURM_PROCID": "2"}, "SLURM_PROCID must be below SLURM_NTASKS"),
            (
                "Slurm's second task, whose first host has nothing that listens",
                SLURM | {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "1", "JAX_COORDINATOR_PORT": "1"},
                ("the coordinator's address by Slurm must be where", "found at localhost:1", "Connection refused"),
            ),
            (
                "Slurm's first task on another host than the first of its list",
                SLURM | {"SLURM_STEP_NODELIST": "192.0.2.[1-2]"},
                "the coordinator's address by Slurm must be an address of the host of process 0",
            ),
            (
                "Slurm's second task, whose first host is unknown",
                SLURM | {"SLURM_STEP_NODELIST": "no-such-node.invalid", "SLURM_PROCID": "1"},
                "no such host",
            ),
            (
                "Slurm's port that is none",
                SLURM | {"SLURM_STEP_NODELIST": "localhost", "JAX_COORDINATOR_PORT": "http"},
                "must be HOST:PORT, found 'localhost:http'",
            ),
            (
                "processes of Open MPI 5, which tells no address",
                {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
                "Open MPI, which started them, does not",
            ),
            ("processes of MPICH, which tells no address", {"PMI_SIZE": "2", "PMI_RANK": "1"}, "first of 2 processes"),
        )
    ),
    Attack(
        "A2",
        "processes of MPICH that are to be alone",
        launched(PMI_SIZE="2", PMI_RANK="1", JAX_NUM_PROCESSES="1"),
        "",
        GOES_ON,
        writes=("run*",),
    ),
    Attack("A2", "a coordinator of an empty name", joined(":1234", 1), "--coordinator must be HOST:PORT"),
    Attack("A2", "a coordinator of a name that no host can have", joined("a..b:1", 1), "no such host"),
    Attack("A2", "a coordinator of a name of 300 letters", joined(f"{'x' * 300}:1", 0), "found xxx"),
    Attack("A2", "a coordinator of port 0", joined("localhost:0", 0), "--coordinator must be HOST:PORT"),
    Attack("A2", "a coordinator with a scheme", joined("http://localhost:1", 1), "no such host"),
    Attack(
        "A2",
        "a host cannot read its config",
        host_that_fails(SystemExit(2)),
        "host 1 says: it has ended, see its own stderr",
    ),
    Attack("A2", "a host has no data", host_that_fails(OSError("nothing at /data")), "host 1 says: nothing at /data"),
    Attack(
        "A2",
        "another host has other settings of JAX",
        two_hosts(same_run, **{"JAX's settings": {"jax_enable_x64": True}}),
        "JAX's settings is",
    ),
    Attack("A2", "another host has other devices", two_hosts(same_run, **{"the devices": "2 cpu"}), "the devices is"),
    Attack(
        "A2",
        "another host has another optax",
        two_hosts(same_run, **{"the versions of libraries": "1"}),
        "libraries is",
    ),
    Attack("A2", "a port of six digits", joined("localhost:123456", 1), "--coordinator must be HOST:PORT"),
    Attack(
        "A2",
        "a time to wait that is none",
        joined("localhost:1", 1, environment=(("GSPN_JOIN_SECONDS", "²"),)),
        "GSPN_JOIN_SECONDS must be a number of seconds",
    ),
]


# --- A8: seeds

A8 = [
    Attack("A8", what, make, (said, f"found {said_of}"))
    for what, make, said, said_of in (
        ("sampled with seed -1", draw("--seed", "-1"), "--seed must be", -1),
        ("sampled with seed 2**64", draw("--seed", str(2**64)), "--seed must be", 2**64),
        (
            "samples by the thousand with seed 2**64",
            draw("--num-samples", "4", "--output", "{here}/q.npz", "--seed", str(2**64)),
            "--seed must be",
            2**64,
        ),
        ("evaluated with seed 2**64", evaluated("--run", "{run}", "--seed", str(2**64)), "--seed must be", 2**64),
        ("trained with seed 2**32", train("--train.seed", str(2**32)), "train.seed must be 0 or more and below", 2**32),
        ("evaluated in training with seed 2**64", train("--eval.seed", str(2**64)), "eval.seed must be", 2**64),
    )
] + [
    Attack("A8", f"sampled with seed {name}", draw("--seed", str(value)), "", code=GOES_ON)
    for name, value in (("2**32", 2**32), ("2**63", 2**63), ("2**64-1", 2**64 - 1))
]


ATTACKS = [*A2, *A8]


@rows(ATTACKS)
def test_nothing_is_mixed(attack, withstand):
    withstand(attack)
