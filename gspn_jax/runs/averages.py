"""The names under which a run keeps the averages of its parameters."""

import numpy as np


def name(decay: float) -> str:
    """The key of a decay in a state and in a checkpoint, with all its digits, such as "0.9999"."""
    return np.format_float_positional(decay, trim="-")


def item(decay: float) -> str:
    """The item of a checkpoint that holds the average of a decay."""
    return f"ema_{name(decay)}"


def old_item(decay: float) -> str:
    """`item` as it was until config version 1: six digits, so that 0.9999999 was "ema_1"."""
    return f"ema_{decay:g}"
