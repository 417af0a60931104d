"""Batches on the devices, from any step of the stream."""

from typing import Self

import jax
from jax.sharding import Mesh

from gspn_jax import data
from gspn_jax.parallel import sharding
from gspn_jax.training.task import Task


class Batches:
    """An endless iterator of batches split over `mesh`; `open` it first, in a `with` statement."""

    def __init__(self, task: Task, source: data.Source, mesh: Mesh):
        self._task, self._source, self._split = task, source, sharding.batch_sharding(mesh)
        self._batches: data.DevicePrefetcher | None = None

    def open(self, step: int, seed: int) -> None:
        """Goes on, or back, to the batch after `step` of the stream of `seed`."""
        self.close()
        loader = self._task.loader(
            self._source, seed=seed, start_step=step, num_hosts=jax.process_count(), host=jax.process_index()
        )
        self._batches = data.prefetch_to_device(loader, self._split)

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        return next(self._batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()
