"""Agreement between the hosts of a job: what one of them found or computed, on all of them."""

from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Numbers = TypeVar("Numbers")


def agree(numbers: Numbers) -> Numbers:
    """The first host's numbers on all hosts, bit for bit; a host that went on with its own could wait for ever.

    `numbers` is a tree of Python numbers (int below 2**53, float), of the same structure on every host, all of which
    must call this at the same place.
    """
    if jax.process_count() == 1:
        return numbers
    leaves, structure = jax.tree.flatten(numbers)
    bits = np.array(leaves, np.float64).view(np.uint32)  # JAX would round float64
    agreed = np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64).tolist()
    return jax.tree.unflatten(structure, [type(leaf)(value) for leaf, value in zip(leaves, agreed, strict=True)])


def meet(name: str) -> None:
    """Waits until every host is here: from then on files may change that all have read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gathered(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of an array of which each host may have a part, on every host, all of which must call this."""
    if not getattr(array, "is_fully_addressable", True):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
