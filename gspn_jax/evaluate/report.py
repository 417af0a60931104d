"""A result as people read and compare it: the table, the JSON, and what would make a comparison unfair."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from gspn_jax.config import ConfigError
from gspn_jax.files import claim_free, numbered, replacing
from gspn_jax.small_files import read_as, typed
from gspn_jax.tables import METRICS

PUBLISHED_SAMPLES = 50_000
"""Number of samples that published numbers are computed of."""

_PACKAGES = ("gspn-jax", "jax", "jaxlib", "flax", "numpy", "scipy")


RESULT = {
    "samples": {"count": int, "labels": str | None, "sampler": {"name": str, "steps": int, "guidance_scale": float}},
    "metrics": dict[str, float],
}
"""Entries that every reader of a result needs."""
DRAWN = {"samples": {"run": str, "step": int, "images_seen": int, "ema_decay": float | None, "ema_width": float | None}}
"""Entries that a picture needs besides."""
SHOWN = {
    "samples": {
        "step": int,
        "ema_decay": float | None,
        "ema_width": float | None,
        "seed": int,
        "image_size": list[int],
        "source": str,
    },
    "reference": dict | None,
    "warnings": list[str],
}
"""Entries that `table` needs besides."""


def read_result(path: str | pathlib.Path, besides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The result of a run's samples that an evaluation wrote, with the fields of `RESULT` and those `besides`.

    Raises OSError, and DamagedFile for other files.
    """
    return typed(read_as(path, RESULT, nan=True), besides or {}, pathlib.Path(path).name)


def average(samples: Mapping[str, Any]) -> str:
    """The average that samples are of: "EMA 0.9999", or "EMA width 0.05" of a power function."""
    decay, width = samples.get("ema_decay"), samples.get("ema_width")
    return f"EMA width {width:g}" if decay is None and width is not None else f"EMA {decay or 0:g}"


def label(name: str) -> str:
    """Usual name of a metric; its name where this program does not know it."""
    return METRICS[name].label if name in METRICS else name


def unfair(
    names: Sequence[str],
    count: int,
    size: tuple[int, int],
    reference_size: tuple[int, int] | None,
    classes: Int[np.ndarray, " N"] | None,
) -> list[str]:
    """Reasons why metrics `names` of `count` images of `size` would not compare with published ones; a sentence each.

    `classes` are those of the images in their order, asked for or predicted.
    """
    said = []
    if count < PUBLISHED_SAMPLES and any(METRICS[name].needs for name in names):
        said.append(
            f"{count:,} samples, where published numbers are of {PUBLISHED_SAMPLES:,}: fewer samples give a "
            "higher FID, so compare only with results of as many"
        )
    if reference_size is not None and tuple(size) != tuple(reference_size):
        said.append(
            f"the samples are {_by(size)} and the images of the reference {_by(reference_size)}: the metrics "
            "see the difference in sharpness"
        )
    if "is" in names and classes is not None and sorted_by_class(classes):
        said.append(
            "the samples are sorted by class, so that each part of the Inception score has few of them: it is "
            "far from that of shuffled samples"
        )
    return said


def sorted_by_class(classes: Int[np.ndarray, " N"]) -> bool:
    """Tells whether equal classes stand side by side far more often than in a random order."""
    if len(classes) < 2:
        return False
    shares = np.unique(classes, return_counts=True)[1] / len(classes)
    by_chance = (shares**2).sum()
    return bool((classes[1:] == classes[:-1]).mean() > by_chance + 0.5 * (1 - by_chance))


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def environment() -> dict[str, Any]:
    """Versions and devices, as JSON values."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # used from a checkout
            versions[name] = None
    return {
        "versions": versions,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "hosts": jax.process_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def table(result: Mapping[str, Any]) -> str:
    """The metrics, one a line, below what they are of."""
    samples, reference = result["samples"], result["reference"]
    lines = [f"samples          {samples['count']:,} of {_by(samples['image_size'])} from {samples['source']}"]
    if "sampler" in samples:
        sampler = samples["sampler"]
        lines.append(
            f"                 step {samples['step']}, {average(samples)}, {sampler['name']} "
            f"{sampler['steps']} steps, guidance {sampler['guidance_scale']:g}, seed {samples['seed']}, "
            f"{samples['labels']} labels"
        )
    if "guide" in samples:
        guide = samples["guide"]
        lines.append(f"                 guided by {guide['run']}, step {guide['step']}, {average(guide)}")
    if reference:
        lines.append(f"reference        {reference['path']}")
    lines += [f"{label(name):16} {value:.6g}" for name, value in result["metrics"].items()]
    return "\n".join(lines + [f"warning: {text}" for text in result["warnings"]])


def keep(result: Mapping[str, Any], path: pathlib.Path, *, claimed: bool = False) -> pathlib.Path:
    """Writes the result to `path`, or NAME_1, NAME_2, ... where that exists, unless this process has `claimed` it.

    Returns where it is. Where that cannot be written it is kept in the current folder or in that of temporary files,
    as a last resort on stdout, and ConfigError says so.
    """
    text = json.dumps(result, indent=1) + "\n"
    try:
        return _write_new(path, text) if claimed else _write_free(path, text)
    except (OSError, ConfigError) as error:
        failure = error
    said = f"the result could not be written to {path} ({getattr(failure, 'strerror', None) or failure})"
    for folder in (pathlib.Path.cwd(), pathlib.Path(tempfile.gettempdir())):
        try:
            kept = _write_free(folder / path.name, text)
        except (OSError, ConfigError):
            continue
        raise ConfigError(f"{said}: it is kept in {kept}") from failure
    print(text)
    raise ConfigError(f"{said}, nor elsewhere: it is printed above") from failure


def _write_new(path: pathlib.Path, text: str) -> pathlib.Path:
    with replacing(path, new=True) as temporary:
        temporary.write_text(text)
    return path


def _write_free(path: pathlib.Path, text: str) -> pathlib.Path:
    with claim_free(numbered(path)) as free:
        return _write_new(free, text)


def free_path(path: pathlib.Path) -> pathlib.Path:
    """`path`, or NAME_1, NAME_2, ... where it exists."""
    return next(name for name in numbered(path) if not name.exists())
