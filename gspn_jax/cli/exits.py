"""How a command ends: exit codes, and errors as one sentence."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from gspn_jax.config import ConfigError
from gspn_jax.extras import MissingExtra

USAGE_ERROR = 2
"""Exit code for input that cannot be used."""
INTERRUPTED = 75
"""Exit code of a run that the same command goes on with: EX_TEMPFAIL of sysexits.h."""
LAST_SECONDS = 2
"""The first host ends so much later than the others, which JAX would otherwise end before they have said why."""
LOST = (
    "another host, or the connection to it, was lost ({}); the same command on all hosts goes on from the newest "
    "checkpoint"
)


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns ConfigError, OSError, MissingExtra and the given kinds into one line on stderr and exit code 2, and the
    loss of another host into one with code 75. A decorator, too."""
    try:
        yield
    except (ConfigError, OSError, MissingExtra, *kinds) as error:
        text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"error: {text}", file=sys.stderr)
        _leave(USAGE_ERROR)
    except RuntimeError as error:
        if not _lost_host(error):
            raise
        print(LOST.format(str(error).splitlines()[0]), file=sys.stderr)
        _leave(INTERRUPTED)


def _leave(code: int) -> NoReturn:
    """Ends a process that others may be waiting for: an orderly end would wait for them in turn."""
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(LAST_SECONDS)
        os._exit(code)
    sys.exit(code)


def _lost_host(error: RuntimeError) -> bool:
    jax = sys.modules.get("jax")
    return bool(
        jax
        and jax.distributed.is_initialized()
        and isinstance(error, jax.errors.JaxRuntimeError)
        and "RESOURCE_EXHAUSTED" not in str(error)
    )
