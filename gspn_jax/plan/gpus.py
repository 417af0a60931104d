"""GPUs that a run can be planned for, by name: their memory; `training.throughput` has their peak."""

from gspn_jax.config import ConfigError
from gspn_jax.training.throughput import peak_flops

GIB = 2**30
MEMORY = {
    "A10": 24 * GIB,
    "A100 40GB": 40 * GIB,
    "A100 80GB": 80 * GIB,
    "H100": 80 * GIB,
    "GH200": 96 * GIB,
    "H200": 141 * GIB,
    "B200": 180 * GIB,
    "L4": 24 * GIB,
    "L40S": 48 * GIB,
    "RTX 3090": 24 * GIB,
    "RTX 4080": 16 * GIB,
    "RTX 4090": 24 * GIB,
    "RTX 5090": 32 * GIB,
    "RTX A6000": 48 * GIB,
    "RTX 6000 Ada": 48 * GIB,
}
"""Bytes, as the data sheets name them; a part of it is the driver's, which `plan.USABLE` leaves out."""


def gpu_named(name: str) -> tuple[str, int, float]:
    """(name, bytes of memory, dense bfloat16 operations a second at the peak) of a GPU, in any case of letters.

    Raises ConfigError with the names that there are for another one.
    """
    found = next((known for known in MEMORY if known.lower() == " ".join(name.lower().split())), None)
    peak = peak_flops(found) if found else None
    if found is None or peak is None:
        raise ConfigError(f"--gpu must be one of {', '.join(MEMORY)}, found {name!r}")
    return found, MEMORY[found], peak
