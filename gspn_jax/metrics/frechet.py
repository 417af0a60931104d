"""The Frechet distance between two Gaussians, in float64."""

import numpy as np
import scipy.linalg
from jaxtyping import Float


def moments(features: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]]:
    """Mean and covariance (ddof 1), float64. Raises ValueError for fewer than two rows."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [N, D] with N at least 2, found shape {features.shape}")
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False, ddof=1).reshape(features.shape[1], -1)


def frechet_distance(mean1: Float[np.ndarray, " D"], cov1: Float[np.ndarray, "D D"],
                     mean2: Float[np.ndarray, " D"], cov2: Float[np.ndarray, "D D"]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), 0 or more (Heusel et al. 2017, eq. 6).

    tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of S C2 S with S = C1^(1/2): two symmetric
    eigenvalue problems in place of a general matrix root, which also exists when a covariance is singular.
    """
    if not mean1.shape == mean2.shape == cov1.shape[:1] == cov2.shape[:1]:
        raise ValueError("both sides must have the same number of features, found "
                         f"{mean1.shape[0]} and {mean2.shape[0]}")
    values, vectors = scipy.linalg.eigh(cov1.astype(np.float64))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(scipy.linalg.eigvalsh(root @ cov2.astype(np.float64) @ root).clip(0)).sum()
    distance = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross
    return float(max(distance, 0.0))
