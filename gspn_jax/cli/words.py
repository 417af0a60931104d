"""The words of a command line, as the program reads them."""

import os
import sys
from collections.abc import Sequence


def words(argv: Sequence[str] | None) -> list[str]:
    """`argv` (of the process by default) with homes in place of `~`, also in `--flag=~/x`, where no shell puts them."""
    return [_with_home(word) for word in (sys.argv[1:] if argv is None else argv)]


def _with_home(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (os.path.expanduser(value) if value == "~" or value.startswith("~/") else value)
