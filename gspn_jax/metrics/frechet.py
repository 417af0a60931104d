"""The Frechet distance between two Gaussians, in float64."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A mean and a covariance. What costs most of a distance is computed once: keep the Gaussian that others are
    compared to.

    `count`, where it is known, is the number of rows that the covariance is of: its rank is `count` - 1 at most, and
    what rounding makes of the other eigenvalues is left out. Raises ValueError for shapes that do not belong together.
    """

    mean: Float[np.ndarray, " D"]
    cov: Float[np.ndarray, "D D"]
    count: int | None = None

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.cov.shape != (*self.mean.shape, *self.mean.shape):
            raise ValueError(
                f"mean and covariance must be [D] and [D, D], found {list(self.mean.shape)} and {list(self.cov.shape)}"
            )

    @property
    def rank(self) -> int:
        """The largest that the covariance can have."""
        return len(self.mean) if self.count is None else min(len(self.mean), self.count - 1)

    @functools.cached_property
    def root(self) -> Float[np.ndarray, "D rank"]:
        """R with R R^T = cov. Eigenvalues below zero, which rounding makes, count as zero."""
        values, vectors = np.linalg.eigh(self.cov.astype(np.float64))
        kept = slice(len(values) - self.rank, None)
        return vectors[:, kept] * np.sqrt(values[kept].clip(0))

    def distance(self, other: "Gaussian") -> float:
        """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), 0 or more (Heusel et al. 2017, eq. 6).

        tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of R^T C2 R with R R^T = C1: two symmetric
        eigenvalue problems in place of a general matrix root, which also exist when a covariance is singular.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                "both sides must have the same number of features, found "
                f"{self.mean.shape[0]} and {other.mean.shape[0]}"
            )
        values = np.linalg.eigvalsh(self.root.T @ other.cov.astype(np.float64) @ self.root)
        cross = np.sqrt(values[max(0, len(values) - other.rank) :].clip(0)).sum()
        difference = self.mean.astype(np.float64) - other.mean
        distance = difference @ difference + np.trace(self.cov) + np.trace(other.cov) - 2 * cross
        return float(max(distance, 0.0))


def moments(features: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]]:
    """Mean and covariance (ddof 1), float64. Raises ValueError for fewer than two rows."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [N, D] with N at least 2, found shape {features.shape}")
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False, ddof=1).reshape(features.shape[1], -1)


def frechet_distance(
    mean1: Float[np.ndarray, " D"],
    cov1: Float[np.ndarray, "D D"],
    mean2: Float[np.ndarray, " D"],
    cov2: Float[np.ndarray, "D D"],
) -> float:
    """`Gaussian.distance` of one pair."""
    return Gaussian(mean1, cov1).distance(Gaussian(mean2, cov2))
