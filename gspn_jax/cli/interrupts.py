"""Ctrl-C while a command has nothing to save yet: one line, no traceback."""

import _thread
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

CODE = 130
"""Exit code after Ctrl-C, as a shell has it: 128 + SIGINT."""
LINE = "stopped by Ctrl-C\n"


def end_at_once() -> None:
    """From now on Ctrl-C ends the process with a line: while modules are imported, nothing else could be said of it.

    Leaves alone what another program, or a debugger, has made of it.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) in _OURS:
        signal.signal(signal.SIGINT, _end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Lets Ctrl-C wait while the process starts again: until `end_at_once` there, or the end of the block here."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def raise_them() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, so that what is half written is removed; see `user_errors`."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def again(what) -> bool:
    """Tells whether `what`, of `sys.unraisablehook`, is a KeyboardInterrupt raised where nobody can catch it, as in a
    destructor; it is then raised once more."""
    if what.exc_type is not KeyboardInterrupt:
        return False
    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.daemon = True
    timer.start()
    return True


def _end(_number: int, _frame: FrameType | None) -> None:
    os.write(2, LINE.encode())
    os._exit(CODE)


_OURS = (signal.default_int_handler, _end)
