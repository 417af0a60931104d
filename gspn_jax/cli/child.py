"""A child process that does the work of one of several hosts, and a parent that has the last word."""

import contextlib
import os
import signal
import sys
import threading

from gspn_jax.cli.exits import INTERRUPTED, LOST


def watch_over_child() -> None:
    """Returns in a child process; this one waits for it and has the last word.

    JAX ends a process that has lost another host by abort(), whose exit code (134) is that of any crash and which no
    handler in the process survives. From here it gets the code and the sentence of every other way to lose a host.
    SIGTERM is passed on, Ctrl-C reaches both by itself, and the child does not outlive its parent.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        threading.Thread(target=_end_with_parent, args=(reader,), daemon=True).start()
        return

    def pass_on(number: int, _frame) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT:
        print(LOST.format("JAX ended this process, see above"), file=sys.stderr, flush=True)
        code = INTERRUPTED
    if code < 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _end_with_parent(reader: int) -> None:
    os.read(reader, 1)  # nothing is ever written: it returns when the other end is closed
    os._exit(1)
