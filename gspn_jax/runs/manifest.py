"""The manifest of a checkpoint: the SHA-256 of every file, so that a disk's mistake is found before it is trained on.

It is written into the checkpoint before the rename that commits it: a committed checkpoint has one, and a folder
without one was never finished.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Callable

from gspn_jax.files import replacing
from gspn_jax.small_files import DamagedFile, is_within, read_as, typed

NAME = "manifest.json"
LATER = ("_CHECKPOINT_METADATA",)
"""Orbax writes the time of the commit into it; nothing that is restored is read from it."""
THREADS = min(8, os.cpu_count() or 1)
"""hashlib lets go of the interpreter, so that files are read and hashed side by side."""


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: pathlib.Path, step: int | None = None) -> None:
    """Hashes the files of `folder` into its manifest, as the checkpoint of `step` or of what the folder is called.

    Raises OSError.
    """
    step = int(folder.name) if step is None else step
    skipped = {folder / name for name in (NAME, *LATER)}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in skipped)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(_sha256, paths))
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashes, strict=True)
    }
    _write(folder, step, files)


def write_part(source: pathlib.Path, target: pathlib.Path, wanted: Callable[[str], bool]) -> None:
    """Writes the manifest of `target`, which has the files of `source` that are in `wanted` items: with the hashes that
    the manifest there has. Raises OSError or DamagedFile."""
    step, files = _read(source)
    _write(target, step, {name: file for name, file in files.items() if wanted(name.split("/")[0])})


def _write(folder: pathlib.Path, step: int | None, files: dict[str, dict]) -> None:
    with replacing(folder / NAME) as temporary:
        temporary.write_text(json.dumps({"version": 1, "step": step, "files": files}, indent=1) + "\n")


def size(folder: pathlib.Path) -> int:
    """Bytes of a checkpoint as its manifest has them."""
    return sum(file["bytes"] for file in _read(folder)[1].values())


def problem(folder: pathlib.Path, wanted: Callable[[str], bool] = lambda item: True) -> str | None:
    """Fault of a checkpoint, as a clause such as "params/d/4f is missing"; None when it is whole.

    Only the files of items (the checkpoint's sub-folders) that are `wanted` are read.
    """
    try:
        step, files = _read(folder)
        items = sorted(path.name for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        return f"it has no {NAME}: it was never finished"
    except DamagedFile as error:
        return f"its manifest is damaged: {error}"
    except OSError as error:
        return f"its {NAME} cannot be read ({error.strerror})"
    if step is not None and str(step) != folder.name:
        return f"it is the checkpoint of step {step} under another name"
    named = {name.split("/")[0] for name in files}
    unnamed = next((item for item in items if wanted(item) and item not in named), None)
    if unnamed:
        return f"its {NAME} names no file of {unnamed}"
    files = {name: file for name, file in files.items() if wanted(name.split("/")[0])}

    def check(entry: tuple[str, dict]) -> str | None:
        name, expected = entry
        path = folder / name
        try:
            about = path.stat()
            found = about.st_size
            if not stat.S_ISREG(about.st_mode):
                return f"{name} is no file"  # a pipe would wait, a device never end
            if found != expected["bytes"]:
                return f"{name} has {found} bytes, not the {expected['bytes']} that were written"
            if _sha256(path) != expected["sha256"]:
                return f"the content of {name} has changed (its SHA-256 is not that of the manifest)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return next((found for found in pool.map(check, files.items()) if found), None)


def _read(folder: pathlib.Path) -> tuple[int | None, dict[str, dict]]:
    """(step, {path: {"bytes", "sha256"}}), all within the checkpoint; the step is None in a manifest of an earlier
    version. Raises OSError or DamagedFile."""
    content = read_as(folder / NAME, {"step": int | None, "files": dict})
    files = content["files"]
    if not files:
        raise DamagedFile(f"{NAME} names no file")
    for name, file in files.items():
        typed(file, {"bytes": int, "sha256": str}, f"{name!r} in {NAME}")
        if not is_within(name):
            raise DamagedFile(f"{NAME} names {name!r}, which is no path within the checkpoint")
    return content["step"], files
