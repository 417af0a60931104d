"""The kernel Inception distance (Binkowski et al. 2018), with the subsets of torch-fidelity."""

import numpy as np
from jaxtyping import Float32, Float64

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020
"""torch-fidelity's defaults."""


def kernel_distance(
    samples: Float32[np.ndarray, "N D"],
    reference: Float32[np.ndarray, "M D"],
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> float:
    """The mean over random subsets of the unbiased MMD^2 with the kernel (x.y / D + 1)^3.

    The subsets are those that torch-fidelity draws with the same seed; sums are float64, where it has float32. Subsets
    are no larger than either side. The estimate can be below zero.
    Raises ValueError for fewer than two rows, and for sides that differ in the number of features.
    """
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"both sides must have the same number of features, found {samples.shape[1]} and {reference.shape[1]}"
        )
    size = min(subset_size, len(samples), len(reference))
    if size < 2:
        raise ValueError(
            f"the kernel distance needs at least 2 images a side, found {len(samples)} and {len(reference)}"
        )
    rng = np.random.RandomState(seed)  # the generator of torch-fidelity
    return float(
        np.mean(
            [
                _mmd2(
                    samples[rng.choice(len(samples), size, replace=False)],
                    reference[rng.choice(len(reference), size, replace=False)],
                )
                for _ in range(subsets)
            ]
        )
    )


def _mmd2(x: Float32[np.ndarray, "n D"], y: Float32[np.ndarray, "n D"]) -> float:
    n = len(x)
    x, y = x.astype(np.float64), y.astype(np.float64)  # the sums nearly cancel
    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
    return within / (n * (n - 1)) - 2 * xy.sum() / n**2


def _kernel(x: Float64[np.ndarray, "n D"], y: Float64[np.ndarray, "m D"]) -> Float64[np.ndarray, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3
