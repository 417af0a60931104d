"""The scripts of benchmarks/, as modules."""

import importlib
import pathlib
import sys
from types import ModuleType

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    before = [*sys.path]
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = before


def rehearse(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *arguments: str) -> str | int | None:
    """The exit code, or the sentence, that a script ends a rehearsal with."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--rehearse", "--repeats", "1", *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    return stopped.value.code
