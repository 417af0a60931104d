"""What the rows of attacks share in a session, and the runner that they go through."""

import pytest

from tests.attacks import attack as attacks
from tests.attacks.given import Given


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    return Given(tmp_path_factory.mktemp("given"))


@pytest.fixture
def withstand(given, tmp_path, capsys, caplog, monkeypatch):
    """`withstand(attack)` tries a row."""
    return lambda attack: attacks.withstand(attack, given, tmp_path, capsys, caplog, monkeypatch)
