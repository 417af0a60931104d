"""stdin, stdout and stderr of a command, whatever it was started with, and whatever a config file does to them."""

import contextlib
import errno
import fcntl
import io
import logging
import os
import sys
from collections.abc import Iterator

NAMES = ("stdin", "stdout", "stderr")
"""Streams of a process, each at the place that is the number of its descriptor."""


def prepare() -> None:
    """Sends streams that were closed to nowhere, and lets those of a narrow encoding (ASCII) show \\xe9 for é.

    Without the first, the next file that is opened takes the number of stdout, and those who print write into it.
    """
    for number, name in enumerate(NAMES):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
        stream = getattr(sys, name, None)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
        if number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """At the end of the block the three streams are as before it: it may close them, or put others in their place."""
    streams, copies = {name: getattr(sys, name, None) for name in NAMES}, {}
    for number in range(len(NAMES)):
        with contextlib.suppress(OSError):  # it is closed already
            copies[number] = _far_copy(number)
    try:
        yield
    finally:
        for stream in (getattr(sys, name, None) for name in NAMES[1:]):
            with contextlib.suppress(Exception):  # what the block printed; it may have left any object there
                stream.flush()
        for number, copy in copies.items():
            with contextlib.suppress(OSError):
                os.dup2(copy, number)
                os.close(copy)
        for name, stream in streams.items():
            setattr(sys, name, stream)
        prepare()
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is streams["stderr"]:
                handler.setStream(sys.stderr)


def _far_copy(number: int) -> int:
    """A copy of a descriptor whose number is out of reach of those who close all numbers that are usual."""
    for least in (2**14, 2**9):
        with contextlib.suppress(OSError):  # more than this process may have
            return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, least)
    return os.dup(number)


def say(text: str) -> None:
    """Writes a line to stderr, or where that cannot be written, nowhere: then the exit code alone says it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):  # full, closed, or no stream at all
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def hand_over() -> OSError | None:
    """Hands what was printed to whoever reads stdout. Where that fails, returns why; the rest then goes nowhere."""
    try:
        sys.stdout.flush()
        return None
    except ValueError:  # it was closed: nothing more can have been printed
        return None
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(io.UnsupportedOperation):
            os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return error


def reader_is_gone(error: OSError) -> bool:
    """Tells whether it failed because nobody reads any more, as after `| head`."""
    return error.errno == errno.EPIPE
