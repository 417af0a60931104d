"""Check that what is asked for fits into the memory of the devices, before anything is allocated."""

import logging
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gspn_jax.config import ConfigError
from gspn_jax.machine import free_memory

log = logging.getLogger(__name__)

COMPILING = 1.6e9
"""Bytes that compiling and running `gspn_jax/configs/digits.py` takes on a CPU (JAX 0.10.2, 2026-11-26)."""
COMPILER = 1.0e9
"""Bytes of them that come after the check and are of no model: the run held 0.19 GB there and 1.45 GB at most (in a
control group, 2026-11-27), of which 0.18 GB were its state and its step."""


def check_fits(needed: int, mesh: Mesh, what: str, advice: str) -> None:
    """Raises ConfigError when a device of `mesh` cannot hold `needed` bytes, the least that `what` takes on it.

    Devices of a CPU share the memory of its host with the compiler. Where so little is left there that JAX may end
    without a word, a line of the log says so.
    """
    device, beside = mesh.local_devices[0], ""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu":
        free, beside = free_memory(), f", beside {COMPILER / 1e9:.1f} GB of the compiler"
        limit = None if free is None else max(0, free - int(COMPILER)) // len(mesh.local_devices)
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
            f"{limit / 1e9:.3g} GB{beside}: {advice}"
        )


def check_program(function: Any, *arguments: Any, what: str, advice: str) -> None:
    """Compiles a jitted function for `arguments` that are there, and raises ConfigError when a call would take more
    than is left to the devices of a CPU: Linux kills a process that takes it, without a word. The next call runs the
    program that was compiled here. Elsewhere JAX says itself what it has no memory for, and nothing is done."""
    device = jax.local_devices()[0]
    if device.platform != "cpu" or not hasattr(function, "lower"):
        return
    counted = function.lower(*arguments).compile().memory_analysis()
    free = free_memory()
    if counted is None or free is None:
        return
    beside = counted.temp_size_in_bytes + counted.output_size_in_bytes - counted.alias_size_in_bytes
    needed = beside * jax.local_device_count()
    if needed > free:
        raise ConfigError(
            f"{what} must fit into the memory that is left, found that it takes {needed / 1e9:,.3g} GB more, and "
            f"{free / 1e9:,.3g} GB are left to this process: {advice}"
        )


def bytes_a_device(tree) -> int:
    """Bytes of one device's part of a tree of ShapeDtypeStructs that have shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=object)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
