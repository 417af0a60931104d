"""Accuracy over a set of images, on a mesh: every image once, whatever the number of devices and hosts."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8
from tqdm import tqdm

from gspn_jax import data
from gspn_jax.classify.config import ClassifyConfig
from gspn_jax.classify.network import Network, forward
from gspn_jax.config import ConfigError
from gspn_jax.data.ahead import read_ahead
from gspn_jax.data.augment.crops import evaluation_crop
from gspn_jax.data.source import shorten
from gspn_jax.parallel import sharding
from gspn_jax.parallel.agreement import agree, on_every_host
from gspn_jax.runs import averages
from gspn_jax.runs.evaluations import Best

TOP = 5
_IN_FLIGHT = 2
"""Batches that devices may be behind."""
_AHEAD = 8
"""Images that each thread decodes ahead."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Counts of `images`: how many have their class first, and among the first five, and the mean cross-entropy.

    `confusion` [K, K] counts images of a class (row) that are given to a class (column).
    """

    images: int
    first: int
    among_five: int
    loss: float
    confusion: Int[np.ndarray, "K K"]

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.first / self.images

    @property
    def top5(self) -> float:
        """Percent."""
        return 100 * self.among_five / self.images


def ranks(logits: Float[Array, "B K"], labels: Int[Array, "B"]) -> Int[Array, "B"]:
    """Number of classes that come before the label's: those of a larger logit, and of the same with a smaller number.

    All K where a logit is not a number.
    """
    own = jnp.take_along_axis(logits, labels[:, None], 1)
    before = (logits > own) | ((logits == own) & (jnp.arange(logits.shape[1]) < labels[:, None]))
    return jnp.where(jnp.isnan(logits).any(1), logits.shape[1], before.sum(1))


def count_batch(
    logits: Float[Array, "B K"], labels: Int[Array, "B"], real: Bool[Array, "B"]
) -> tuple[Int[Array, ""], Int[Array, ""], Float[Array, ""], Int[Array, "K K"]]:
    """(first, among five, sum of losses, confusion) over the rows that are `real`."""
    classes = logits.shape[1]
    rank = ranks(logits, labels)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
    pairs = jnp.where(real, labels * classes + logits.argmax(1), 0)
    confusion = jnp.zeros(classes**2, jnp.int32).at[pairs].add(real.astype(jnp.int32)).reshape(classes, classes)
    return (
        (real & (rank < 1)).sum(),
        (real & (rank < min(TOP, classes))).sum(),
        jnp.where(real, losses, 0.0).sum(),
        confusion,
    )


class Scorer:
    """Scores sets of parameters on the images of a source; images are decoded once for all of them.

    The last batch is filled up with rows that do not count. Every host decodes its own rows.
    """

    def __init__(
        self, config: ClassifyConfig, network: Network, source: data.Source, mesh: Mesh, *,
        size: int, crop: float, batch_size: int,
    ):  # fmt: skip
        """Raises ConfigError for a set without images, and a batch size that devices and hosts do not divide."""
        parts = np.lcm(mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count())
        self._batch_size = -(-min(batch_size, len(source)) // parts) * parts  # rounded up: what is more does not count
        self._source, self._mesh, self._shape = source, mesh, (size, size, config.data.channels)
        self._split = sharding.batch_sharding(mesh)
        self._cropped = Cropped(source, size, crop)
        logits = forward(config, network, mesh)

        def score(params: Any, images: UInt8[Array, "B S S C"], labels: Int[Array, "B"], real: Bool[Array, "B"]):
            return count_batch(logits(params, images), labels, real)

        self._score = jax.jit(score, out_shardings=sharding.replicated(mesh))

    def __len__(self) -> int:
        return len(self._source)

    def compile(self, params: Any) -> None:
        """Compiles what scores a batch, so that the first one takes as long as the others."""
        rows = self._batch_size // jax.process_count()
        local = np.zeros((rows, *self._shape), np.uint8), np.zeros(rows, np.int32), np.zeros(rows, bool)
        empty = (jax.make_array_from_process_local_data(self._split, array) for array in local)
        jax.block_until_ready(self._score(params, *empty))

    def __call__(
        self, several: Sequence[Any], asked: Callable[[], str | None] = lambda: None, *, show: bool = True
    ) -> list[Scores] | None:
        """The scores of each of `several` parameters, as stored on the mesh, the same on all hosts.

        None when `asked` names a signal between two batches. Raises DataError for an image that cannot be decoded.
        """
        tallies = [_Tally() for _ in several]
        bar = tqdm(
            total=len(self), unit="image", desc="evaluating", leave=False, dynamic_ncols=True,
            disable=not show or jax.process_index() > 0,
        )  # fmt: skip
        failures: list[Exception] = []
        with bar, contextlib.closing(self._batches(failures)) as batches:
            for images, labels, real in batches:
                if asked():
                    return None
                for tally, params in zip(tallies, several, strict=True):
                    tally.add(self._score(params, images, labels, real))
                bar.update(min(self._batch_size, len(self) - bar.n))
        on_every_host(lambda: _raise_first(failures))
        return [tally.scores(len(self)) for tally in tallies]

    def score(self, params: Any) -> Scores:
        """The scores of one set of parameters."""
        found = self([params])
        assert found is not None, "nothing stops it"
        return found[0]

    def _batches(self, failures: list[Exception]) -> Generator[tuple[jax.Array, ...]]:
        """(images, labels, whether a row is real) of the whole set, on the devices.

        Of several hosts one that cannot read its images goes on with none, as the others wait for it, and adds the
        error to `failures`.
        """
        rows = self._batch_size // jax.process_count()
        starts = range(jax.process_index() * rows, len(self._source) + self._batch_size, self._batch_size)
        count = -(-len(self._source) // self._batch_size)
        parts = [range(min(start, len(self)), min(start + rows, len(self))) for start in starts[:count]]
        threads = min(16, os.cpu_count() or 1)
        with (
            concurrent.futures.ThreadPoolExecutor(threads) as pool,
            contextlib.closing(
                read_ahead(pool, self._cropped, [i for part in parts for i in part], _AHEAD * threads)
            ) as decoded,
        ):
            for part in parts:
                images, labels = np.zeros((rows, *self._shape), np.uint8), np.zeros(rows, np.int32)
                try:
                    for row in range(0 if failures else len(part)):
                        record = next(decoded)()
                        images[row], labels[row] = record["image"], record["label"]
                except Exception as error:
                    if jax.process_count() == 1:
                        raise
                    failures.append(error)
                local = images, labels, np.arange(rows) < len(part)
                yield tuple(jax.make_array_from_process_local_data(self._split, array) for array in local)


def _raise_first(failures: list[Exception]) -> None:
    for failure in failures:
        raise failure


class _Tally:
    """Adds up what `count_batch` gives, a few batches behind the devices."""

    def __init__(self):
        self._pending: collections.deque[tuple] = collections.deque()
        self._totals: list[Any] = [0, 0, 0.0, 0]

    def add(self, counts: tuple, behind: int = _IN_FLIGHT) -> None:
        self._pending.append(counts)
        self._take(behind)

    def _take(self, behind: int) -> None:
        while len(self._pending) > behind:
            found = [np.asarray(a, np.float64 if a.dtype == np.float32 else np.int64) for a in self._pending.popleft()]
            self._totals = [total + one for total, one in zip(self._totals, found, strict=True)]

    def scores(self, images: int) -> Scores:
        self._take(0)
        first, among_five, losses, confusion = self._totals
        return Scores(images, int(first), int(among_five), float(losses) / images, confusion)


class Cropped:
    """The images of a source as they are evaluated: `evaluation_crop` of each."""

    def __init__(self, source: data.Source, size: int, crop: float):
        self._source, self._size, self._crop = source, size, crop
        self.class_names, self.fingerprint = source.class_names, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        record = self._source[index]
        return {"image": evaluation_crop(np.asarray(record["image"]), self._size, self._crop), "label": record["label"]}


def validation_source(config: ClassifyConfig, class_names: Sequence[str]) -> data.Source:
    """The set of `config.eval`. Raises ConfigError for one that is missing, empty or of other classes."""
    source = data.make_source(config.validation, whole=True)
    check_classes(source, class_names, "the validation set")
    return source


def check_classes(source: data.Source, class_names: Sequence[str], which: str) -> None:
    """Raises ConfigError unless the classes of a source are those that a network was trained on, in their order."""
    found = tuple(source.class_names)
    if found == tuple(class_names):
        return
    odd = [name for name in found if name not in class_names] or [name for name in class_names if name not in found]
    raise ConfigError(
        f"{which} must have the {len(class_names)} classes that the network is trained on, found {len(found)} classes"
        + (f", of which these are on one side only: {shorten(odd)}" if odd else " in another order")
    )


class AccuracyEvaluation:
    """Top-1 and top-5 accuracy and loss of the parameters and of every average, while a run trains."""

    def __init__(self, config: ClassifyConfig, network: Network, source: data.Source, mesh: Mesh):
        settings = config.eval
        self.every, self._decays = settings.every, config.train.ema_decays
        self.best = Best(_named("top1", averages.name(self._decays[0])), True, "the highest top-1")
        self._scorer = Scorer(
            config, network, source, mesh, size=config.validation.image_size, crop=settings.crop,
            batch_size=settings.batch_size,
        )  # fmt: skip
        self.stopped_by: str | None = None

    def __call__(
        self, step: int, state: Any, asked: Callable[[], str | None] = lambda: None
    ) -> dict[str, float] | None:
        """Scores by name, such as "top1" of the parameters and "top1_ema_0.9999" of an average, in percent."""
        start = time.perf_counter()
        self.stopped_by = None

        def signalled() -> str | None:
            self.stopped_by = asked()
            return self.stopped_by

        names = [None, *state.ema]
        found = self._scorer([state.params, *state.ema.values()], signalled)
        if found is None:
            return None
        scores = {
            _named(name, average): value
            for average, one in zip(names, found, strict=True)
            for name, value in (("top1", one.top1), ("top5", one.top5), ("loss", one.loss))
        }
        agreed = dict(zip(scores, agree([*scores.values()]), strict=True))
        return agreed | {"seconds": time.perf_counter() - start}


def _named(score: str, average: str | None) -> str:
    return score if average is None else f"{score}_ema_{average}"
