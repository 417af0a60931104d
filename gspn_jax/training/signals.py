"""Signals that ask a run to stop: noted, agreed on by all hosts, and answered by the loop after it has saved."""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.EBADF)
"""Errors of a stream whose reader is gone: of a pipe, a terminal, a socket, and one that was closed."""


class Stop:
    """Notes SIGINT, SIGTERM and SIGHUP while its `with` block runs; `asked` says whether to stop after this step.

    The end of whoever reads stdout or stderr (a terminal, a pipe to tee) counts as SIGHUP; what is written there from
    then on goes nowhere. A SIGHUP that is ignored when the block begins, as under nohup, stays so.

    One process handles all of them by itself. With several, JAX's preemption service has the SIGTERM: whichever host
    gets one, all hosts stop after the same step, the first that none of them has begun. The others are passed on to
    it. Further SIGTERMs change nothing; a second SIGINT stops at once, without saving.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._before: dict[int, Any] = {}
        self._streams: dict[str, Any] = {}
        self._several = jax.process_count() > 1
        self._calls = 0

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # signals reach no other thread
            for number in (signal.SIGINT, signal.SIGHUP, *(() if self._several else (signal.SIGTERM,))):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        for name in ("stdout", "stderr"):
            self._streams[name] = getattr(sys, name)
            setattr(sys, name, _Watched(self._streams[name], self._lost_reader))
        return self

    def __exit__(self, *_) -> None:
        for name, stream in self._streams.items():
            if isinstance(getattr(sys, name), _Watched):  # nobody else has put another one in its place
                setattr(sys, name, stream)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> str | None:
        """The signal's name from the step on after which to stop; every host calls it once a step."""
        if self._several:
            self._calls += 1  # rather than the number of the step, which falls when a run is rolled back
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self._name = self._name or "SIGTERM"
                return self._name
            return None
        return self._name

    def ask(self) -> None:
        """Asks, as SIGTERM does, all hosts to stop."""
        self._note(signal.SIGTERM, None)

    def _lost_reader(self) -> None:
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._note(signal.SIGHUP, None)

    def _note(self, number: int, _frame) -> None:
        if self._name and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = self._name is None
        self._name = self._name or signal.Signals(number).name
        if self._several and first:
            os.kill(os.getpid(), signal.SIGTERM)


class _Watched(io.TextIOBase):
    """A stream that writes on as another one does; when its reader is gone it says so once, and writes to nowhere."""

    def __init__(self, stream: Any, lost: Callable[[], None]):
        self._stream, self._lost = stream, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", "utf-8")

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        if "\n" in text:  # a reader that is gone is noticed when something is handed over
            self.flush()
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except ValueError:
            pass  # it is closed: nothing is to be said any more
        except OSError as error:
            if error.errno in _GONE:  # rather than a full disk, which may have room for what comes next
                _to_nowhere(self._stream)
                self._lost()


def _to_nowhere(stream: Any) -> None:
    """Points a stream's descriptor at /dev/null, so that nothing that is written there fails any more."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
