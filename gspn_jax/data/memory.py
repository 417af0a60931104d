"""A small set decoded once and kept in memory: the stream of the Grain loader, to the bit, without Grain."""

import concurrent.futures
import logging
import os
from collections.abc import Iterator
from typing import Self

import jax
import numpy as np
from tqdm import tqdm

from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data import order
from gspn_jax.data.decoding import DataError
from gspn_jax.data.image_batches import beside
from gspn_jax.data.source import MAX_BAD_IN_A_ROW, Source, Views
from gspn_jax.machine import free_memory

logger = logging.getLogger("gspn_jax.data")

_SHARE_OF_FREE = 0.8
"""Share of the free memory that a set may take: training needs some too."""
_MAX_THREADS = 16
_TOGETHER = 64
"""Images that a thread decodes before it asks for more."""


class MemorySource:
    """The images of `source`, uint8 [N, S, S, C], decoded when it is made; `labels` int32 [N].

    With `config.bad_images` "skip" the next image that can be decoded takes the place of one that cannot, as in the
    Grain loader; `bad_images` are the messages, each logged once to "gspn_jax.data".
    """

    def __init__(self, source: Source, config: DataConfig):
        """Raises ConfigError, before any image is decoded, for a set that does not fit into the memory that is free,
        and DataError for an image that cannot be used, or with "skip" for as many in a row as the Grain loader bears.
        """
        self.class_names, self.fingerprint = source.class_names, source.fingerprint
        shape = (len(source), config.image_size, config.image_size, config.channels)
        _check_fits(shape)
        self.images, self.labels = np.empty(shape, np.uint8), np.empty(len(source), np.int32)
        problems = dict(self._decode(source, config.bad_images == "error"))
        self.bad_images = set(problems.values())
        for count, problem in enumerate(dict.fromkeys(problems.values()), 1):
            logger.warning("%s; another image takes its place (bad images so far: %d)", problem, count)
        self._replace(sorted(problems), problems)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        return {"image": self.images[index], "label": self.labels[index]}

    def _decode(self, source: Source, stop: bool) -> Iterator[tuple[int, str]]:
        """Fills the arrays; (index, message) of each image that cannot be used, or its error if that is to `stop`."""

        def decode(start: int) -> list[tuple[int, DataError]]:
            errors = []
            for index in range(start, min(start + _TOGETHER, len(source))):
                try:
                    record = source[index]
                    self.images[index], self.labels[index] = record["image"], record["label"]
                except DataError as error:
                    errors.append((index, error))
            return errors

        bar = tqdm(
            total=len(source),
            unit="image",
            desc="decoding into memory",
            leave=False,
            dynamic_ncols=True,
            disable=jax.process_index() > 0,
        )
        pool = concurrent.futures.ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))
        with bar:
            try:
                for errors in pool.map(decode, range(0, len(source), _TOGETHER)):
                    if errors and stop:
                        raise errors[0][1]
                    yield from ((index, str(error)) for index, error in errors)
                    bar.update(min(_TOGETHER, len(source) - bar.n))
            finally:
                pool.shutdown(cancel_futures=True)

    def _replace(self, bad: list[int], problems: dict[int, str]) -> None:
        tries = min(len(self), MAX_BAD_IN_A_ROW)
        for index in bad:
            good = next((i % len(self) for i in range(index, index + tries) if i % len(self) not in problems), None)
            if good is None:
                raise DataError(f"{tries} images in a row cannot be used; the first: {problems[index]}")
            self.images[index], self.labels[index] = self.images[good], self.labels[good]


class MemoryLoader:
    """The batches of `loader.make_loader` from a MemorySource: a function of the seed and the step, without threads."""

    def __init__(
        self,
        source: MemorySource,
        *,
        batch_size: int,
        seed: int,
        flip: bool,
        first: int,
        stride: int,
        features: Views | None = None,
    ):
        """Batches number `first`, `first + stride`, ... of `batch_size` rows of the stream."""
        self._features = features
        self._source, self._batch_size, self._seed, self._flip = source, batch_size, seed, flip
        self._next, self._stride = first, stride
        self._closed = False
        self.bad_images = source.bad_images

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise ValueError("the loader is closed")
        places = range(self._next * self._batch_size, (self._next + 1) * self._batch_size)
        self._next += self._stride
        rows = order.places_to_images(places, len(self._source), self._seed)
        images = self._source.images[rows]
        mirrored = order.flips(places, self._seed) if self._flip else np.zeros(len(places), bool)
        if self._flip:
            pixels = images.view(f"V{images.shape[-1]}")[..., 0]  # a pixel is copied at once
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        return {"image": images, "label": self._source.labels[rows]} | beside(self._features, rows, mirrored)

    def close(self) -> None:
        """Ends the iteration; a second call does nothing."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _check_fits(shape: tuple[int, int, int, int]) -> None:
    """Says how much memory the images will take; raises ConfigError for more than `_SHARE_OF_FREE` of what is free."""
    needed, free = int(np.prod(shape)), free_memory()
    text = f"{shape[0]:,} images of {'x'.join(map(str, shape[1:]))} take {needed / 1e9:.3g} GB of memory on each host"
    if free is not None and needed > _SHARE_OF_FREE * free:
        raise ConfigError(
            f"data.in_memory needs a set of at most {_SHARE_OF_FREE:.0%} of the memory that is free "
            f"({free / 1e9:.3g} GB), found one too large: {text}; without it images are read as they "
            f"are needed"
        )
    logger.info("%s%s", text, "" if free is None else f", where {free / 1e9:.3g} GB are free")
