"""The processes of a job: how this one is told of the others, and joins them."""

import argparse
import os
import sys
from collections.abc import Sequence

from gspn_jax.config import ConfigError

HOSTS = {
    "--coordinator": "JAX_COORDINATOR_ADDRESS",
    "--num-processes": "JAX_NUM_PROCESSES",
    "--process-id": "JAX_PROCESS_ID",
}
"""The flags by which a process finds the others, and the variables that say the same."""
HEARTBEAT_SECONDS = 60
"""A host that has not been heard of for so long is lost, and the others stop. GSPN_HEARTBEAT_SECONDS changes it."""


def join_other_hosts(argv: Sequence[str] | None = None) -> list[str]:
    """Joins the processes of a job by jax.distributed; returns `argv` (of the process by default) without our flags.

    The place of this process comes from --coordinator HOST:PORT --num-processes N --process-id I, from the variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from Slurm if the step has several tasks. Does
    nothing for a single process. Raises ConfigError when only some of the three are given, or one is no number.
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
    arguments = {}
    if not missing:
        address, count, index = place.values()
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise ConfigError(f"--process-id must be a number below --num-processes, found {index!r} of {count!r}")
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"--coordinator must be HOST:PORT, found {address!r}")
        arguments = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    seconds = os.environ.get("GSPN_HEARTBEAT_SECONDS", str(HEARTBEAT_SECONDS))
    if not (seconds.isdigit() and int(seconds)):
        raise ConfigError(f"GSPN_HEARTBEAT_SECONDS must be a number of seconds greater than 0, found {seconds!r}")
    import jax

    jax.distributed.initialize(
        **arguments, local_device_ids=_local_device_ids(), heartbeat_timeout_seconds=int(seconds)
    )  # without a place it asks Slurm's variables
    return rest


def _local_device_ids() -> list[int] | None:
    """[], all that this process sees, where it is alone on its host: left to itself (None) JAX takes one GPU for every
    task of Slurm, which is right where a host has several."""
    hosts = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES")
    alone = hosts is None or hosts == os.environ.get("SLURM_NTASKS")
    return [] if alone and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None


def is_one_of_several() -> bool:
    """Whether flags of the command, the environment or Slurm say that there are other processes."""
    named = any(argument.split("=")[0] in HOSTS for argument in sys.argv) or any(map(os.environ.get, HOSTS.values()))
    return named or _in_slurm()


def _in_slurm() -> bool:
    """Whether this is one of several tasks of a Slurm step."""
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ
