"""Random numbers of an image of an epoch, by their place alone."""

import numpy as np
from jaxtyping import Float

_MANTISSA = 53


def uniforms(seed: int, epoch: int, index: int, count: int) -> Float[np.ndarray, " count"]:
    """The first `count` numbers, uniform in (0, 1), of image `index` in `epoch`; all from 0, below 2^64.

    Raw Philox (Salmon et al., 2011), with seed and epoch for its key and the image in the upper half of its counter:
    the bits are the same on every machine and in every version of NumPy.
    """
    raw = np.random.Philox(
        key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, index, 0], np.uint64)
    ).random_raw(count)
    return ((raw >> (64 - _MANTISSA)) + 0.5) * 2.0**-_MANTISSA


def whole(uniform: float, count: int) -> int:
    """A number of 0 .. count - 1, all equally likely, from one that is uniform in (0, 1)."""
    return min(int(uniform * count), count - 1)
