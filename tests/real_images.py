"""Where the archives of real images are, for the tests that look at some."""

import os
import pathlib

import pytest

FOLDER = pathlib.Path(os.environ.get("GSPN_TEST_DATA", pathlib.Path(__file__).resolve().parents[2] / "shared/data"))


def archive(name: str) -> pathlib.Path:
    """The path of an archive; the test is skipped where it is not at hand."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is not in {FOLDER}; set GSPN_TEST_DATA to the folder that holds it")
    return path
