"""Memory that this machine, its container and this process have left."""

import pathlib
import re
import resource


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


def _of_container(folder: str = "/sys/fs/cgroup") -> int | None:
    """By control groups, version 2; what is only cached from files can be given back."""
    try:
        limit, used, stat = (
            pathlib.Path(folder, name).read_text().strip() for name in ("memory.max", "memory.current", "memory.stat")
        )
        cached = dict(line.split() for line in stat.splitlines()).get("inactive_file", 0)
        return None if limit == "max" else int(limit) - int(used) + int(cached)
    except (OSError, ValueError):
        return None


def _of_process(path: str = "/proc/self/status") -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        used = re.search(r"^VmData:\s+(\d+) kB$", pathlib.Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return max(0, limit - 1024 * int(used[1])) if used else None
