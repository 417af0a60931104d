"""The GPU kernel on a machine without a GPU."""

import contextlib

from gspn_jax.kernels import compat


@contextlib.contextmanager
def interpreted(detect_races=True):
    try:
        with compat.interpreted(detect_races=detect_races):
            yield
    except BaseException:
        compat.reset_interpreter()
        raise
