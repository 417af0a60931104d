"""The scripts of benchmarks/, as modules."""

import importlib
import pathlib
import sys
from types import ModuleType

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    before = [*sys.path]
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = before
