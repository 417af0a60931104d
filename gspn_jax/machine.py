"""Memory that this machine, its container and this process have left."""

import pathlib
import re
import resource

from gspn_jax import control_groups


def free_memory() -> int | None:
    """Bytes that this process could still take: by Linux, by the limit of its container, and by its own (`ulimit -d`);
    None where none of them says."""
    found = [size for size in (_of_machine(), _of_container(), _of_process()) if size is not None]
    return min(found, default=None)


def _of_machine(path: str = "/proc/meminfo") -> int | None:
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _of_container() -> int | None:
    tightest = control_groups.tightest()
    return None if tightest is None else tightest.left


def _of_process(path: str = "/proc/self/status") -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        used = re.search(r"^VmData:\s+(\d+) kB$", pathlib.Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return max(0, limit - 1024 * int(used[1])) if used else None
