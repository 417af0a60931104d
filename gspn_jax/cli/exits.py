"""End of a command: exit codes, and errors as one sentence."""

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from gspn_jax.cli import command, interrupts, streams
from gspn_jax.config import ConfigError
from gspn_jax.extras import MissingExtra

USAGE_ERROR = 2
"""Exit code for input that cannot be used."""
INTERRUPTED = 75
"""Exit code of a run that the same command goes on with: EX_TEMPFAIL of sysexits.h."""
LAST_SECONDS = 2
"""The first host ends so much later than the others, which JAX would otherwise end before they have said why."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
LOST = (
    "another host, or the connection to it, was lost ({}); the same command on all hosts goes on from the newest "
    "checkpoint"
)


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns ConfigError, OSError, MissingExtra, the given kinds and the lack of memory or of devices into one line on
    stderr and exit code 2, the loss of another host into one with code 75, Ctrl-C into one with code 130. A stdout that
    cannot be written is an error when all else is done. A decorator, too."""
    interrupts.raise_them()
    try:
        yield
        _hand_over()
    except SystemExit as stopped:
        if not stopped.code:
            _hand_over()
        raise
    except KeyboardInterrupt:
        if command.is_command():
            interrupts.end_at_once()  # when it comes once more
        streams.say(interrupts.LINE.rstrip())
        _leave(interrupts.CODE)
    except OSError as error:
        if streams.reader_is_gone(error):
            streams.hand_over()
            _leave(128 + signal.SIGPIPE)
        full = "stdout, or a file that was being written" if error.errno in _FULL else None
        where = error.filename or full
        _say(f"{error.strerror}: {where}" if where else str(error))
    except (ConfigError, MissingExtra, *kinds) as error:
        _say(str(error))
    except MemoryError as error:
        _say(f"there is not enough memory ({str(error) or 'of the machine, or as much as this process may have'})")
    except Exception as error:
        if _lost_host(error):
            streams.say(LOST.format(str(error).splitlines()[0]))
            _leave(INTERRUPTED)
        text = _of_the_machine(error)
        if text is None:
            raise
        _say(text)


def _say(text: str) -> NoReturn:
    streams.say(f"error: {text}")
    _leave(USAGE_ERROR)


def _hand_over() -> None:
    """Ends the process if stdout cannot be written: in silence where nobody reads it."""
    error = streams.hand_over()
    if error and streams.reader_is_gone(error):
        _leave(128 + signal.SIGPIPE)
    if error:
        _say(f"what was printed could not be written to stdout ({error.strerror}); all else is done")


def _of_the_machine(error: Exception) -> str | None:
    """An error that JAX raises for devices that are not there or too small, as a sentence; None for another error."""
    jax = sys.modules.get("jax")
    if not jax:
        return None
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return f"the devices have not enough memory: {str(error).splitlines()[0]}"
    try:
        jax.devices()
    except Exception as missing:  # a RuntimeError, or one of an assertion in JAX
        wanted, said = os.environ.get("JAX_PLATFORMS", ""), (str(missing).splitlines() or ["none is here"])[0]
        return f"JAX_PLATFORMS must name devices that this machine has, found {wanted!r}: {said}"
    return None


def _leave(code: int) -> NoReturn:
    """Ends a process that others may be waiting for: an orderly end would wait for them in turn."""
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        streams.hand_over()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(LAST_SECONDS)
        os._exit(code)
    sys.exit(code)


def _lost_host(error: Exception) -> bool:
    jax = sys.modules.get("jax")
    return bool(
        jax
        and jax.distributed.is_initialized()
        and isinstance(error, jax.errors.JaxRuntimeError)
        and "RESOURCE_EXHAUSTED" not in str(error)
    )
