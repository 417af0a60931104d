"""All metrics of a set of images by name, from Inception features that arrive batch by batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array, Bool

from gspn_jax.config import ConfigError
from gspn_jax.metrics.inception_score import InceptionScore
from gspn_jax.metrics.kid import kernel_distance
from gspn_jax.metrics.moments import Moments, on_host
from gspn_jax.metrics.neighbours import precision_recall
from gspn_jax.metrics.reference import METRICS, NEEDS, Reference

if TYPE_CHECKING:
    from gspn_jax.metrics.inception import Features

__all__ = ["METRICS", "Collector", "check_names"]


def check_names(names: Sequence[str], field: str) -> None:
    """Raises ConfigError, naming `field`, for a metric that does not exist, one named twice, or none at all."""
    if not names or len(set(names)) != len(names) or not set(names) <= set(METRICS):
        raise ConfigError(
            f"{field} must be some of {', '.join(METRICS)}, each once, found {', '.join(names) or 'none'}"
        )


class Collector:
    """Keeps of the features what the metrics `names` need: moments, Inception-score sums, or all pool features.

    50,000 pool features take 410 MB of the host's memory, and nothing else grows with the number of images.
    `float16` computes precision and recall in the ADM evaluator's float16 distances. Raises ConfigError for names.
    """

    def __init__(self, names: Sequence[str] = METRICS, *, float16: bool = False):
        check_names(names, "the metrics")
        self.names = tuple(names)
        self._float16 = float16
        self._pool = Moments() if "fid" in names else None
        self._spatial = Moments() if "sfid" in names else None
        self._score = InceptionScore() if "is" in names else None
        self._features: list[np.ndarray] | None = [] if "features" in map(NEEDS.get, names) else None
        self.count = 0

    def add(self, features: "Features", mask: Bool[Array, " N"] | None = None) -> None:
        """Adds the images where `mask` is True (None: all), in their order. Arrays may be split over devices."""
        kept = np.ones(len(features.pool), bool) if mask is None else on_host(mask)
        self.count += int(kept.sum())
        if self._pool:
            self._pool.add(features.pool, mask)
        if self._spatial:
            self._spatial.add(features.spatial, mask)
        if self._score:
            self._score.add(on_host(features.logits)[kept])
        if self._features is not None:
            self._features.append(on_host(features.pool)[kept])

    def scores(self, reference: Reference | None = None) -> dict[str, float]:
        """The metrics in the order of `names`. Only the Inception score needs no `reference`.

        Raises ConfigError when the reference lacks what a metric needs, and ValueError for too few images.
        """
        found: dict[str, float] = {}
        if reference is not None:
            reference.check(self.names)
        elif any(name in NEEDS for name in self.names):
            raise ConfigError(
                f"{', '.join(name for name in self.names if name in NEEDS)} must have a reference, found none"
            )
        if self._pool:
            found["fid"] = reference.pool.distance(self._pool.gaussian())
        if self._spatial:
            found["sfid"] = reference.spatial.distance(self._spatial.gaussian())
        if self._score:
            found["is"] = self._score.score()
        if self._features is not None:
            features = np.concatenate(self._features)
            if "kid" in self.names:
                found["kid"] = kernel_distance(features, reference.features)
            if "precision" in self.names or "recall" in self.names:
                found["precision"], found["recall"] = precision_recall(
                    reference.features,
                    features,
                    reference_radii=reference.radii(float16=self._float16),
                    float16=self._float16,
                )
        return {name: found[name] for name in self.names}
