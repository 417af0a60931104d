"""Files and folders that a reader finds whole or not at all, outputs that one process makes at a time, and hashes.

What lies beside an output while it is made has a hidden name of ours (`.NAME.….unfinished`, `.NAME.lock`), which no
file of a user has; a process that dies leaves it unlocked, and the next one that makes the same output removes it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator

from gspn_jax.config import ConfigError
from gspn_jax.small_files import DamagedFile, read_as

log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of a file system that has no locks."""
_LONGEST_NAME = 150
"""Bytes of a name that is written out in a hidden one; file systems allow 255 in all."""


class ClaimedError(ConfigError):
    """An output that another process is making; `holder` names it, such as "process 12 on node3 (sample.py)"."""

    def __init__(self, message: str, holder: str):
        super().__init__(message)
        self.holder = holder


@contextlib.contextmanager
def replacing(path: pathlib.Path, *, new: bool = False) -> Iterator[pathlib.Path]:
    """A temporary file beside `path` to write; it takes the place of `path` at the end, and is gone on an error.

    With `new`, raises ConfigError in place of replacing a file that has appeared at `path`.
    """
    _remove_abandoned(path)
    temporary, lock = _create_locked(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if new:
            _move_to_free_name(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def check_new_folder(path: pathlib.Path) -> None:
    """Raises ConfigError unless `path` is free and its parent is there."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists already: choose another --output, or delete it")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output must lie in a folder that exists, found {str(path)!r}")


@contextlib.contextmanager
def new_folder(path: pathlib.Path, *, bytes_needed: int) -> Iterator[pathlib.Path]:
    """A temporary folder beside `path` to fill; it becomes `path` at the end, and is gone on an error.

    Raises ConfigError as `check_new_folder` and `claim`, and when the disk has no room for `bytes_needed`.
    """
    path = path.absolute()
    check_new_folder(path)
    with claim(path):
        check_new_folder(path)  # the process that had the claim may have just made it
        free = shutil.disk_usage(path.parent).free
        if free < bytes_needed:
            raise ConfigError(
                f"{path.name} needs {bytes_needed / 1e9:.2f} GB in {path.parent}, found {free / 1e9:.2f} GB free"
            )
        for left in _unfinished(path):  # of processes that were killed: the one with the claim makes such folders
            shutil.rmtree(left, ignore_errors=True)
        temporary = _unfinished_name(path)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as written:
                        os.fsync(written.fileno())
            check_new_folder(path)
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def claim(path: str | pathlib.Path, *, lock: pathlib.Path | None = None) -> Iterator[None]:
    """The right to make `path`, which one process has at a time: until the end of the block or of the process, however
    it ends. `lock` is the file that stands for it and stays; by default a hidden one beside `path`, which does not.

    Raises ClaimedError when another process has it. On a file system without locks it is given with a warning.
    """
    path = pathlib.Path(path).absolute()
    lock, stays = lock or _hidden(path, "lock"), lock is not None
    descriptor = _open_locked(lock)
    if descriptor is None:
        holder = _holder(lock)
        raise ClaimedError(f"{path} is being made by {holder}: wait for it, end it, or choose another output", holder)
    try:
        os.ftruncate(descriptor, 0)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "command": _command(), "since": _now()}
        os.pwrite(descriptor, json.dumps(about).encode(), 0)
        yield
    finally:
        if not stays:
            lock.unlink(missing_ok=True)  # while it is locked: who has opened it will find that it is gone
        os.close(descriptor)


@contextlib.contextmanager
def claim_new(path: pathlib.Path, flag: str = "--output") -> Iterator[pathlib.Path]:
    """`claim`, for a file that must not exist. Raises ConfigError naming `flag` when it does, or has no folder."""
    _check_new_file(path, flag)
    with claim(path):
        _check_new_file(path, flag)  # the process that had the claim may have just made it
        yield path


@contextlib.contextmanager
def claim_free(paths: Iterable[pathlib.Path]) -> Iterator[pathlib.Path]:
    """The first of `paths` that neither exists nor is claimed, claimed."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            try:
                stack.enter_context(claim_new(path))
            except ConfigError:
                if not path.parent.is_dir():
                    raise
            else:
                yield path
                return


def numbered(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """`path`, then NAME_1, NAME_2, ..."""
    yield path
    number = 1
    while True:
        yield path.with_stem(f"{path.stem}_{number}")
        number += 1


def remove_leftovers(path: pathlib.Path) -> None:
    """Removes what processes that were killed left beside the finished file `path`: unfinished ones, and a claim."""
    _remove_abandoned(path)
    lock = _hidden(path, "lock")
    if lock.exists():
        with contextlib.suppress(ClaimedError), claim(path):
            pass  # which removes it at the end


def sha256_of(path: str | pathlib.Path) -> str:
    """Hex digits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_new_file(path: pathlib.Path, flag: str) -> None:
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists already: choose another {flag}, or delete it")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{flag} must lie in a folder that exists, found {str(path)!r}")


def _hidden(path: pathlib.Path, suffix: str) -> pathlib.Path:
    """A hidden name of ours beside `path`; a long name is in it as a digest."""
    name = os.fsencode(path.name)
    shown = path.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()[:32]
    return path.with_name(f".{shown}.{suffix}")


def _unfinished_name(path: pathlib.Path) -> pathlib.Path:
    return _hidden(path, f"{secrets.token_hex(8)}.unfinished")


def _unfinished(path: pathlib.Path) -> list[pathlib.Path]:
    """The unfinished files or folders that stand for `path`."""
    ours = re.compile(re.escape(_hidden(path, "").name) + r"[0-9a-f]{16}\.unfinished")
    with contextlib.suppress(PermissionError), os.scandir(path.absolute().parent) as entries:
        return [path.with_name(entry.name) for entry in entries if ours.fullmatch(entry.name)]
    return []


def _create_locked(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """(a new unfinished file for `path`, its open descriptor, whose lock says that somebody is at work)."""
    while True:
        temporary = _unfinished_name(path)
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if _lock(descriptor) and _is(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)  # taken for abandoned, before it was locked


def _remove_abandoned(path: pathlib.Path) -> None:
    """Removes what processes that were killed left unfinished of the file `path`."""
    for left in _unfinished(path):
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDWR)
            try:
                if _lock(descriptor, sure=True):
                    left.unlink()
            finally:
                os.close(descriptor)


def _open_locked(lock: pathlib.Path) -> int | None:
    """A descriptor of the file `lock`, locked; None when another process has the lock."""
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        if not _lock(descriptor):
            os.close(descriptor)
            return None
        if _is(descriptor, lock):
            return descriptor
        os.close(descriptor)  # the process that had it has just removed it


def _lock(descriptor: int, *, sure: bool = False) -> bool:
    """Locks an open file, without waiting. Where there are no locks: True, or False to be `sure`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("the file system has no locks (%s): nothing tells two processes apart that write there", error)
        return not sure
    return True


def _is(descriptor: int, path: pathlib.Path) -> bool:
    """Whether `path` is still the file that is open as `descriptor`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _move_to_free_name(temporary: pathlib.Path, path: pathlib.Path) -> None:
    try:
        os.link(temporary, path)  # which, unlike a rename, never replaces
    except FileExistsError as error:
        raise ConfigError(f"{path} was written by another program in the meantime, and is left as it is") from error
    except OSError:  # no hard links here
        _check_new_file(path, "--output")
        os.replace(temporary, path)


def _holder(lock: pathlib.Path) -> str:
    """The process that has a lock, as it says of itself."""
    try:
        about = read_as(lock, {"pid": int, "host": str, "command": str, "since": str})
        return f"process {about['pid']} on {about['host']} ({about['command']}, since {about['since']})"
    except (OSError, DamagedFile):
        return "another process"


def _command() -> str:
    return pathlib.Path(sys.argv[0] or "python").name


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
