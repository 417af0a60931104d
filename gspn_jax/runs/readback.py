"""Reading back what was saved: a save is not a save until it was read."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gspn_jax.config import ConfigError

TRIAL = "trial"
"""The folder that `try_folder` makes and removes."""
_PATTERN = "[]*?\\"
"""Orbax takes the path of a checkpoint for a glob pattern, and tensorstore a backslash for a slash: such a checkpoint
is written, and cannot be read."""


def check_path(path: str | pathlib.Path, flag: str) -> None:
    """Raises ConfigError for a path under which checkpoints cannot be saved."""
    where = str(pathlib.Path(path).absolute())
    if os.path.exists(where) and not os.path.isdir(where):
        raise ConfigError(f"{flag} must be a folder, found a file at {where!r}")
    try:
        where.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are no text
        raise ConfigError(f"{flag} must lie in a path of valid Unicode, found {where!r}") from error
    found = [character for character in where if character in _PATTERN]
    if found:
        raise ConfigError(
            f"{flag} must lie in a path without any of {' '.join(_PATTERN)}, under which checkpoints could not be read "
            f"again, found {found[0]!r} in {where!r}"
        )


def try_folder(folder: pathlib.Path) -> None:
    """Saves something tiny in `folder`, reads it and removes it. Every host must call this.

    Raises ConfigError when it does not come back, before anything is trained that could not be saved.
    """
    where, wanted = folder / TRIAL, {"trial": np.arange(8.0)}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as trial:
            trial.save(where, args=ocp.args.Composite(state=ocp.args.StandardSave(wanted)))
            target = {"trial": np.zeros(8)}
            read = trial.restore(where, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        whole = np.array_equal(read["trial"], wanted["trial"])
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise ConfigError(f"nothing can be saved in {folder} and read back: {_first_line(error)}") from error
    finally:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                shutil.rmtree(where)
    if not whole:
        raise ConfigError(f"what is saved in {folder} must come back, found other values")


def difference(where: pathlib.Path, items: Mapping[str, Any]) -> str | None:
    """Difference of the checkpoint at `where` from `items`, which were saved there, as a clause; None for nothing.

    Of each item the structure is compared, and the values of its smallest array. Every host must call this.
    """
    for name, item in items.items():
        leaves, structure = jax.tree.flatten(item)
        smallest = min(range(len(leaves)), key=lambda i, leaves=leaves: leaves[i].size)
        target = [ocp.PLACEHOLDER] * len(leaves)
        leaf = leaves[smallest]
        own = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target[smallest] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)
        wanted = jax.tree.unflatten(structure, target)
        arguments = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                read = reader.restore(where, args=ocp.args.Composite(**{name: arguments}))[name]
            found = jax.tree.leaves(read)[smallest]
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            return f"{name} cannot be read ({_first_line(error)})"
        if any(not np.array_equal(*parts, equal_nan=True) for parts in zip(_parts(found), _parts(leaf), strict=True)):
            return f"{name} has other values"
    return None


def _parts(array: jax.Array | np.ndarray) -> list[np.ndarray]:
    """What this host has of an array."""
    return [np.asarray(part.data) for part in getattr(array, "addressable_shards", ())] or [np.asarray(array)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
