"""Limits of the process under which JAX ends without a sentence."""

import resource

from gspn_jax.config import ConfigError

LEAST = {"ulimit -v": (resource.RLIMIT_AS, 3.0e9), "ulimit -d": (resource.RLIMIT_DATA, 1.95e9)}
"""(the limit, bytes that a command needs at least): `configs/digits.py` on two cores of a CPU (JAX 0.10.2, 2026-11-26)
was aborted by LLVM with 2.5 GB of addresses and trained with 3.0 GB; of data it took up to 1.92 GB."""


def check() -> None:
    """Raises ConfigError where this process may take less memory than JAX and its compiler need before any model."""
    for flag, (limit, least) in LEAST.items():
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY and allowed < least:
            raise ConfigError(
                f"{flag} must allow this process at least {least / 1e9:.2f} GB, which JAX and its compiler take before "
                f"any model, found {allowed / 1e9:.1f} GB"
            )
