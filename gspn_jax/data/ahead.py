"""Records of a source in a given order, decoded by threads that work ahead."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable

import numpy as np

from gspn_jax.data.source import Source

Record = dict[str, np.ndarray | np.int32]


def read_ahead(
    pool: concurrent.futures.Executor, source: Source, indices: Iterable[int], count: int
) -> Generator[Callable[[], Record]]:
    """For each index in order, a call that waits for its record; `count` of them are being decoded at any time."""
    queue: collections.deque[concurrent.futures.Future] = collections.deque()
    remaining = iter(indices)
    try:
        for index in remaining:
            queue.append(pool.submit(source.__getitem__, index))
            if len(queue) >= count:
                yield queue.popleft().result
        while queue:
            yield queue.popleft().result
    finally:
        for future in queue:
            future.cancel()
