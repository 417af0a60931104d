"""Memory that Linux's control groups (of a container, a job of Slurm, a unit of systemd) leave this process.

A process may take no more than its group and every group above it have left. Version 2 says so in memory.max (at which
it is killed) and memory.high (from which on it is slowed to a halt), version 1 in memory.limit_in_bytes.
"""

import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

UNLIMITED = 2**60
"""Version 1 says the largest number of bytes that fits where there is no limit."""


class Limit(NamedTuple):
    """A limit of a group, and how much of it is left: what is only cached from files can be given back."""

    path: pathlib.Path
    limit: int
    left: int


class _Version(NamedTuple):
    """Names of files of a group."""

    limits: tuple[str, ...]
    used: str
    cached: str
    """Entry of memory.stat."""


_VERSIONS = {
    "cgroup2": _Version(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}
"""By the type of the file system that is mounted for it."""


def tightest(root: str | pathlib.Path = "/") -> Limit | None:
    """The limit that leaves this process least, None where there is none; `root` has proc/ and the groups."""
    return min(limits(pathlib.Path(root)), key=lambda limit: limit.left, default=None)


def limits(root: pathlib.Path) -> Iterator[Limit]:
    """All limits of the groups that this process is in, and of those above them."""
    for kind, top, group in _groups(root):
        version = _VERSIONS[kind]
        for folder in (group, *group.parents):
            used = _number(folder / version.used)
            for name in version.limits:
                limit = _number(folder / name)
                if limit is not None and used is not None and limit < UNLIMITED:
                    yield Limit(folder / name, limit, max(0, limit - used + _cached(folder, version.cached)))
            if folder == top:
                break


def _groups(root: pathlib.Path) -> Iterator[tuple[str, pathlib.Path, pathlib.Path]]:
    """(version, where it is mounted, the group of this process there) of each hierarchy that may limit memory."""
    try:
        mounts = (root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    own = {}
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        own |= {"cgroup2": path} if not controllers else {"cgroup": path} if "memory" in controllers.split(",") else {}
    for line in mounts:
        before, _, after = line.partition(" - ")
        kind, _, options = (*after.split(), "", "", "")[:3]
        if kind in own and (kind == "cgroup2" or "memory" in options.split(",")):
            base, mounted = (_unescaped(field) for field in before.split()[3:5])
            top = root / mounted.lstrip("/")
            yield kind, top, top / _below(own[kind], base)


def _below(path: str, base: str) -> str:
    """A group's path within what is mounted, which in a container is the container's own group."""
    inside = path == base or path.startswith(base.rstrip("/") + "/")
    return path[len(base.rstrip("/")) :].lstrip("/") if inside and ".." not in path.split("/") else ""


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _number(path: pathlib.Path) -> int | None:
    """None for a file that is not there, and for "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _cached(folder: pathlib.Path, name: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
