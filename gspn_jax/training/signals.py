"""Signals that ask a run to stop: noted, agreed on by all hosts, and answered by the loop after it has saved."""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stop:
    """Notes SIGINT and SIGTERM while its `with` block runs; `asked` says whether to stop after this step.

    One process handles both by itself. With several, JAX's preemption service has the SIGTERM: whichever host gets one,
    all hosts stop after the same step, the first that none of them has begun. SIGINT is passed on to it. Further
    SIGTERMs change nothing; a second SIGINT stops at once, without saving.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._before: dict[int, Any] = {}
        self._several = jax.process_count() > 1
        self._calls = 0

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # signals reach no other thread
            for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
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

    def _note(self, number: int, _frame) -> None:
        if self._name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
