"""Host batches -> global arrays on the devices, a few steps ahead of the one that uses them."""

import collections
from collections.abc import Iterable, Mapping
from typing import Self

import jax
import numpy as np


def prefetch_to_device(
    iterator: Iterable[Mapping[str, np.ndarray]], sharding: jax.sharding.Sharding, size: int = 2
) -> "DevicePrefetcher":
    """Iterates over dicts of global arrays, `size` of them on their way to the devices at any time.

    `sharding` splits the leading axis. Each host passes its own rows; the global array is their blocks in the order of
    the devices that hold them. Transfers are explicit and asynchronous, so `next` returns as soon as the transfer of a
    later batch has been started. What `iterator` raises is raised after the batches before it. Closing it closes
    `iterator`.
    """
    if size < 1:
        raise ValueError(f"size must be 1 or more, found {size}")
    return DevicePrefetcher(iterator, sharding, size)


class DevicePrefetcher:
    """See `prefetch_to_device`."""

    def __init__(self, iterator: Iterable[Mapping[str, np.ndarray]], sharding: jax.sharding.Sharding, size: int):
        self._iterator, self._sharding, self._size = iter(iterator), sharding, size
        self._queue: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._failure: Exception | None = None
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        if self._closed:
            raise ValueError("the prefetcher is closed")
        while len(self._queue) < self._size and not self._failure:
            try:
                batch = next(self._iterator)
            except StopIteration:
                break
            except Exception as error:  # of a batch that comes later, and may not be asked for
                self._failure = error
                break
            self._queue.append(
                {name: jax.make_array_from_process_local_data(self._sharding, values) for name, values in batch.items()}
            )
        if not self._queue:
            raise self._failure or StopIteration
        return self._queue.popleft()

    def close(self) -> None:
        self._closed = True
        self._queue.clear()
        if hasattr(self._iterator, "close"):
            self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
