"""The names under which a run keeps the averages of its parameters."""

import numpy as np

_PREFIX = "ema_"


def name(decay: float) -> str:
    """The key of a decay in a state, with all its digits, such as "0.9999"."""
    return np.format_float_positional(decay, trim="-")


def item(decay: float) -> str:
    """The item of a checkpoint that holds the average of a decay."""
    return item_of(name(decay))


def item_of(name: str) -> str:
    """The item of a checkpoint that holds the average of that name."""
    return _PREFIX + name


def is_item(item: str) -> bool:
    return item.startswith(_PREFIX)


def old_item(item: str) -> str:
    """`item` as it was called before version 2 of the config: six digits, so that 0.9999999 was "ema_1"."""
    return f"{_PREFIX}{float(item.removeprefix(_PREFIX)):g}"
