"""A GPU script run on a CPU to its end: kernels interpreted, at sizes that take seconds."""

import contextlib
from collections.abc import Iterator

from gspn_jax.kernels import compat, devices


@contextlib.contextmanager
def rehearsal(wanted: bool = True) -> Iterator[None]:
    """Kernels traced inside are interpreted; does nothing unless `wanted`."""
    if not wanted:
        yield
        return
    with devices.for_device("9.0"), compat.interpreted(detect_races=False):
        yield
