"""A grid of results, averages x guidance scales: its table, its file with the hashes of its cells, and its picture."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gspn_jax import extras
from gspn_jax.config import ConfigError
from gspn_jax.evaluate import report
from gspn_jax.files import claim, sha256_of
from gspn_jax.parallel.agreement import on_first_host
from gspn_jax.small_files import DamagedFile, read_json
from gspn_jax.tables import METRICS

log = logging.getLogger(__name__)

FOLDER = "grids"
"""Folder of the grids, in RUN/evaluation."""


class Cell(NamedTuple):
    """A result and its file; None on other hosts than the first."""

    result: dict[str, Any]
    path: pathlib.Path | None


@contextlib.contextmanager
def claimed(folder: pathlib.Path) -> Iterator[None]:
    """The right to draw grids of a run, which one process has at a time. Every host must call this.

    Raises ConfigError when another process has it.
    """
    with contextlib.ExitStack() as stack:
        on_first_host(lambda: stack.enter_context(claim(folder / FOLDER)), ConfigError, OSError)
        yield


def write(cells: Sequence[Cell], scales: Sequence[float], folder: pathlib.Path, step: int) -> None:
    """Prints the grid of `cells`, row by row of as many as there are `scales`; writes it to a free name in
    FOLDER/grids, unless it is there already, and draws it beside."""
    content = summary(cells, scales)
    print(f"\n{table(content)}")
    path = _path(folder, step)
    known = next((one for one in sorted(path.parent.glob("*.json")) if _same(one, content)), None)
    if known:
        print(f"{known} has this grid already")
        return
    written = report.keep(content, path)
    print(f"written to {written}")
    try:
        draw(content, written.with_suffix(".png"))
    except (ConfigError, OSError) as error:
        print(f"no picture: {error}")


def summary(cells: Sequence[Cell], scales: Sequence[float]) -> dict[str, Any]:
    """The grid as JSON values: "averages" (rows), "guidance_scales" (columns), "metrics" {name: rows of numbers} and
    "cells", rows of file names with their SHA-256."""
    rows = [cells[start : start + len(scales)] for start in range(0, len(cells), len(scales))]
    names = [name for name in cells[0].result["metrics"] if all(name in cell.result["metrics"] for cell in cells)]
    return {
        "averages": [report.average(row[0].result["samples"]) for row in rows],
        "guidance_scales": list(scales),
        "metrics": {name: [[cell.result["metrics"][name] for cell in row] for row in rows] for name in names},
        "cells": [
            [{"file": cell.path.name, "sha256": sha256_of(cell.path)} for cell in row if cell.path] for row in rows
        ],
        "count": cells[0].result["samples"]["count"],
    }


def table(content: Mapping[str, Any]) -> str:
    """A table of each metric; its best cell has a star."""
    lines = []
    for name, rows in content["metrics"].items():
        best = best_of(name, rows)
        head = f"{report.label(name)} of {content['count']:,} samples"
        lines += [head, " " * 18 + "".join(f"{f'guidance {scale:g}':>16}" for scale in content["guidance_scales"])]
        for i, (average, values) in enumerate(zip(content["averages"], rows, strict=True)):
            cells = (f"{value:.6g}{'*' if (i, j) == best else ' '}" for j, value in enumerate(values))
            lines.append(f"{average:18}" + "".join(f"{cell:>16}" for cell in cells))
        lines.append("")
    return "\n".join(lines[:-1])


def best_of(name: str, rows: Sequence[Sequence[float]]) -> tuple[int, int] | None:
    """(row, column) of the best number of a metric; None where all are NaN."""
    sign = -1 if _higher(name) else 1
    found = [(sign * value, (i, j)) for i, row in enumerate(rows) for j, value in enumerate(row) if value == value]
    return min(found)[1] if found else None


def _higher(name: str) -> bool:
    return name in METRICS and METRICS[name].higher


def draw(content: Mapping[str, Any], output: pathlib.Path) -> None:
    """A coloured grid of each metric, with its numbers. Raises ConfigError without matplotlib."""
    extras.require("plot", "matplotlib", by="drawing")
    from matplotlib.figure import Figure

    metrics, scales, averages = content["metrics"], content["guidance_scales"], content["averages"]
    size = (2.5 + 0.9 * len(scales)) * len(metrics), 1.2 + 0.45 * len(averages)
    figure = Figure(figsize=size, layout="constrained")
    for (name, rows), axes in zip(metrics.items(), figure.subplots(1, len(metrics), squeeze=False)[0], strict=True):
        axes.imshow(rows, cmap="viridis" if _higher(name) else "viridis_r", aspect="auto")
        axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
        axes.set_yticks(range(len(averages)), averages)
        axes.set_xlabel("guidance scale")
        axes.set_title(f"{report.label(name)}, {content['count']:,} samples", fontsize="medium")
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                box = {"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1.5}
                axes.text(j, i, f"{value:.4g}", ha="center", va="center", fontsize="small", bbox=box)
    figure.savefig(output, dpi=150)
    print(f"drawn in {output}")


def _path(folder: pathlib.Path, step: int) -> pathlib.Path:
    grids = folder / FOLDER
    grids.mkdir(exist_ok=True)
    return grids / f"step_{step:07d}.json"


def _same(path: pathlib.Path, content: Mapping[str, Any]) -> bool:
    try:
        return read_json(path, nan=True) == content
    except (OSError, DamagedFile) as error:
        log.warning("a grid is passed over: %s", error)
        return False
