"""All metrics of a set of images by name, from features that arrive batch by batch.

A metric is a line of `tables.METRICS`; metrics that keep the same of the features share it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Bool, PyTree

from gspn_jax.config import ConfigError
from gspn_jax.metrics import inception_score
from gspn_jax.metrics.kid import kernel_distance
from gspn_jax.metrics.moments import Moments, on_host
from gspn_jax.metrics.neighbours import precision_recall
from gspn_jax.metrics.reference import Reference
from gspn_jax.tables import METRICS


class Kept(Protocol):
    """Sums that are kept of the features of images that stream by."""

    def add(self, features: PyTree[Array], mask: Bool[Array, " N"]) -> None:
        """Adds the images where `mask` is True, in their order. Arrays may be split over devices."""
        ...


class Metric(NamedTuple):
    """A metric of images by their features."""

    label: str
    """Name that people call it by."""
    keeps: str
    """Parts of the features that it keeps, by name: metrics of one name and network share it."""
    keep: Callable[[], Kept]
    score: Callable[[Any, Reference | None, bool], float]
    """score(kept, reference, float16): the number. With `float16` distances are rounded, as the ADM evaluator does."""
    needs: str | None = None
    """Part of the reference that it needs: "pool", "spatial", "dinov2", "features" or "images", a field of `Reference`,
    or nothing. Of "images" the reference keeps (`Reference.kept`) what the metric keeps of samples."""
    network: str = "inception"
    """The line of `tables.FEATURE_NETWORKS` whose features it sees."""
    captions: bool = False
    """Whether images have captions: what it keeps is then given (features of images, `embed_captions` of theirs)."""
    higher: bool = False
    """Whether a higher number is the better one."""


def captioned(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the metrics `names` that are of images with captions."""
    return tuple(name for name in names if METRICS[name].captions)


def check_names(names: Sequence[str], field: str) -> None:
    """Raises ConfigError, naming `field`, for a metric that does not exist, one named twice, or none at all."""
    if not names or len(set(names)) != len(names) or not set(names) <= set(METRICS):
        raise ConfigError(
            f"{field} must be some of {', '.join(METRICS)}, each once, found {', '.join(names) or 'none'}"
        )


class Collector:
    """Keeps of the features what the metrics `names` need.

    50,000 pool features of Inception take 410 MB of the host's memory, and nothing else that is kept of it grows with
    the number of images. `float16` computes precision and recall in the ADM evaluator's float16 distances. Raises
    ConfigError for names.
    """

    def __init__(self, names: Sequence[str], *, float16: bool = False):
        check_names(names, "the metrics")
        self.names = tuple(names)
        self._float16 = float16
        self._metrics = {name: METRICS[name] for name in names}
        self._kept = {(metric.network, metric.keeps): metric.keep() for metric in self._metrics.values()}
        self._counted = self._metrics[names[0]].network
        self.count = 0

    def add(self, features: PyTree[Array], mask: Bool[Array, " N"], network: str = "inception") -> None:
        """Adds the features that `network` has of images, where `mask` is True; of every network in the same order."""
        if network == self._counted:
            self.count += int(on_host(mask).sum())
        for (name, _), kept in self._kept.items():
            if name == network:
                kept.add(features, mask)

    def scores(self, reference: Reference | None = None) -> dict[str, float]:
        """The metrics in the order of `names`. Some, as the Inception score, need no `reference`.

        Raises ConfigError when the reference lacks what a metric needs, and ValueError for too few images.
        """
        needing = [name for name, metric in self._metrics.items() if metric.needs]
        if reference is not None:
            reference.check(self.names)
        elif needing:
            raise ConfigError(f"{', '.join(needing)} must have a reference, found none")
        return {
            name: metric.score(self._kept[metric.network, metric.keeps], reference, self._float16)
            for name, metric in self._metrics.items()
        }


class _Moments:
    """Those of one of the features of Inception."""

    def __init__(self, name: str):
        self._name, self._moments = name, Moments()
        self.gaussian = self._moments.gaussian

    def add(self, features, mask):
        self._moments.add(getattr(features, self._name), mask)


class _WholeMoments:
    """Those of features that are one array."""

    def __init__(self):
        self._moments = Moments()
        self.add, self.gaussian = self._moments.add, self._moments.gaussian


class _Logits:
    """Parts of them that the Inception score keeps."""

    def __init__(self):
        self._kept = inception_score.InceptionScore()
        self.score = self._kept.score

    def add(self, features, mask):
        self._kept.add(on_host(features.logits)[on_host(mask)])


class _PoolFeatures:
    """Those of every image."""

    def __init__(self):
        self._parts: list[np.ndarray] = []
        self._found: dict[bool, tuple[float, float]] = {}

    def add(self, features, mask):
        self._parts.append(on_host(features.pool)[on_host(mask)])

    def all(self) -> np.ndarray:
        return np.concatenate(self._parts)

    def precision_recall(self, reference: Reference, float16: bool) -> tuple[float, float]:
        """Both, computed once."""
        if float16 not in self._found:
            radii = reference.radii(float16=float16)
            self._found[float16] = precision_recall(
                reference.features, self.all(), reference_radii=radii, float16=float16
            )
        return self._found[float16]


class _CaptionScores:
    """The sum of 100 max(cos, 0) of images' embeddings and their captions', both of length 1."""

    def __init__(self):
        self._sum, self._count = 0.0, 0

    def add(self, features, mask):
        images, captions = (on_host(part)[on_host(mask)].astype(np.float64) for part in features)
        self._sum += 100 * np.maximum((images * captions).sum(1), 0).sum()
        self._count += len(images)

    def mean(self) -> float:
        return float(self._sum / self._count)


FID, SFID = (
    Metric(
        label,
        name,
        lambda name=name: _Moments(name),
        lambda kept, target, _, name=name: getattr(target, name).distance(kept.gaussian()),
        name,
    )
    for label, name in (("FID", "pool"), ("sFID", "spatial"))
)
INCEPTION_SCORE = Metric("Inception score", "logits", _Logits, lambda kept, target, _: kept.score(), higher=True)
KID = Metric(
    "KID", "features", _PoolFeatures, lambda kept, target, _: kernel_distance(kept.all(), target.features), "features"
)
PRECISION, RECALL = (
    Metric(
        label,
        "features",
        _PoolFeatures,
        lambda kept, target, float16, which=which: kept.precision_recall(target, float16)[which],
        "features",
        higher=True,
    )
    for which, label in enumerate(("precision", "recall"))
)
FD_DINOV2 = Metric(
    "FD-DINOv2",
    "moments",
    _WholeMoments,
    lambda kept, target, _: target.dinov2.distance(kept.gaussian()),
    "dinov2",
    network="dinov2",
)
CLIP_SCORE = Metric(
    "CLIP score",
    "caption scores",
    _CaptionScores,
    lambda kept, target, _: kept.mean(),
    network="clip",
    captions=True,
    higher=True,
)
