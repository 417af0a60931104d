"""Batches on the devices, from any step of the stream; among several hosts, also where one of them has none."""

from typing import Self

import jax
import numpy as np
from jax.sharding import Mesh

from gspn_jax import data
from gspn_jax.parallel import sharding
from gspn_jax.parallel.agreement import on_every_host
from gspn_jax.training.task import Task

READ = "read"
"""Entry of a batch of several hosts, bool [B]: False in the rows of a host that could not read its own. A step of such
a batch changes nothing (`training.step`)."""


class Batches:
    """An endless iterator of batches split over `mesh`; `open` it first, in a `with` statement."""

    def __init__(self, task: Task, source: data.Source, mesh: Mesh):
        self._task, self._source, self._split = task, source, sharding.batch_sharding(mesh)
        self._batches: data.DevicePrefetcher | None = None
        self._rows: Rows | None = None
        self._given = 0
        """Batches since it was opened."""

    @property
    def failure(self) -> Exception | None:
        """Error of this host where the last batch has rows that it could not read; only among several hosts."""
        return self._rows.failure if self._rows and self._rows.good < self._given else None

    def open(self, step: int, seed: int) -> None:
        """Goes on, or back, to the batch after `step` of the stream of `seed`."""
        self.close()
        loader = self._task.loader(
            self._source, seed=seed, start_step=step, num_hosts=jax.process_count(), host=jax.process_index()
        )
        self._given = 0
        self._rows = Rows(loader) if jax.process_count() > 1 else None
        self._batches = data.prefetch_to_device(self._rows or loader, self._split)

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        self._given += 1
        return next(self._batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Rows:
    """Rows of this host with READ beside them: those of a loader, and from the first that it cannot read on, zeros.

    A host that stopped there would leave the others waiting for it within a step. Raises what the first batch raises,
    on every host.
    """

    def __init__(self, loader: data.Loader):
        self._loader = loader
        self.good = 0
        """Batches that could be read."""
        self.failure: Exception | None = None
        try:
            self._first: dict[str, np.ndarray] | None = on_every_host(lambda: dict(next(loader)))
        except BaseException:
            loader.close()
            raise
        self._empty = {name: np.zeros_like(values) for name, values in self._first.items()}

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rows = self._next()
        return rows | {READ: np.full(len(next(iter(rows.values()))), self.failure is None)}

    def _next(self) -> dict[str, np.ndarray]:
        if self.failure is None:
            try:
                rows, self._first = self._first or next(self._loader), None
                self.good += 1
                return rows
            except Exception as error:
                self.failure = error
        return self._empty

    def close(self) -> None:
        self._loader.close()
