"""stdin, stdout and stderr of a command, whatever it was started with."""

import os
import sys


def open_closed_ones() -> None:
    """Sends what was closed to nowhere: else the next file that is opened takes its number, and those who print write
    into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
