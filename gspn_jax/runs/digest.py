"""A digest of parameters, by which two checkpoints are known to be the same."""

import hashlib
from typing import Any

import jax
import numpy as np

from gspn_jax.parallel.agreement import gathered


def digest_of(params: Any, shapes: Any) -> str:
    """SHA-256 over parameters of these `shapes` and where they are in the tree; the same on any mesh, however it stores
    them (`sharding.stored`). Every host must call it."""
    total = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), own in zip(leaves, jax.tree.leaves(shapes), strict=True):
        total.update(jax.tree_util.keystr(path, simple=True, separator="/").encode())
        total.update(np.ascontiguousarray(gathered(leaf)[tuple(map(slice, own.shape))]).tobytes())
    return total.hexdigest()
