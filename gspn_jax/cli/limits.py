"""Limits of the process, and of the container it is in, under which JAX ends without a sentence."""

import pathlib
import resource

from gspn_jax import control_groups
from gspn_jax.config import ConfigError

LEAST = {"ulimit -v": (resource.RLIMIT_AS, 3.0e9), "ulimit -d": (resource.RLIMIT_DATA, 1.95e9)}
"""(the limit, bytes that a command needs at least): `configs/digits.py` on two cores of a CPU (JAX 0.10.2, 2026-11-26)
was aborted by LLVM with 2.5 GB of addresses and trained with 3.0 GB; of data it took up to 1.92 GB."""
LEAST_HELD = 1.45e9
"""Bytes that it must be able to hold: the first step of `configs/digits.py` on one device of a CPU, compiled anew, held
1.49 GB in a control group of its own (JAX 0.10.2, 2026-11-26), nearly all of it memory that cannot be given back."""


def check(root: str | pathlib.Path = "/") -> None:
    """Raises ConfigError where this process may take less memory than JAX and its compiler need before any model.

    `root` is where /proc and the control groups are looked for.
    """
    for flag, (limit, least) in LEAST.items():
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY and allowed < least:
            raise ConfigError(
                f"{flag} must allow this process at least {least / 1e9:.2f} GB, which JAX and its compiler take before "
                f"any model, found {allowed / 1e9:.1f} GB"
            )
    group = control_groups.tightest(root)
    if group and group.left < LEAST_HELD:
        raise ConfigError(
            f"the container or job must leave this process at least {LEAST_HELD / 1e9:.2f} GB of memory, which JAX and "
            f"its compiler take before any model, found {group.left / 1e9:.2f} GB left of the {group.limit / 1e9:.2f} "
            f"GB of {group.path}"
        )
