"""Check that the hosts that are about to work together do the same, with the same code."""

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jaxlib

import gspn_jax
from gspn_jax.config import ConfigError, RunConfig
from gspn_jax.files import sha256_of
from gspn_jax.parallel.agreement import difference, on_every_host
from gspn_jax.runs.same_run import flat

OWN = ("data.path", "eval.path", "model.folder", "data.workers", "eval.reference", "eval.inception", "eval.vae")
"""Settings that each host may have for itself, such as a copy of the data on its own disk."""
LIBRARIES = ("flax", "numpy", "optax")
"""Those whose arithmetic is part of a step."""
SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)
"""Those that decide numbers and programs: hosts whose programs differ wait for one another for ever."""
FILES = ("init_from", "distill.teacher", "model.folder", "eval.reference", "eval.inception", "eval.vae")
"""Settings that name files or folders which must hold the same on every host, wherever they lie."""
SMALL = 2**20
"""Bytes up to which a file in a folder is compared by its content; a larger one is by its size."""
OWN_FLAGS = ("vae", "inception", "reference", "images", "tars", "tfds_dir", "threads")
"""The same among the flags of commands."""


def check(config: RunConfig) -> None:
    """Raises ConfigError on every host when one has another config, other files that it names, another JAX or other
    code than the first.

    Every host must call this before anything that its config decides.
    """
    values = flat(dataclasses.asdict(config))
    check_values({name: value for name, value in values.items() if name not in OWN})
    check_files({name: values.get(name) for name in FILES})


def check_files(paths: Mapping[str, str | pathlib.Path | None]) -> None:
    """As `check`, for files and folders by their names; one that is not there is there on no host."""
    if jax.process_count() == 1:
        return
    named = {f"the content of {name}": path for name, path in paths.items() if path}
    check_values(on_every_host(lambda: {name: content(path) for name, path in named.items()}))


def content(path: str | pathlib.Path) -> str:
    """12 hex digits over a file, or over the names, sizes and small files of a folder; "missing" where nothing is."""
    path, total = pathlib.Path(path), hashlib.sha256()
    if not path.is_dir():
        return sha256_of(path)[:12] if path.exists() else "missing"
    for folder, folders, names in os.walk(path):
        folders.sort()
        for one in sorted(pathlib.Path(folder, name) for name in names):
            if one.is_file():
                size = one.stat().st_size
                about = sha256_of(one) if size <= SMALL else str(size)
                total.update(f"{one.relative_to(path).as_posix()}\n{about}\n".encode(errors="surrogateescape"))
    return total.hexdigest()[:12]


def check_data(fingerprint: str, class_names: Sequence[str]) -> None:
    """As `check`, for what a host found where its config says that the data are."""
    check_values({"the fingerprint of the data": fingerprint, "the class names": list(class_names)})


def check_flags(flags: Any, **more: Any) -> None:
    """As `check`, for the flags of a command (a dataclass) and `more` JSON values by their names."""
    check_values(
        {name: value for name, value in flat(dataclasses.asdict(flags)).items() if name not in OWN_FLAGS} | more
    )


def check_alone(command: str) -> None:
    """Raises ConfigError on every host where there are several: `command` is for one process."""
    if jax.process_count() > 1:
        raise ConfigError(f"{command} must run in one process, found {jax.process_count()}: start it once")


def check_values(values: dict[str, Any]) -> None:
    """As `check`, for JSON values by their names."""
    if jax.process_count() == 1:
        return
    found = difference(values | machine())
    if found:
        raise ConfigError(f"all hosts must do the same, but {found}: start the same command everywhere")


def machine() -> dict[str, Any]:
    """Versions, settings and devices that decide numbers beside the config, the same on every host."""
    local = jax.local_devices()
    return {
        "the version of JAX": f"{jax.__version__}, jaxlib {jaxlib.__version__}",
        "the versions of libraries": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES),
        "the digest of the code": code_digest(),
        "JAX's settings": {name: str(getattr(jax.config, name, None)) for name in SETTINGS},
        "the devices": f"{len(local)} {local[0].platform}",
    }


def code_digest() -> str:
    """16 hex digits over the package's own Python files."""
    root, total = pathlib.Path(gspn_jax.__file__).parent, hashlib.sha256()
    files = (
        pathlib.Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(".py")
    )
    for path in sorted(files):
        total.update(path.relative_to(root).as_posix().encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]
