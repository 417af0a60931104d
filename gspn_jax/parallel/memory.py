"""Check that what is asked for fits into the memory of the devices, before anything is allocated."""

import logging

import jax
import numpy as np
from jax.sharding import Mesh

from gspn_jax.config import ConfigError
from gspn_jax.machine import free_memory

log = logging.getLogger(__name__)

COMPILING = 1.6e9
"""Bytes that compiling and running `gspn_jax/configs/digits.py` takes on a CPU (JAX 0.10.2, 2026-11-26)."""


def check_fits(needed: int, mesh: Mesh, what: str, advice: str) -> None:
    """Raises ConfigError when a device of `mesh` cannot hold `needed` bytes, the least that `what` takes on it.

    Devices of a CPU share the memory of its host. Where so little is left there that JAX may end without a word, a line
    of the log says so.
    """
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu":
        free = free_memory()
        limit = None if free is None else free // len(mesh.local_devices)
        if free is not None and free < COMPILING:
            log.warning(
                "%.2f GB of memory are left for this process, and compiling for a CPU may take %.1f GB: where it ends "
                "without a sentence, that is why",
                free / 1e9,
                COMPILING / 1e9,
            )
    if limit is not None and needed > limit:
        raise ConfigError(
            f"{what} must fit into the memory of a device, found that it takes at least {needed / 1e9:,.3g} GB of "
            f"{limit / 1e9:.3g} GB: {advice}"
        )


def bytes_a_device(tree) -> int:
    """Bytes of one device's part of a tree of ShapeDtypeStructs that have shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=object)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
