"""The processes of a job: how this one is told of the others, and joins them."""

import argparse
import dataclasses
import errno
import ipaddress
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gspn_jax.cli import child, last_words, launchers
from gspn_jax.config import ConfigError

log = logging.getLogger(__name__)

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
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and what these leave out from the variables of Slurm,
    Open MPI or another MPI that has started several processes (`launchers`). Does nothing for a single process. The
    first process listens at the coordinator's address alone.

    Raises ConfigError when only some of the three are known, one is no number, nothing listens at the address, the
    first process cannot listen there, or not all processes come.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, variable in HOSTS.items():
        parser.add_argument(flag, dest=variable, default=os.environ.get(variable))
    chosen, rest = parser.parse_known_args(argv)
    place = _place(vars(chosen))
    if place is None:
        return rest
    heartbeat, patience = (
        _seconds("GSPN_HEARTBEAT_SECONDS", HEARTBEAT_SECONDS),
        _seconds("GSPN_JOIN_SECONDS", JOIN_SECONDS),
    )
    arguments = _arguments(place, patience)
    import jax

    try:
        with child.joining(f"the other processes could not be joined at {place.address}: JAX ended this one"):
            jax.distributed.initialize(
                **arguments,
                heartbeat_timeout_seconds=heartbeat,
                initialization_timeout=_seconds("GSPN_JOIN_SECONDS", ALL_SECONDS),
            )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the other processes could not be joined at {place.address} ({str(error).splitlines()[0][:200]}): all of "
            "them must be started with the same --coordinator and --num-processes, each with a --process-id of its own"
        ) from error
    last_words.listen()
    return rest


@dataclasses.dataclass(frozen=True)
class Place:
    """Place of this process among several."""

    address: str
    count: int
    index: int
    told_by: str
    """Source of the address, as an error names it."""


def _place(chosen: Mapping[str, str | None]) -> Place | None:
    """Place by what was `chosen` (by variable of HOSTS) and, for the rest, by the launcher; None for a process that is
    alone."""
    address, count, index = (chosen[variable] for variable in HOSTS.values())
    by = launchers.launcher(os.environ)
    missing = [flag for flag, variable in HOSTS.items() if chosen[variable] is None]
    if (len(missing) == 3 and by is None) or (address is None and count == "1"):
        return None
    if missing and by is None:
        raise ConfigError(
            f"several processes need {', '.join(HOSTS)} or {', '.join(HOSTS.values())} in the "
            f"environment, found no {missing[0]} or {HOSTS[missing[0]]}"
        )
    told_by = "--coordinator" if address is not None or by is None else f"the coordinator's address by {by.name}"
    if missing and by:
        launched = by.place(os.environ)
        count, index = count or str(launched[0]), index or str(launched[1])
        address = by.address(os.environ) if address is None else address
        if address is None:
            raise ConfigError(
                f"--coordinator or {HOSTS['--coordinator']} must say HOST:PORT, where the first of {count} processes "
                f"is to listen: {by.name}, which started them, does not; processes that have nothing to do with one "
                f"another are started with {HOSTS['--num-processes']}=1"
            )
    if not (_is_number(count) and _is_number(index) and int(index) < int(count)):
        raise ConfigError(f"--process-id must be a number below --num-processes, found {index!r} of {count!r}")
    return Place(address, int(count), int(index), told_by)


def _arguments(place: Place, patience: int) -> dict[str, Any]:
    """What jax.distributed.initialize is told; the coordinator is there."""
    _split(place.address, place.told_by)
    arguments = {
        "coordinator_address": place.address,
        "num_processes": place.count,
        "process_id": place.index,
        "local_device_ids": _local_device_ids(),
    }
    if place.index:
        _wait_for_coordinator(place, patience)
        return arguments
    own = os.environ.get(BIND_ADDRESS)
    if own:
        return arguments | {"coordinator_bind_address": _free_address(own, BIND_ADDRESS, patience)}
    listening = _free_address(place.address, place.told_by, patience)
    return arguments | {"coordinator_bind_address": listening, "coordinator_address": listening}


