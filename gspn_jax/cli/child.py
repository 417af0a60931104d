"""A child process that does the work of one of several hosts, and a parent that has the last word."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator

from gspn_jax.cli import interrupts
from gspn_jax.cli.codes import INTERRUPTED, LOST, USAGE_ERROR

_to_parent: int | None = None
"""In the child: where it writes what its parent is to say if JAX ends it by abort()."""


def watch_over_child() -> None:
    """Returns in a child process; this one waits for it and has the last word.

    JAX ends a process that has lost another host by abort(), whose exit code (134) is that of any crash and which no
    handler in the process survives. From here it gets the code and the sentence of every other way to lose a host, or
    what `joining` says if it had not joined yet. SIGTERM and SIGHUP are passed on, Ctrl-C reaches both by itself, and
    the child does not outlive its parent.
    """
    global _to_parent
    reader, writer = os.pipe()
    said, saying = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        os.close(said)
        _to_parent = saying
        threading.Thread(target=_end_with_parent, args=(reader,), daemon=True).start()
        return
    os.close(saying)

    def pass_on(number: int, _frame) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, pass_on)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        signal.signal(signal.SIGHUP, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGINT:  # while it joined the others, see `joining`
        os.write(2, interrupts.LINE.encode())
        os._exit(interrupts.CODE)
    if code == -signal.SIGABRT:
        os.set_blocking(said, False)  # a worker of the child may have the other end still
        last = _read(said).decode().rsplit("\n", 2)[-2:-1]
        number, _, sentence = last[0].partition(" ") if last else ("", "", "")
        code, text = (int(number), f"error: {sentence}") if sentence else (INTERRUPTED, LOST.format(_ENDED))
        print(text, file=sys.stderr, flush=True)
    if code < 0:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


_ENDED = "JAX ended this process, see above"


def say_if_aborted(code: int, sentence: str) -> None:
    """Sets what the parent says, and its exit code, if JAX ends this process by abort()."""
    if _to_parent is not None:
        os.write(_to_parent, f"{code} {' '.join(sentence.splitlines())}\n".encode(errors="backslashreplace"))


@contextlib.contextmanager
def joining(sentence: str) -> Iterator[None]:
    """While this process joins the others: an abort() is then said to be `sentence`, without the stack of C++ that JAX
    writes to stderr. All else that it writes is shown at the end. Ctrl-C ends it at once, which no handler in Python
    does while JAX waits."""
    if _to_parent is None:
        yield
        return
    say_if_aborted(USAGE_ERROR, sentence)
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
            os.dup2(stderr, 2)
            os.close(stderr)
            os.write(_to_parent, b"\n")  # joined: from now on an abort is the loss of another host
            kept.seek(0)
            with contextlib.suppress(OSError):
                os.write(2, kept.read())


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 2**16)
    except BlockingIOError:
        return b""


def _end_with_parent(reader: int) -> None:
    os.read(reader, 1)  # nothing is ever written: it returns when the other end is closed
    os._exit(1)
