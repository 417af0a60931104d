"""Where a run directory keeps its checkpoints."""

import pathlib


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence for the user."""


def folder(run_dir: str | pathlib.Path) -> pathlib.Path:
    """The folder of the checkpoints, one folder a step."""
    return pathlib.Path(run_dir).absolute() / "checkpoints"


def steps(run_dir: str | pathlib.Path) -> list[int]:
    """The steps of the checkpoints of a run, ascending, whole or not."""
    where = folder(run_dir)
    return sorted(int(p.name) for p in where.iterdir() if p.name.isdigit()) if where.is_dir() else []
