"""Files and folders that a reader finds whole or not at all, and hashes of files."""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from gspn_jax.config import ConfigError


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary file beside `path` to write; it takes the place of `path` at the end, and is gone on an error."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(path: pathlib.Path) -> None:
    """Raises ConfigError unless `path` is free and its parent is there."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists already: choose another --output, or delete it")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output must lie in a folder that exists, found {str(path)!r}")


@contextlib.contextmanager
def new_folder(path: pathlib.Path, *, bytes_needed: int) -> Iterator[pathlib.Path]:
    """A temporary folder beside `path` to fill; it becomes `path` at the end, and is gone on an error.

    Raises ConfigError as `check_new_folder`, and when the disk has no room for `bytes_needed`.
    """
    check_new_folder(path)
    path = path.absolute()
    free = shutil.disk_usage(path.parent).free
    if free < bytes_needed:
        raise ConfigError(
            f"{path.name} needs {bytes_needed / 1e9:.2f} GB in {path.parent}, found {free / 1e9:.2f} GB free"
        )
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a call that was killed
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(path: str | pathlib.Path) -> str:
    """Hex digits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
