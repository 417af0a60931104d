"""Batches read and decoded as they are needed, by Grain's threads or worker processes."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Self

import grain
import numpy as np
from absl import flags

from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data.decoding import DataError
from gspn_jax.data.image_batches import Augment, ImageBatches, report_problems
from gspn_jax.data.latents import LatentBatches
from gspn_jax.data.source import Source, Views

# Each thread reads a batch of its own; the buffer, in batches, is what memory allows rather than what speed could use.
_MAX_THREADS = 16
_WORKER_THREADS = 2
_SECONDS_AFTER_SIGTERM = 30
_SHARED_MEMORY = "/dev/shm"
_SHARED_BATCHES = 4  # of each worker, on their way: one queued, one being put, one being taken, one to spare


class GrainLoader:
    """The batches of `loader.make_loader`: reports bad images where they are consumed, in the order of the stream.

    `bad_images` holds the messages of the distinct bad images met so far. Close it, or use it in a `with` statement:
    that ends its threads and processes.
    """

    def __init__(
        self, config: DataConfig, source: Source, *, batch_size: int, seed: int, first: int, stride: int,
        augment: Augment | None = None, features: Views | None = None,
    ):  # fmt: skip
        """Batches number `first`, `first + stride`, ... of `batch_size` rows of the stream."""
        if config.workers:
            _check_shared_memory(config, batch_size, features)
        batches = _read(config, _stream(config, source, batch_size, seed, augment, features)[first::stride])
        self._open, self._shared = [iter(batches)], config.workers > 0
        self._finalizer = weakref.finalize(self, _close, self._open)  # at exit too, while Grain can still do it
        self.bad_images: set[str] = set()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._open:
            raise ValueError("the loader is closed")
        try:
            batch = next(self._open[0])
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise DataError(
                "a process that reads images has ended by itself, such as for want of memory "
                f"({str(error).splitlines()[0]}): start the same command again, or with fewer data.workers"
            ) from error
        batch = report_problems(batch, self.bad_images)
        # Copied out of the memory shared with a worker, which can then go at once.
        return {name: np.array(values) for name, values in batch.items()} if self._shared else batch

    def close(self) -> None:
        """Ends threads and processes; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _stream(
    config: DataConfig, source: Source, batch_size: int, seed: int, augment: Augment | None, features: Views | None
) -> grain.MapDataset:
    """Batch k of `batch_size` rows, made by one call: Grain's time for each element is a few percent of decoding it."""
    batches: Callable[[int], dict[str, np.ndarray]]
    if config.latents:
        batches = LatentBatches(source, batch_size=batch_size, seed=seed, flip=config.flip, features=features)
    else:
        batches = ImageBatches(config, source, batch_size=batch_size, seed=seed, augment=augment, features=features)
    return grain.MapDataset.range(sys.maxsize).map(batches)


def _read(config: DataConfig, batches: grain.MapDataset) -> grain.IterDataset:
    threads = _WORKER_THREADS if config.workers else min(_MAX_THREADS, os.cpu_count() or 1)
    read = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2))
    if not config.workers:
        return read
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts a process
        flags.FLAGS.mark_as_parsed()
    options = grain.multiprocessing.MultiprocessingOptions(num_workers=config.workers)
    return read.mp_prefetch(options, worker_init_fn=_start_worker)


def _close(iterators: list[grain.DatasetIterator]) -> None:
    """Closes and lets go of them: one that is deleted when the interpreter is half gone complains."""
    while iterators:
        iterators.pop().close()


def _start_worker(index: int, count: int) -> None:
    """Signals that reach the whole job are the main process's to handle: it may still need a batch to stop in order.

    A worker ends when the main process does, even when that was killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _end_later())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_later() -> None:
    timer = threading.Timer(_SECONDS_AFTER_SIGTERM, os._exit, [1])
    timer.daemon = True
    timer.start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _check_shared_memory(config: DataConfig, batch_size: int, features: Views | None) -> None:
    """A worker that fills the shared memory dies of SIGBUS without a word, and containers give little of it."""
    value_bytes = 4 if config.latents else 1
    image = config.image_size**2 * config.channels * value_bytes + (features.bytes if features else 0)
    needed = _SHARED_BATCHES * config.workers * batch_size * image
    free = shutil.disk_usage(_SHARED_MEMORY).free if os.path.isdir(_SHARED_MEMORY) else needed
    if free < needed:
        raise ConfigError(
            f"data.workers={config.workers} needs {needed / 1e6:.0f} MB of shared memory for batches of "
            f"{batch_size} images, found {free / 1e6:.0f} MB free in {_SHARED_MEMORY}: use fewer "
            f"workers, or give the container more (docker run --shm-size)"
        )
