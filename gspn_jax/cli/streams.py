"""stdin, stdout and stderr of a command, whatever it was started with."""

import errno
import os
import sys


def prepare() -> None:
    """Sends streams that were closed to nowhere, and lets those of a narrow encoding (ASCII) show \\xe9 for é.

    Without the first, the next file that is opened takes the number of stdout, and those who print write into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def hand_over() -> OSError | None:
    """Hands what was printed to whoever reads stdout. Where that fails, returns why; the rest then goes nowhere."""
    try:
        sys.stdout.flush()
        return None
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return error


def reader_is_gone(error: OSError) -> bool:
    """Tells whether it failed because nobody reads any more, as after `| head`."""
    return error.errno == errno.EPIPE
