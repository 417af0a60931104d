"""Mean and covariance of features that stream by: summed in float32, drained to float64 on the host.

GPUs sum every batch where it is. Features in the host's memory are collected until there are enough for one product: a
CPU adds to a [D, D] matrix at the speed of its memory, which a batch is too small for.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Shaped

from gspn_jax.metrics.frechet import Gaussian

HOST_ROWS = 2048
"""After how many collected rows, as much memory as one float32 [D, D] for Inception's features, they are summed."""
PADDED_ROWS = 256
"""Multiple to which rows are padded: every number of them would be a program of its own to compile."""
DRAIN_ROWS = 4096
"""After how many rows, padded ones among them, the sums move to the host: float32 is left before its error grows."""


class Sums(NamedTuple):
    """Sums over the rows that count, of features from which a fixed vector was subtracted."""

    count: Float[Array, ""]
    first: Float[Array, " D"]
    second: Float[Array, "D D"]


class Moments:
    """The mean and covariance of all rows given to `add`, whatever their number, in the memory of two [D, D] matrices.

    Rows are shifted by the mean of the first batch, so that the float32 sums lose nothing to a large mean.
    """

    def __init__(self) -> None:
        self._shift: Array | np.ndarray | None = None
        self._sums: Sums | None = None
        self._rows = 0
        self._collected: list[np.ndarray] = []
        self._total: Sums | None = None

    def add(self, features: Float32[Array, "N D"], mask: Bool[Array, " N"] | None = None) -> None:
        """Adds the rows where `mask` is True (None: all). They may be split over devices and hosts."""
        mask = np.ones(len(features), bool) if mask is None else mask
        if _in_host_memory(features):
            self._collect(np.asarray(features)[np.asarray(mask)])
            return
        where = _whole(features)
        if self._shift is None:
            self._shift = _masked_mean(where)(features, mask)
        if self._sums is None:
            size = features.shape[1]
            self._sums = _zeros(where, size)
        self._sums = _accumulate(where)(self._sums, self._shift, features, mask)
        self._rows += len(features)
        if self._rows >= DRAIN_ROWS:
            self._drain()

    def _collect(self, rows: Float32[np.ndarray, "N D"]) -> None:
        if self._shift is None:
            self._shift = rows.sum(0) / max(len(rows), 1)
        self._collected.append(rows)
        self._rows += len(rows)
        if self._rows >= HOST_ROWS:
            self._drain()

    def _drain(self) -> None:
        if self._collected:
            x = np.concatenate(self._collected) - self._shift
            padded = np.pad(x, ((0, -len(x) % PADDED_ROWS), (0, 0)))
            sums = Sums(len(x), x.sum(0), _product(padded))
        elif self._sums is not None:
            sums = jax.device_get(self._sums)
        else:
            return
        sums = Sums(*(np.asarray(value, np.float64) for value in sums))
        self._total = sums if self._total is None else Sums(*map(np.add, self._total, sums))
        self._sums, self._collected, self._rows = None, [], 0

    @property
    def count(self) -> int:
        """Rows added so far."""
        self._drain()
        return 0 if self._total is None else int(self._total.count)

    def gaussian(self) -> Gaussian:
        """Mean and covariance (ddof 1), float64. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, found {self.count}")
        count, first, second = self._total
        offset = first / count
        return Gaussian(
            np.asarray(self._shift, np.float64) + offset,
            (second - count * np.outer(offset, offset)) / (count - 1),
            self.count,
        )

    def merge(self, state: dict[str, np.ndarray]) -> None:
        """Adds the rows of another one, by its `state`, in float64."""
        self._drain()
        if self._total is None or not state:
            self.restore(state)
            return
        offset = np.asarray(state["shift"], np.float64) - np.asarray(self._shift, np.float64)
        count, first, second = (state[name] for name in Sums._fields)
        cross = np.outer(first, offset)
        moved = Sums(count, first + count * offset, second + cross + cross.T + count * np.outer(offset, offset))
        self._total = Sums(*map(np.add, self._total, moved))

    def state(self) -> dict[str, np.ndarray]:
        """Sums that `restore` goes on from, to the bit; empty before the first row."""
        self._drain()
        return {} if self._total is None else {"shift": np.asarray(self._shift), **self._total._asdict()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Takes up a `state`."""
        if state:
            self._shift, self._total = state["shift"], Sums(*(state[name] for name in Sums._fields))


@jax.jit
def _product(x: Float32[Array, "N D"]) -> Float32[Array, "D D"]:
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)


def _in_host_memory(features: Array | np.ndarray) -> bool:
    """Whether this process can read all of them without a copy from a GPU."""
    if isinstance(features, np.ndarray):
        return jax.default_backend() == "cpu"
    return features.is_fully_addressable and all(device.platform == "cpu" for device in features.devices())


def _whole(array: Array) -> NamedSharding | None:
    """Whole on every device that has a part of `array`; None for one on a single device."""
    where = getattr(array, "sharding", None)
    return NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else None


@functools.cache
def _masked_mean(where: NamedSharding | None):
    def mean(features, mask):
        kept = jnp.where(mask[:, None], features, 0)
        return kept.sum(0) / jnp.maximum(mask.sum(), 1)

    return jax.jit(mean, out_shardings=where)


def _zeros(where: NamedSharding | None, size: int) -> Sums:
    zeros = Sums(*(np.zeros(shape, np.float32) for shape in ((), (size,), (size, size))))
    if where is None:
        return zeros
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, where, lambda index: a[index]), zeros)


@functools.cache
def _accumulate(where: NamedSharding | None):
    def accumulate(sums, shift, features, mask):
        # rows that do not count may hold anything, NaN included
        x = jnp.where(mask[:, None], features - shift, 0)
        second = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
        return Sums(sums.count + mask.sum(), sums.first + x.sum(0), sums.second + second)

    return jax.jit(accumulate, out_shardings=where, donate_argnums=0 if where is not None else ())


def on_host(array: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """The whole array on every host, also when other hosts hold parts of it."""
    if not getattr(array, "is_fully_addressable", True):
        array = _gather(_whole(array))(array).addressable_data(0)
    return np.asarray(array)


@functools.cache
def _gather(where: NamedSharding | None):
    return jax.jit(lambda array: array, out_shardings=where)
