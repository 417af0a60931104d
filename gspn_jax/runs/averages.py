"""The names under which a run keeps the averages of its parameters."""

import numpy as np

from gspn_jax.config import TrainConfig

_PREFIX = "ema_"
_WIDTH = "width_"


def name(decay: float) -> str:
    """The key of a decay in a state, with all its digits, such as "0.9999"."""
    return np.format_float_positional(decay, trim="-")


def name_of_width(width: float) -> str:
    """The key of a power-function average, such as "width_0.05"."""
    return _WIDTH + name(width)


def width_in(name: str) -> float | None:
    """The width that a key is of; None for that of a decay."""
    return float(name.removeprefix(_WIDTH)) if name.startswith(_WIDTH) else None


def names(config: TrainConfig) -> list[str]:
    """The keys of all averages that a run keeps."""
    widths = config.ema_widths if config.snapshot_every else ()
    return [*map(name, config.ema_decays), *map(name_of_width, widths)]


def item(decay: float) -> str:
    """The item of a checkpoint that holds the average of a decay."""
    return item_of(name(decay))


def item_of(name: str) -> str:
    """The item of a checkpoint that holds the average of that name."""
    return _PREFIX + name


def is_item(item: str) -> bool:
    return item.startswith(_PREFIX)


def width_of_item(item: str) -> float | None:
    """The width whose average an item of a checkpoint holds; None for every other item."""
    return width_in(item.removeprefix(_PREFIX)) if is_item(item) else None


def old_item(item: str) -> str:
    """`item` as it was called before version 2 of the config: six digits, so that 0.9999999 was "ema_1"."""
    if width_of_item(item) is not None:
        return item
    return f"{_PREFIX}{float(item.removeprefix(_PREFIX)):g}"
