"""A GPU script run on a CPU to its end: kernels interpreted, at sizes that take seconds."""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

from gspn_jax.kernels import compat, devices, tiles


@contextlib.contextmanager
def rehearsal(wanted: bool = True) -> Iterator[None]:
    """Kernels traced inside are interpreted, in tiles of a few positions; does nothing unless `wanted`."""
    if not wanted:
        yield
        return
    small = dataclasses.replace(devices.DEVICES["9.0"], expanding=devices.Expanding(warpgroups=2))
    with mock.patch.object(tiles, "ROWS", 8), devices.for_device(small), compat.interpreted(detect_races=False):
        yield
