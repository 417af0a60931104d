"""Snapshots of a run's power-function averages, RUN/snapshots/STEP, of which any width is made afterwards.

A snapshot has the averages of a checkpoint and what was saved beside them, not its parameters or optimizer. It is made
when the checkpoint of its step is committed, of hard links to those files, so that it takes room only once that
checkpoint is deleted. None is ever deleted here; who deletes some makes sums of the others.
"""

import logging
import os
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gspn_jax.files import new_folder
from gspn_jax.parallel import sharding
from gspn_jax.parallel.agreement import on_first_host
from gspn_jax.runs import averages, checkpoints, manifest, power
from gspn_jax.runs.checkpoints import CheckpointError

log = logging.getLogger(__name__)


def folder(run_dir: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(run_dir).absolute() / "snapshots"


def steps(run_dir: str | pathlib.Path) -> list[int]:
    """The steps of the snapshots of a run, ascending, whole or not."""
    return checkpoints.steps_in(folder(run_dir))


def keep(run_dir: str | pathlib.Path, step: int) -> None:
    """Makes the snapshot of the checkpoint of `step`, unless it is there. Raises OSError or ConfigError."""
    source, target = checkpoints.folder(run_dir) / str(step), folder(run_dir) / str(step)
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    with new_folder(target, bytes_needed=0) as made:
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source)
            if path.is_file() and name.name != manifest.NAME and _is_of_snapshot(name.parts[0]):
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                _link(path, made / name)
        manifest.write_part(source, made, _is_of_snapshot)


def begin(run_dir: str | pathlib.Path, step: int, every: int) -> None:
    """Puts the snapshots in order for a run that goes on after `step`: those after it are moved to snapshots/aside, as
    its steps will be made anew; those that a kill left out are made."""
    for later in (number for number in steps(run_dir) if number > step):
        aside = folder(run_dir) / "aside" / f"{later}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        os.replace(folder(run_dir) / str(later), aside)
        log.warning("the run goes on from step %d: its snapshot of step %d is now in %s", step, later, aside)
    for saved in checkpoints.steps(run_dir):
        whole = every and saved <= step and saved % every == 0
        if whole and any(map(averages.width_of_item, _items(checkpoints.folder(run_dir) / str(saved)))):
            keep(run_dir, saved)


def _is_of_snapshot(name: str) -> bool:
    """Whether a snapshot has the item or file `name` of a checkpoint."""
    return name in ("meta", *manifest.LATER) or averages.width_of_item(name) is not None


def _items(where: pathlib.Path) -> list[str]:
    return sorted(path.name for path in where.iterdir()) if where.is_dir() else []


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links here
        shutil.copyfile(source, target)


class Term(NamedTuple):
    """An average that is stored, and its coefficient in a sum."""

    where: pathlib.Path
    width: float
    coefficient: float


class Recipe(NamedTuple):
    """A power-function average of a run as a sum of those that it has; `error` is that of `power.Sum`."""

    width: float
    terms: tuple[Term, ...]
    error: float


def recipe(run_dir: str | pathlib.Path, step: int, width: float) -> Recipe:
    """The average of `width` after `step`, of the snapshots up to there and of that checkpoint.

    Raises CheckpointError for a run that has neither.
    """
    at = {number: folder(run_dir) / str(number) for number in steps(run_dir) if number <= step}
    own = checkpoints.folder(run_dir) / str(step)
    at = {step: own} | at if own.is_dir() else at
    stored = [
        (number, found, where)
        for number, where in sorted(at.items())
        for found in map(averages.width_of_item, _items(where))
        if found is not None
    ]
    if not stored:
        raise CheckpointError(
            f"the average of width {width:g} is made of power-function averages, which {run_dir} has none of up to "
            f"step {step}: --train.snapshot-every keeps them from a run's first step on"
        )
    numbers, widths, places = zip(*stored, strict=True)
    found = power.reconstruct(power.Averages(np.array(numbers, float), np.array(widths)), step, width)
    largest = np.abs(found.coefficients).max()
    terms = (Term(*term) for term in zip(places, widths, found.coefficients.tolist(), strict=True))
    kept = tuple(term for term in terms if abs(term.coefficient) > power.TERMS_DROPPED * largest)
    return Recipe(width, kept, found.error)


def restore(made_of: Recipe, shapes: Any, mesh: Mesh) -> Any:
    """The parameters that a recipe gives, of these `shapes`, as `sharding.stored` on `mesh`; read one by one.

    Raises CheckpointError on every host for files that are not those that were saved.
    """
    on_first_host(lambda: _verify(made_of.terms), CheckpointError)
    stored = sharding.stored(shapes, mesh)
    add = jax.jit(
        lambda total, one, coefficient: jax.tree.map(lambda t, a: t + coefficient * a, total, one), donate_argnums=0
    )
    total = jax.jit(
        lambda: jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), stored),
        out_shardings=jax.tree.map(lambda s: s.sharding, stored),
    )()
    for term in sorted(made_of.terms, key=lambda term: abs(term.coefficient)):  # small ones first, for their digits
        item = averages.item_of(averages.name_of_width(term.width))
        one = checkpoints.read_items(term.where, {item: stored})[item]
        total = add(total, one, np.float32(term.coefficient))
    return total


def _verify(terms: Sequence[Term]) -> None:
    for term in terms:
        item = averages.item_of(averages.name_of_width(term.width))
        problem = manifest.problem(term.where, lambda name, item=item: name == item)
        if problem:
            raise CheckpointError(f"{term.where} must be as it was saved, but {problem}")
