"""Log lines on stderr: ours from INFO on, those of others from WARNING on, and some of theirs not at all."""

import logging
import sys
import warnings

from gspn_jax.cli import interrupts


def show() -> None:
    """Sets the root logger's form and the levels of our loggers."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("gspn_jax").setLevel(logging.INFO)


def quiet_failed_saves() -> None:
    """Silences what orbax and tensorstore add to the one sentence about a checkpoint that could not be written: a
    traceback for each file, and another for each that they go on writing after orbax has given up.

    Changes the loggers "absl" and "asyncio", the filter of warnings and `sys.unraisablehook`, for the whole process.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def report_others(what) -> None:
        closed = what.exc_type is RuntimeError and str(what.exc_value) == "Event loop is closed"
        if not closed and not interrupts.again(what):
            report(what)

    sys.unraisablehook = report_others
