"""The record of a run's evaluations: which was the last, and which checkpoint is the best."""

import dataclasses
import json
import math
import pathlib
from typing import NamedTuple

import jax

from gspn_jax.files import replacing
from gspn_jax.runs import checkpoints

RECORD = "evaluation.json"
"""The file of a run directory that holds its `Record`."""


class Best(NamedTuple):
    """The score by which checkpoints are compared, whether higher is better, and how a person says so."""

    score: str
    higher: bool
    said: str


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run directory notes of evaluations: the last one's step, and the step and score of the best."""

    step: int = -1
    best_step: int | None = None
    best: float | None = None

    @classmethod
    def read(cls, run_dir: str | pathlib.Path) -> "Record":
        """Reads the record of a run, empty before its first evaluation; a best checkpoint that is gone is forgotten."""
        path = pathlib.Path(run_dir) / RECORD
        if not path.exists():
            return cls()
        values = json.loads(path.read_text())
        if "best_fid" in values:  # its name when FID was the only score
            values["best"] = values.pop("best_fid")
        record = cls(**values)
        return record if record.best_step in checkpoints.steps(run_dir) else cls(record.step)

    def until(self, step: int) -> "Record":
        """Without what was found after `step`."""
        known = self.best_step is not None and self.best_step <= step
        return Record(min(self.step, step), *((self.best_step, self.best) if known else (None, None)))

    def add(self, step: int, score: float | None, *, higher: bool = False) -> "Record":
        """With the evaluation of `step`, whose score is NaN or None if there is none; the lowest is the best, unless
        `higher`."""
        sign = -1 if higher else 1
        best = math.inf if self.best is None else sign * self.best
        if score is None or not sign * score < best:  # NaN is not better
            return dataclasses.replace(self, step=step)
        return Record(step, step, score)

    def write(self, run_dir: str | pathlib.Path) -> None:
        with replacing(pathlib.Path(run_dir) / RECORD) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self)) + "\n")


class Evaluations:
    """The record of a run that trains, in its directory and here: the one owner of the best step.

    Every host makes the same calls; the first one writes.
    """

    def __init__(self, run_dir: str | pathlib.Path):
        self._run_dir = run_dir
        self.record = Record.read(run_dir)

    @property
    def best_step(self) -> int | None:
        return self.record.best_step

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
