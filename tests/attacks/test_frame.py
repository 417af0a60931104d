"""The runner of attacks finds what it looks for, and docs/faults.md has its rows."""

import pathlib
import sys

import pytest

from tests.attacks import table
from tests.attacks.attack import GOES_ON, Attack, flags


def ends(code, said="error: a sentence\n"):
    print(said, end="", file=sys.stderr)
    sys.exit(code)


def leaves(path):
    path.write_text("left over")
    ends(2)


def works():
    from gspn_jax.runs import checkpoints

    checkpoints.read_items(None, {})


def write_one(given, here):
    (here / "one").write_text("as it was")


@pytest.mark.parametrize(
    ("main", "wrong"),
    [
        (lambda argv: None, "exit code 0"),
        (lambda argv: ends(1), "exit code 1"),
        (lambda argv: ends(2, "error: another\n"), "expected 'a sentence'"),
        (lambda argv: ends(2, "error: a sentence\nand one more\n"), "expected one sentence"),
        (lambda argv: ends(2, "Traceback (most recent call last)\nerror: a sentence\n"), "Traceback"),
        (lambda argv: works(), "put to work"),
        (lambda argv: leaves(pathlib.Path(argv[0]) / "one.tmp"), "['one.tmp']"),
        (lambda argv: leaves(pathlib.Path(argv[0]) / "one"), "['one']"),
    ],
    ids=["ends well", "other code", "other words", "two sentences", "traceback", "device work", "temporary", "changed"],
)
def test_the_runner_finds_it(main, wrong, withstand):
    with pytest.raises(AssertionError) as found:
        withstand(Attack("C0", "", flags(main, "{here}", before=write_one), "a sentence"))
    assert wrong in str(found.value)


def test_the_runner_lets_pass_what_is_right(withstand):
    withstand(Attack("C0", "", flags(lambda argv: ends(2), "{here}", before=write_one), "a sentence"))
    withstand(Attack("C0", "", flags(lambda argv: works(), before=write_one), "", code=GOES_ON))


def test_the_page_has_the_rows():
    """Made by `python -m tests.attacks.table`."""
    text = table.PAGE.read_text()
    assert text == table.page(text)
