"""The record of a run's evaluations: which was the last, and which checkpoint is the best."""

import dataclasses
import json
import logging
import math
import pathlib
from typing import NamedTuple

import jax

from gspn_jax.files import replacing
from gspn_jax.runs import checkpoints
from gspn_jax.small_files import DamagedFile, read_json, set_aside, typed

log = logging.getLogger(__name__)

RECORD = "evaluation.json"
"""The file of a run directory that holds its `Record`."""


class Best(NamedTuple):
    """The score by which checkpoints are compared, whether higher is better, and how a person says so."""

    score: str
    higher: bool
    said: str


@dataclasses.dataclass(frozen=True)
class Record:
    """Notes of a run directory on its evaluations: the last one's step, and the step and score of the best."""

    step: int = -1
    best_step: int | None = None
    best: float | None = None
    spared: tuple[int, ...] | None = None
    """Checkpoints that were there when the record before this one was found damaged: one of them may be the best."""

    @classmethod
    def read(cls, run_dir: str | pathlib.Path, *, set_damaged_aside: bool = False) -> "Record":
        """Reads the record of a run, empty before its first evaluation; a best checkpoint that is gone is forgotten.

        In place of a damaged one comes an empty one that spares the checkpoints there are, with a line that says so.
        """
        path, saved = pathlib.Path(run_dir) / RECORD, checkpoints.steps(run_dir)
        try:
            values = read_json(path)
            if isinstance(values, dict) and "best_fid" in values:  # its name when FID was the only score
                values["best"] = values.pop("best_fid")
            record = typed(values, cls, path.name)
        except FileNotFoundError:
            return cls()
        except DamagedFile as error:
            log.warning("which checkpoint of %s is the best is not known, all are kept: %s", run_dir, error)
            record = cls(spared=tuple(saved))
            if set_damaged_aside:
                set_aside(path, str(error))
                record.write(run_dir)
        return record if record.best_step in (None, *saved) else cls(record.step, spared=record.spared)

    def until(self, step: int) -> "Record":
        """Without what was found after `step`."""
        known = self.best_step is not None and self.best_step <= step
        best = (self.best_step, self.best) if known else (None, None)
        return Record(min(self.step, step), *best, self.spared)

    def add(self, step: int, score: float | None, *, higher: bool = False) -> "Record":
        """With the evaluation of `step`, whose score is NaN or None if there is none; the lowest is the best, unless
        `higher`."""
        sign = -1 if higher else 1
        best = math.inf if self.best is None else sign * self.best
        if score is None or not sign * score < best:  # NaN is not better
            return dataclasses.replace(self, step=step)
        return Record(step, step, score, self.spared)

    def write(self, run_dir: str | pathlib.Path) -> None:
        with replacing(pathlib.Path(run_dir) / RECORD) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self)) + "\n")


class Evaluations:
    """The record of a run that trains, in its directory and here: the one owner of the best step.

    Every host makes the same calls; the first one writes.
    """

    def __init__(self, run_dir: str | pathlib.Path):
        self._run_dir = run_dir
        self.record = Record.read(run_dir, set_damaged_aside=jax.process_index() == 0)

    @property
    def best_step(self) -> int | None:
        return self.record.best_step

    @property
    def kept(self) -> set[int]:
        """Steps whose checkpoints must stay: the best, and those that may be."""
        return {self.record.best_step, *(self.record.spared or ())} - {None}

    def add(self, step: int, score: float | None, *, higher: bool = False) -> None:
        """Notes the evaluation of `step`, whose checkpoint is saved."""
        self._change(self.record.add(step, score, higher=higher), write=True)

    def rewind(self, step: int) -> None:
        """Forgets what was found after `step`, from which the run goes on."""
        found = Record.read(self._run_dir)
        record = found.until(step)
        self._change(record, write=record != found)

    def _change(self, record: Record, write: bool) -> None:
        self.record = record
        if write and jax.process_index() == 0:
            record.write(self._run_dir)
