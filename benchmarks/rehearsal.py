"""GPU scripts where there is no GPU: run on a CPU to their end, or ended with a sentence."""

import contextlib
import sys
from collections.abc import Iterator

import jax

from gspn_jax.kernels import available_backends, compat, devices


@contextlib.contextmanager
def rehearsal(wanted: bool = True) -> Iterator[None]:
    """Kernels traced inside are interpreted, at sizes that take seconds; does nothing unless `wanted`."""
    if not wanted:
        yield
        return
    with devices.for_device("9.0"), compat.interpreted(detect_races=False):
        yield


def require_kernel(script: str) -> None:
    """Ends the script with a sentence on a device that the kernel cannot run on."""
    if "mosaic_gpu" not in available_backends():
        sys.exit(
            f"{script} needs an NVIDIA GPU of compute capability 8.0 or newer, found {jax.devices()[0].device_kind!r}."
        )
