"""Batches made by threads of this process that work ahead, without Grain."""

import collections
import concurrent.futures
import itertools
import os
import weakref
from collections.abc import Callable
from typing import Self

import numpy as np

from gspn_jax.data.image_batches import report_problems

_MAX_THREADS = 16
_AHEAD = 2
"""Batches beside those that threads are at."""


class ThreadLoader:
    """The batches `first`, `first + stride`, ... of the stream, in order, each made by one of as many threads as cores.

    Pillow and NumPy let go of the interpreter while they compute. `bad_images` holds the messages of the distinct bad
    images met so far. Close it, or use it in a `with` statement.
    """

    def __init__(self, batches: Callable[[int], dict[str, np.ndarray]], *, first: int, stride: int):
        self._batches, self._numbers = batches, itertools.count(first, stride)
        self._threads = min(_MAX_THREADS, _cores())
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "batches")
        self._queue: collections.deque[concurrent.futures.Future] = collections.deque()
        self._finalizer = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self.bad_images: set[str] = set()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._finalizer.alive:
            raise ValueError("the loader is closed")
        while len(self._queue) < self._threads + _AHEAD:
            self._queue.append(self._pool.submit(self._batches, next(self._numbers)))
        return report_problems(self._queue.popleft().result(), self.bad_images)

    def close(self) -> None:
        """Ends the threads after the batches that they are at; a second call does nothing."""
        self._finalizer()
        self._queue.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
