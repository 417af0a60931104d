"""The noise of an image: a key made of the seed of its set, with all 64 bits, and of its number in the set."""

import jax
import numpy as np
from jaxtyping import Array, Key, UInt32

from gspn_jax.config import ConfigError

LARGEST = 2**64 - 1
MOST_IMAGES = 2**32
RULE = "fold_in(seed, number)"
"""Note beside samples; those drawn by another rule are others."""


def check(seed: int, images: int = 1, *, flag: str = "--seed") -> int:
    """`seed`. Raises ConfigError for one that 64 bits do not hold, or for more images than can be numbered."""
    if not 0 <= seed <= LARGEST:
        raise ConfigError(f"{flag} must be in 0..2**64-1, found {seed}")
    if images > MOST_IMAGES:
        raise ConfigError(f"a seed has noise for 2**32 images, found {images} asked for: draw them with several seeds")
    return seed


def words(seed: int) -> UInt32[np.ndarray, "2"]:
    """The high and the low half of a seed, as `image_keys` takes it."""
    return np.array(divmod(check(seed), 2**32), np.uint32)


def image_keys(seed: UInt32[Array, "2"], numbers: UInt32[Array, " N"]) -> Key[Array, " N"]:
    """A threefry key for each image of a set: fold_in(key(seed), number).

    Of one seed no two are equal, as threefry permutes for each key; of two seeds they are unrelated.
    """
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")  # jax.random.key would drop the high half
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
