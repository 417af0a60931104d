"""Launchers that start several processes of one job, and what their variables tell a process of the others.

The variables and the ports are those that JAX's own detection reads (`jax.distributed.initialize`), which would let the
coordinator listen on every interface; MPICH and others with its process manager tell no address, and JAX does not know
them.
"""

import dataclasses
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping

from gspn_jax.config import ConfigError

Environment = Mapping[str, str]
PORT = "JAX_COORDINATOR_PORT"
"""Port of the coordinator in place of the one that follows from the job's number."""
PORTS = range(65536 - 2**12, 65536)


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Names of the variables of a launcher."""

    name: str
    count: str
    index: str
    local_index: str
    """Number of the process among those of its host."""
    alone: Callable[[Environment], bool]
    """Tells whether each process has a host for itself."""
    address: Callable[[Environment], str | None]
    """HOST:PORT where the first process listens; None where the variables do not tell."""

    def place(self, environment: Environment) -> tuple[int, int]:
        """(number of processes, number of this one). Raises ConfigError for variables that do not say so."""
        count, index = (_whole(environment, name) for name in (self.count, self.index))
        if index >= count:
            raise ConfigError(f"{self.index} must be below {self.count}, found {index} of {count}")
        return count, index

    def devices(self, environment: Environment) -> list[int]:
        """[], all that this process sees, where it is alone on its host; else the one of its number there."""
        return [] if self.alone(environment) else [_whole(environment, self.local_index)]


def launcher(environment: Environment) -> Launcher | None:
    """The launcher that says that there are several processes, None if none does."""
    return next((one for one in LAUNCHERS if environment.get(one.count, "1") != "1" and one.index in environment), None)


def _whole(environment: Environment, name: str) -> int:
    text = environment.get(name)
    if text is None or not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"{name} must be a whole number, as the launcher sets it, found {text!r}")
    return int(text)


def _slurm_address(environment: Environment) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST")
    if not nodes:
        raise ConfigError(
            "Slurm says that there are several tasks (SLURM_NTASKS) and not where (no SLURM_STEP_NODELIST): start them "
            "with srun, or a process that is to be alone with JAX_NUM_PROCESSES=1"
        )
    port = environment.get(PORT) or PORTS[_whole(environment, "SLURM_JOB_ID") % len(PORTS)]
    first, towards = first_node(nodes), environment.get("SLURM_LAUNCH_NODE_IPADDR")
    several = _slurm_hosts(environment) not in (None, "1")
    return f"{on_the_network(first, towards) if several and towards else first}:{port}"


def first_node(nodes: str) -> str:
    """The first name of Slurm's list of nodes: node007 of "node[007-009,12],login"."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", nodes)[0]
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)


def on_the_network(host: str, towards: str) -> str:
    """`host`, or where that is a loopback address here, this machine's own address towards another one.

    Debian gives a machine's own name 127.0.1.1 in /etc/hosts, where processes of other machines do not find it.
    """
    try:
        if not ipaddress.ip_address(socket.gethostbyname(host)).is_loopback:
            return host
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((towards, 9))  # sends nothing
            return route.getsockname()[0]
    except OSError:
        return host


def _slurm_hosts(environment: Environment) -> str | None:
    return environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES")


def _slurm_alone(environment: Environment) -> bool:
    return _slurm_hosts(environment) in (None, environment.get("SLURM_NTASKS"))


def _open_mpi_address(environment: Environment) -> str | None:
    """Of version 4, whose mpirun says where it listens itself: "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"."""
    found = _MPIRUN.match(environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if not found:
        return None
    host = found["four"] or f"[{found['six']}]"
    return f"{host}:{environment.get(PORT) or PORTS[int(found['job']) // 2**12 % len(PORTS)]}"


_MPIRUN = re.compile(r"(?P<job>\d{1,18})\.\d+;(?:tcp://(?P<four>[^,:]+)|tcp6://\[(?P<six>[^],]+))")


LAUNCHERS = (
    Launcher("Slurm", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", _slurm_alone, _slurm_address),
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        lambda environment: environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") == "1",
        _open_mpi_address,
    ),
    Launcher(
        "MPI",
        "PMI_SIZE",
        "PMI_RANK",
        "MPI_LOCALRANKID",
        lambda environment: environment.get("MPI_LOCALNRANKS", "1") == "1",
        lambda environment: None,
    ),
)
