"""Weights that a run begins with: those of another run or of a file where they fit, and fresh ones for the rest.

A plan is made of shapes alone, before anything is read: a table with a line for each parameter, which the run keeps.
"""

import logging
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from gspn_jax.files import replacing
from gspn_jax.models.parameters import by_path
from gspn_jax.parallel import sharding
from gspn_jax.state_dict import WeightsError
from gspn_jax.training.given import Given
from gspn_jax.training.task import Task

log = logging.getLogger(__name__)

TABLE = "init_from.txt"
"""The file of a run directory that says where each parameter comes from."""


class Line(NamedTuple):
    """Origin of one parameter: "copied", "rows" or "anew", and why."""

    path: str
    origin: str
    why: str = ""


def plan(given: Given, shapes: Any) -> list[Line]:
    """The origin of each parameter of `shapes`. Raises WeightsError for shapes that do not fit."""
    theirs, ours = ({path: tuple(leaf.shape) for path, leaf in by_path(one).items()} for one in (given.shapes, shapes))
    lines = []
    for path, shape in ours.items():
        found = theirs.get(path)
        reason = next((why for part, why in given.anew.items() if re.match(part, path)), None)
        if reason is not None:
            lines.append(Line(path, "anew", reason))
        elif found is None:
            lines.append(Line(path, "anew", "not there"))
        elif path in given.rows and shape[1:] == found[1:]:
            rows = given.rows[path]
            whole = rows.there == tuple(range(found[0]))
            lines.append(Line(path, "copied") if whole else Line(path, "rows", rows.said))
        elif shape == found:
            lines.append(Line(path, "copied"))
        elif any(re.match(part, path) for part in given.loose):
            lines.append(Line(path, "anew", f"of shape {found} there"))
        else:
            raise WeightsError(
                f"init_from must have parameters of the shapes of the config, found {path} of shape {found} in "
                f"{given.said}, where the config has {shape}"
            )
    if not any(line.origin != "anew" for line in lines):
        raise WeightsError(f"init_from must have parameters of the config, found none of them in {given.said}")
    return lines


def table(given: Given, shapes: Any, lines: Sequence[Line]) -> str:
    """A line for each parameter here, with its shape and origin, and one for each that is left there."""
    ours, theirs = by_path(shapes), by_path(given.shapes)
    rows = [(line.path, _size(ours[line.path]), line.origin + (f": {line.why}" if line.why else "")) for line in lines]
    used = {line.path for line in lines if line.origin != "anew"}
    rows += [(path, _size(leaf), "left there") for path, leaf in theirs.items() if path not in used]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    body = "\n".join(f"{path:{widths[0]}}  {size:{widths[1]}}  {origin}" for path, size, origin in rows)
    return f"beginning with the weights of {given.said}\n{body}\n"


def _size(leaf: jax.ShapeDtypeStruct) -> str:
    return " x ".join(map(str, leaf.shape)) or "1"


def begin(task: Task, given: Given, lines: Sequence[Line], mesh: Mesh) -> Any:
    """The parameters that `lines` describe, as `sharding.stored` on `mesh`; fresh ones come from `train.seed`."""
    theirs, ours = by_path(given.read(mesh)), by_path(task.shapes)
    copied = {line.path: theirs[line.path] for line in lines if line.origin == "copied"}
    made = {line.path: ours[line.path] for line in lines if line.origin != "copied"}
    tables = {line.path: theirs[line.path] for line in lines if line.origin == "rows"}
    rows_there = {path: leaf.shape[0] for path, leaf in by_path(given.shapes).items() if path in tables}
    del theirs
    if made:

        def make(key, tables):
            fresh = by_path(task.init(key))
            fresh |= {
                path: _with_rows(fresh[path], leaf, rows_there[path], given.rows[path].there)
                for path, leaf in tables.items()
            }
            return sharding.pad({path: fresh[path] for path in made}, made, mesh)

        out = sharding.param_shardings(made, mesh)
        copied |= jax.jit(make, out_shardings=out)(jax.random.key(task.config.train.seed), tables)
    return jax.tree.unflatten(jax.tree.structure(task.shapes), [copied[path] for path in ours])


def _with_rows(
    fresh: Float[Array, "K D"], theirs: Float[Array, "stored_K stored_D"], count: int, there: Sequence[int | None]
) -> Float[Array, "K D"]:
    """Rows of `theirs` that go on; the others are those of `fresh`, moved to the mean of all rows there and widened.

    n rows differ in n - 1 directions at most, and those are what the network has learned to heed. New rows go in every
    direction, with the spread of those there times sqrt(D / (n - 1)), so that they reach as far in these directions.
    """
    index = jnp.array([0 if row is None else row for row in there])
    known = jnp.array([row is not None for row in there])
    rows = theirs[:count, : fresh.shape[1]]
    wider = math.sqrt(max(1.0, rows.shape[1] / max(1, count - 1)))
    alike = rows.mean(0) + wider * rows.std(0) * (fresh - fresh.mean()) / fresh.std()
    return jnp.where(known[:, None], rows[index], alike)


def keep(run_dir: str | pathlib.Path, text: str) -> None:
    """Prints the table and writes it into the run directory; on the first host."""
    log.info("%s", text.rstrip())
    if jax.process_index() == 0:
        with replacing(pathlib.Path(run_dir) / TABLE) as temporary:
            temporary.write_text(text)
