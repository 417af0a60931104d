"""Code of others in this process, such as a config file: it may raise what it wants, and cannot end the process."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

OPEN = "/proc/self/fd"
ENDING = ("_exit", "abort", "execv", "execve")
"""Functions of `os` by which a process ends, or becomes another program, without an exception; its other ones go by
these."""


class ProcessExit(BaseException):
    """Code of others tried to end the process."""


@contextmanager
def held() -> Iterator[None]:
    """While the block runs, what would end the process raises `ProcessExit`: a command that has done nothing must not
    end with exit code 0. `os.closerange` leaves alone what was open before.

    Other threads, and children of the block's own, may do as they like. Nothing holds code that goes to the C library
    (ctypes), or that acts after the block.
    """
    before, place = _open(), _place()

    def instead(original: Callable[..., Any], do: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (do if _place() == place else original)(*arguments)

    def refuse(name: str) -> Callable[..., Any]:
        def end(*_: Any) -> None:
            raise ProcessExit(f"os.{name}() was called")

        return end

    def close_range(low: int, high: int) -> None:
        for number in sorted(_open() - before):
            if low <= number < high:
                with suppress(OSError):
                    os.close(number)

    functions = {name: refuse(name) for name in ENDING} | {"closerange": close_range}
    originals = {name: getattr(os, name) for name in functions}
    try:
        for name, do in functions.items():
            setattr(os, name, instead(originals[name], do))
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def _place() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def _open() -> set[int]:
    """Numbers of the descriptors that are open."""
    try:
        return {int(name) for name in os.listdir(OPEN)}
    except OSError:
        return set(range(3))
