"""The processes of a job: how this one is told of the others, and joins them."""

import argparse
import errno
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from gspn_jax.cli import child
from gspn_jax.config import ConfigError

HOSTS = {
    "--coordinator": "JAX_COORDINATOR_ADDRESS",
    "--num-processes": "JAX_NUM_PROCESSES",
    "--process-id": "JAX_PROCESS_ID",
}
"""The flags by which a process finds the others, and the variables that say the same."""
BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"
"""Where the first process listens when that is not the address that the others are told."""
HEARTBEAT_SECONDS = 60
"""A host that has not been heard of for so long is lost, and the others stop. GSPN_HEARTBEAT_SECONDS changes it."""
JOIN_SECONDS = 50
"""A process waits so long for the coordinator to listen. GSPN_JOIN_SECONDS changes it."""
ALL_SECONDS = 300
"""All processes must have come within so long of the first one's start, or within GSPN_JOIN_SECONDS if that is set."""


def join_other_hosts(argv: Sequence[str] | None = None) -> list[str]:
    """Joins the processes of a job by jax.distributed; returns `argv` (of the process by default) without our flags.

    The place of this process comes from --coordinator HOST:PORT --num-processes N --process-id I, from the variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from Slurm if the step has several tasks. Does
    nothing for a single process. The first process listens at the coordinator's address alone.

    Raises ConfigError when only some of the three are given, one is no number, nothing listens at the address, the
    first process cannot listen there, or not all processes come.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, variable in HOSTS.items():
        parser.add_argument(flag, dest=variable, default=os.environ.get(variable))
    chosen, rest = parser.parse_known_args(argv)
    place = vars(chosen)
    missing = [name for name in place if place[name] is None]
    if len(missing) == 3 and not _in_slurm():
        return rest
    if missing and not _in_slurm():
        flag = next(flag for flag, name in HOSTS.items() if name == missing[0])
        raise ConfigError(
            f"several processes need {', '.join(HOSTS)} or {', '.join(HOSTS.values())} in the "
            f"environment, found no {flag} or {missing[0]}"
        )
    heartbeat, patience = (
        _seconds("GSPN_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS),
        _seconds("GSPN_JOIN_SECONDS", JOIN_SECONDS),
    )
    arguments = {} if missing else _arguments(*place.values(), patience)  # without a place JAX asks Slurm's variables
    import jax

    where = arguments.get("coordinator_address", "the address that Slurm tells")
    try:
        with child.joining(f"the other processes could not be joined at {where}: JAX ended this one"):
            jax.distributed.initialize(
                **arguments,
                local_device_ids=_local_device_ids(),
                heartbeat_timeout_seconds=heartbeat,
                initialization_timeout=_seconds("GSPN_JOIN_SECONDS", ALL_SECONDS),
            )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the other processes could not be joined at {where} ({str(error).splitlines()[0][:200]}): all of them "
            "must be started with the same --coordinator and --num-processes, each with a --process-id of its own"
        ) from error
    return rest


def _arguments(address: str, count: str, index: str, patience: int) -> dict[str, Any]:
    """Arguments of jax.distributed.initialize for a place that was given; the coordinator is there."""
    if not (_is_number(count) and _is_number(index) and int(index) < int(count)):
        raise ConfigError(f"--process-id must be a number below --num-processes, found {index!r} of {count!r}")
    _, port = _split(address)
    arguments = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    if int(index):
        _wait_for_coordinator(address, patience)
        return arguments
    own = os.environ.get(BIND_ADDRESS)
    listening = own or address
    _check_free(listening, patience, told=own is not None)
    host, port = _split(listening)
    return arguments | {"coordinator_bind_address": f"{_quoted(_resolve(host, port)[-1][0])}:{port}"}


def _split(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, or of [HOST]:PORT for an address of IPv6."""
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not _is_number(port) or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator must be HOST:PORT, found {address!r}")
    return host, int(port)


def _quoted(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _resolve(host: str, port: int) -> tuple:
    """(family, kind, protocol, name, address) of a host, its IPv4 address if it has one. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return min(found, key=lambda entry: entry[0] != socket.AF_INET)


def _wait_for_coordinator(address: str, seconds: int) -> None:
    """Until something listens there. JAX itself would wait for minutes, and end with a stack of C++."""
    host, port = _split(address)
    end, said = time.monotonic() + seconds, "nothing"
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5, end - time.monotonic()))):
                return
        except socket.gaierror as error:
            said = f"no such host ({error.strerror})"
        except OSError as error:
            said = error.strerror or str(error)
        if time.monotonic() >= end:
            raise ConfigError(
                f"--coordinator must be where the process with --process-id 0 listens, found at {address} for "
                f"{seconds} s: {said}; GSPN_JOIN_SECONDS waits longer"
            )
        time.sleep(min(0.2, seconds))


def _check_free(address: str, seconds: int, *, told: bool) -> None:
    """Raises ConfigError unless this process can listen at an address, whose name may take a while to be known."""
    host, port = _split(address)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            _resolve(host, port)
            break
        except socket.gaierror:
            time.sleep(0.2)
    name = BIND_ADDRESS if told else "--coordinator"
    try:
        family, kind, protocol, _, where = _resolve(host, port)
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has just ended is no obstacle
            trial.bind(where)
            trial.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{name} {address}: port {port} is in use by another program, choose another one"
            ) from error
        hint = "" if told else f"; where it listens elsewhere, {BIND_ADDRESS} says"
        raise ConfigError(
            f"{name} must be an address of the host of process 0, which listens there, found {address} "
            f"({error.strerror}){hint}"
        ) from error


def _seconds(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not (_is_number(text) and int(text)):
        raise ConfigError(f"{variable} must be a number of seconds greater than 0, found {text!r}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _local_device_ids() -> list[int] | None:
    """[], all that this process sees, where it is alone on its host: left to itself (None) JAX takes one GPU for every
    task of Slurm, which is right where a host has several."""
    hosts = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES")
    alone = hosts is None or hosts == os.environ.get("SLURM_NTASKS")
    return [] if alone and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None


def is_one_of_several() -> bool:
    """Tells whether flags of the command, the environment or Slurm say that there are other processes."""
    named = any(argument.split("=")[0] in HOSTS for argument in sys.argv) or any(map(os.environ.get, HOSTS.values()))
    return named or _in_slurm()


def _in_slurm() -> bool:
    """Whether this is one of several tasks of a Slurm step."""
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ
