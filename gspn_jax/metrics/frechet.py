"""The Frechet distance between two Gaussians, in float64."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A mean and a covariance. The covariance's root is computed once: keep the Gaussian that others are compared to.

    Raises ValueError for shapes that do not belong together.
    """

    mean: Float[np.ndarray, " D"]
    cov: Float[np.ndarray, "D D"]

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.cov.shape != (*self.mean.shape, *self.mean.shape):
            raise ValueError(f"mean and covariance must be [D] and [D, D], found {list(self.mean.shape)} and "
                             f"{list(self.cov.shape)}")

    @functools.cached_property
    def root(self) -> Float[np.ndarray, "D D"]:
        """The symmetric root of the covariance; eigenvalues below zero, which rounding makes, count as zero."""
        values, vectors = np.linalg.eigh(self.cov.astype(np.float64))
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    def distance(self, other: "Gaussian") -> float:
        """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), 0 or more (Heusel et al. 2017, eq. 6).

        tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of S C2 S with S = C1^(1/2): two symmetric
        eigenvalue problems in place of a general matrix root, which also exists when a covariance is singular.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError("both sides must have the same number of features, found "
                             f"{self.mean.shape[0]} and {other.mean.shape[0]}")
        product = self.root @ other.cov.astype(np.float64) @ self.root
        cross = np.sqrt(np.linalg.eigvalsh(product).clip(0)).sum()
        difference = self.mean.astype(np.float64) - other.mean
        distance = difference @ difference + np.trace(self.cov) + np.trace(other.cov) - 2 * cross
        return float(max(distance, 0.0))


def moments(features: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]]:
    """Mean and covariance (ddof 1), float64. Raises ValueError for fewer than two rows."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [N, D] with N at least 2, found shape {features.shape}")
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False, ddof=1).reshape(features.shape[1], -1)


def frechet_distance(mean1: Float[np.ndarray, " D"], cov1: Float[np.ndarray, "D D"],
                     mean2: Float[np.ndarray, " D"], cov2: Float[np.ndarray, "D D"]) -> float:
    """`Gaussian.distance` of one pair."""
    return Gaussian(mean1, cov1).distance(Gaussian(mean2, cov2))
