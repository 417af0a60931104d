"""Batches read and decoded as they are needed, by Grain's threads or worker processes."""

import logging
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
from grain.experimental import index_shuffle
from jaxtyping import UInt8

from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data import order
from gspn_jax.data.decoding import DataError
from gspn_jax.data.latents import LatentBatches
from gspn_jax.data.source import MAX_BAD_IN_A_ROW, Source

logger = logging.getLogger("gspn_jax.data")

# Each thread reads a batch of its own; the buffer, in batches, is what memory allows rather than what speed could use.
_MAX_THREADS = 16
_WORKER_THREADS = 2
_PERMUTED_WHOLE = 2**16
"""Images, at the most. The cipher's block is no smaller: of a small set, Grain's function for one index goes through it
for up to a millisecond before it is back in the set."""
_SECONDS_AFTER_SIGTERM = 30
_SHARED_MEMORY = "/dev/shm"
_SHARED_BATCHES = 4  # of each worker, on their way: one queued, one being put, one being taken, one to spare


class GrainLoader:
    """The batches of `loader.make_loader`: reports bad images where they are consumed, in the order of the stream.

    `bad_images` holds the messages of the distinct bad images met so far. Close it, or use it in a `with` statement:
    that ends its threads and processes.
    """

    def __init__(self, config: DataConfig, source: Source, *, batch_size: int, seed: int, first: int, stride: int):
        """Batches number `first`, `first + stride`, ... of `batch_size` rows of the stream."""
        if config.workers:
            _check_shared_memory(config, batch_size)
        batches = _read(config, _stream(config, source, batch_size, seed)[first::stride])
        self._open, self._shared = [iter(batches)], config.workers > 0
        self._finalizer = weakref.finalize(self, _close, self._open)  # at exit too, while Grain can still do it
        self.bad_images: set[str] = set()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._open:
            raise ValueError("the loader is closed")
        batch = next(self._open[0])
        problems, usable = batch.pop("problem", np.array("")), batch.pop("usable", None)  # latents have none
        for i in np.flatnonzero(problems != ""):
            found = str(problems[i]).split("\n")
            if not usable[i]:
                raise DataError(
                    found[0]
                    if len(found) == 1
                    else f"{len(found)} images in a row cannot be used; the first: {found[0]}"
                )
            for problem in found:
                if problem not in self.bad_images:
                    self.bad_images.add(problem)
                    logger.warning(
                        "%s; another image takes its place (bad images so far: %d)", problem, len(self.bad_images)
                    )
        # Copied out of the memory shared with a worker, which can then go at once.
        return {name: np.array(values) for name, values in batch.items()} if self._shared else batch

    def close(self) -> None:
        """Ends threads and processes; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _stream(config: DataConfig, source: Source, batch_size: int, seed: int) -> grain.MapDataset:
    """Batch k of `batch_size` rows, made by one call: Grain's time for each element is a few percent of decoding it."""
    batches: Callable[[int], dict[str, np.ndarray]]
    if config.latents:
        batches = LatentBatches(source, batch_size=batch_size, seed=seed, flip=config.flip)
    else:
        batches = _ImageBatches(config, source, batch_size, seed)
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


class _ImageBatches:
    """batches(k): batch k of the endless stream, {"image": uint8 [b, S, S, C], "label": int32 [b]} and two more [b].

    A bad image is not an exception here but a "problem" beside the image that replaces it, or beside one that is not
    "usable": an exception would come from whichever thread or process fails first; a problem is met at its place.
    """

    def __init__(self, config: DataConfig, source: Source, batch_size: int, seed: int):
        self._source, self._batch_size, self._seed, self._flip = source, batch_size, seed, config.flip
        self._tries = 1 if config.bad_images == "error" else min(len(source), MAX_BAD_IN_A_ROW)
        self._shape = config.image_size, config.image_size, config.channels

    def __call__(self, batch: int) -> dict[str, np.ndarray]:
        places = range(batch * self._batch_size, (batch + 1) * self._batch_size)
        images, labels = np.empty((len(places), *self._shape), np.uint8), np.empty(len(places), np.int32)
        mirrored = order.flips(places, self._seed) if self._flip else np.zeros(len(places), bool)
        usable, problems = np.empty(len(places), bool), []
        for row, index in enumerate(self._images(places)):
            record, problem = self._record(index)
            usable[row], labels[row] = record is not None, record["label"] if record else 0
            problems.append(problem)
            _write(record["image"] if record else np.zeros(self._shape, np.uint8), mirrored[row], images[row])
        return {"image": images, "label": labels, "problem": np.array(problems), "usable": usable}

    def _images(self, places: range) -> list[int]:
        """The image at each place. A large set is not permuted as a whole, in every worker, for the sake of a batch."""
        length = len(self._source)
        if length <= _PERMUTED_WHOLE:
            return order.places_to_images(places, length, self._seed).tolist()
        return [
            index_shuffle(
                place % length,
                max_index=length - 1,
                rounds=order.ROUNDS,
                seed=order.epoch_seed(place // length, self._seed),
            )
            for place in places
        ]

    def _record(self, index: int) -> tuple[dict | None, str]:
        """The first usable record from `index` on, or None, and the messages of those before it."""
        problems = []
        for attempt in range(self._tries):
            try:
                return self._source[(index + attempt) % len(self._source)], "\n".join(problems)
            except DataError as error:
                problems.append(str(error))
        return None, "\n".join(problems)


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


def _check_shared_memory(config: DataConfig, batch_size: int) -> None:
    """A worker that fills the shared memory dies of SIGBUS without a word, and containers give little of it."""
    value_bytes = 4 if config.latents else 1
    needed = _SHARED_BATCHES * config.workers * batch_size * config.image_size**2 * config.channels * value_bytes
    free = shutil.disk_usage(_SHARED_MEMORY).free if os.path.isdir(_SHARED_MEMORY) else needed
    if free < needed:
        raise ConfigError(
            f"data.workers={config.workers} needs {needed / 1e6:.0f} MB of shared memory for batches of "
            f"{batch_size} images, found {free / 1e6:.0f} MB free in {_SHARED_MEMORY}: use fewer "
            f"workers, or give the container more (docker run --shm-size)"
        )


def _write(image: UInt8[np.ndarray, "H W C"], mirrored: bool, row: UInt8[np.ndarray, "H W C"]) -> None:
    """Copies, left and right exchanged a channel at a time: twice as fast as a copy of pixels of a few bytes."""
    if not mirrored:
        row[...] = image
        return
    for channel in range(image.shape[2]):
        row[..., channel] = image[:, ::-1, channel]
