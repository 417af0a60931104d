"""End of a command: errors as one sentence, with the exit code that fits."""

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from gspn_jax.cli import command, interrupts, last_words, streams
from gspn_jax.cli.codes import INTERRUPTED, LOST, USAGE_ERROR
from gspn_jax.config import ConfigError
from gspn_jax.extras import MissingExtra

LAST_SECONDS = 2
"""The first host ends so much later than the others after the loss of one: JAX would otherwise end them before they
have said why."""
WORDS_SECONDS = 1
"""After an error that may be that of the network a host looks so long for words of another one."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_UNREAD = "nobody reads its stdout any more"


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns ConfigError, OSError, MissingExtra, the given kinds and the lack of memory or of devices into one line on
    stderr and exit code 2, the loss of another host into one with code 75, Ctrl-C into one with code 130. A stdout that
    cannot be written is an error when all else is done. Of several hosts each tells the others (`last_words`), also of
    any other exception. A decorator, too."""
    interrupts.raise_them()
    try:
        yield
        _hand_over()
    except SystemExit as stopped:
        if not stopped.code:
            _hand_over()
        elif _is_one_of_several():
            if isinstance(stopped.code, str):
                streams.say(stopped.code)
            code, text = _of_an_exit(stopped)
            _leave(code, text)
        raise
    except KeyboardInterrupt:
        if command.is_command():
            interrupts.end_at_once()  # when it comes once more
        streams.say(interrupts.LINE.rstrip())
        _leave(interrupts.CODE, interrupts.LINE.rstrip())
    except OSError as error:
        if streams.reader_is_gone(error):
            streams.hand_over()
            _leave(128 + signal.SIGPIPE, _UNREAD)
        full = "stdout, or a file that was being written" if error.errno in _FULL else None
        where = error.filename or full
        _say(f"{error.strerror}: {where}" if where else str(error))
    except (ConfigError, MissingExtra, *kinds) as error:
        _say(str(error))
    except MemoryError as error:
        _say(f"there is not enough memory ({str(error) or 'of the machine, or as much as this process may have'})")
    except Exception as error:
        if _is_one_of_several():
            _leave_others(error)
        text = _of_the_machine(error)
        if text is not None:
            _say(text)
        raise


def _say(text: str) -> NoReturn:
    streams.say(f"error: {text}")
    _leave(USAGE_ERROR, text)


def _leave_others(error: Exception) -> NoReturn:
    """Ends one of several hosts after an error without a sentence: by the words of another host, which may be its
    cause, as a loss of the network, or as what it is."""
    words = last_words.heard(WORDS_SECONDS)
    if words:
        streams.say(words.said)
        _leave(words.code, wait=last_words.PATIENCE)
    if _lost_host(error):
        streams.say(LOST.format(str(error).splitlines()[0]))
        _leave(INTERRUPTED, wait=LAST_SECONDS)
    text = _of_the_machine(error)
    if text is not None:
        _say(text)
    traceback.print_exc()
    _leave(1, f"it ended by {type(error).__name__}: {str(error)[:300]}")


def _of_an_exit(stopped: SystemExit) -> tuple[int, str]:
    """(code, what other hosts are told) of an exit that says nothing of itself, or a text."""
    if isinstance(stopped.code, int):
        return stopped.code, f"it has ended with code {stopped.code}, see its own stderr"
    return 1, str(stopped.code).removeprefix("error: ")


def _hand_over() -> None:
    """Ends the process if stdout cannot be written: in silence where nobody reads it."""
    error = streams.hand_over()
    if error and streams.reader_is_gone(error):
        _leave(128 + signal.SIGPIPE, _UNREAD)
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


def _leave(code: int, text: str | None = None, wait: float = 2 * last_words.PATIENCE) -> NoReturn:
    """Ends a process that others may be waiting for: an orderly end would wait for them in turn.

    They are told `text`, and where another host has spoken before, its code counts. The first host lets the others end
    before it for `wait` seconds.
    """
    if _is_one_of_several():
        if text is not None:
            code = last_words.tell(code, text).code
        streams.hand_over()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        last_words.leave(wait)
        os._exit(code)
    sys.exit(code)


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return bool(jax and jax.distributed.is_initialized())


def _lost_host(error: Exception) -> bool:
    jax = sys.modules.get("jax")
    known = jax and isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
    return bool(known) or "Gloo" in str(error)  # of which some come as a ValueError
