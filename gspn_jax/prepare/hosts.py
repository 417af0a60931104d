"""The processes of one job that each prepare a share: none leaves before the result is there.

Only the file system passes results between them, so that numbers arrive as they were computed. JAX's own watch over the
job ends those that wait for a process that is gone.
"""

import logging
import time
from collections.abc import Callable

from gspn_jax.config import ConfigError

log = logging.getLogger(__name__)

SECONDS = 0.5
"""Between two looks at the files that others write."""


def check_share(host: int, num_hosts: int) -> None:
    """Raises ConfigError unless `--host` is one of the `--num-hosts` that share the work."""
    if not 0 <= host < num_hosts:
        raise ConfigError(f"--host must be in 0..{num_hosts - 1}, found {host}")


def wait_until(there: Callable[[], bool], wanted: str) -> None:
    """Looks until `there()`, and says once what is waited for."""
    if there():
        return
    log.info("waiting for %s", wanted)
    while not there():
        time.sleep(SECONDS)