def _split(address: str, told_by: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, or of [HOST]:PORT for an address of IPv6."""
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not _is_number(port) or not 0 < int(port) < 2**16:
        raise ConfigError(f"{told_by} must be HOST:PORT, found {address!r}")
    return host, int(port)


def _resolve(host: str, port: int) -> list[tuple]:
    """[(family, kind, protocol, name, address), ...] of a host, those of IPv4 first. Raises OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a name that no host can have
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
    return sorted(found, key=lambda entry: entry[0] != socket.AF_INET)


def _wait_for_coordinator(place: Place, seconds: int) -> None:
    """Until something listens there. JAX itself would wait for minutes, and end with a stack of C++."""
    host, port = _split(place.address, place.told_by)
    end, said = time.monotonic() + seconds, "nothing"
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5, end - time.monotonic()))):
                return
        except (socket.gaierror, UnicodeError) as error:
            said = f"no such host ({getattr(error, 'strerror', None) or error})"
        except OSError as error:
            said = error.strerror or str(error)
        if time.monotonic() >= end:
            raise ConfigError(
                f"{place.told_by} must be where the process with --process-id 0 listens, found at {place.address} for "
                f"{seconds} s: {said}; GSPN_JOIN_SECONDS waits longer"
            )
        time.sleep(min(0.2, seconds))


def _free_address(address: str, told_by: str, seconds: int) -> str:
    """ADDRESS:PORT, in numbers, at which this process can listen by an address whose name may take a while to be known.

    Raises ConfigError where it cannot.
    """
    host, port = _split(address, told_by)
    end, failure = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            _resolve(host, port)
            break
        except socket.gaierror:
            time.sleep(0.2)
    try:
        for family, kind, protocol, _, where in _resolve(host, port):
            try:
                with socket.socket(family, kind, protocol) as trial:
                    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has just ended is no obstacle
                    trial.bind(where)
                    trial.listen(1)
            except OSError as error:
                failure = failure or error
            else:
                _warn_of_loopback(host, where[0])
                return f"[{where[0]}]:{port}" if ":" in where[0] else f"{where[0]}:{port}"
    except OSError as error:
        failure = error
    if failure and failure.errno == errno.EADDRINUSE:
        other = "" if told_by in (*HOSTS, BIND_ADDRESS) else f" ({launchers.PORT})"
        raise ConfigError(
            f"{told_by} {address}: port {port} is in use by another program, choose another one{other}"
        ) from failure
    hint = "" if told_by == BIND_ADDRESS else f"; where it listens elsewhere, {BIND_ADDRESS} says"
    raise ConfigError(
        f"{told_by} must be an address of the host of process 0, which listens there, found {address} "
        f"({failure and failure.strerror}){hint}"
    ) from failure


def _warn_of_loopback(host: str, where: str) -> None:
    """Says that a host's own name is an address that only this host can reach, as /etc/hosts of Debian has it."""
    if host not in (where, "localhost") and ipaddress.ip_address(where.partition("%")[0]).is_loopback:
        log.warning(
            "%s is %s here, where processes of other hosts do not reach it: %s says where else this one listens",
            host,
            where,
            BIND_ADDRESS,
        )


def _seconds(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not (_is_number(text) and int(text)):
        raise ConfigError(f"{variable} must be a number of seconds greater than 0, found {text!r}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _local_device_ids() -> list[int] | None:
    """[], all that this process sees, where it is alone on its host; one of them where a launcher started several
    there. None is what JAX_LOCAL_DEVICE_IDS says."""
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    by = launchers.launcher(os.environ)
    return by.devices(os.environ) if by else []


def is_one_of_several() -> bool:
    """Tells whether flags of the command, the environment or a launcher say that there are other processes."""
    named = any(argument.split("=")[0] in HOSTS for argument in sys.argv) or any(map(os.environ.get, HOSTS.values()))
    return named or launchers.launcher(os.environ) is not None
