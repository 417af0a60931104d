"""Images drawn and scored a batch at a time: the one way, during training and for a checkpoint."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from gspn_jax.metrics.extractor import Extractor
from gspn_jax.metrics.inception import Features

Draw = Callable[[Int[np.ndarray, " N"], Int[np.ndarray, " N"]], UInt8[Array | np.ndarray, "N H W 3"]]
Add = Callable[[Features, Bool[Array | np.ndarray, " N"]], None]


def draw_and_score(
    draw: Draw,
    labels: Int[np.ndarray, " N"],
    numbers: Int[np.ndarray, " N"],
    extractor: Extractor,
    add: Add,
    *,
    stop: Callable[[], str | None] = lambda: None,
    done: Callable[[int], None] = lambda count: None,
) -> str | None:
    """Gives `add` the features of one image a (label, number), and a mask that is True for rows that count.

    Every batch has the extractor's size, so that all is compiled once: the last one is filled up with images that do
    not count. `done` is called with the number of images that are scored, `stop` before each batch: what it names ends
    the scoring and is returned; None says that all images are scored.
    """
    count, size = len(labels), extractor.batch_size
    for first in range(0, count, size):
        asked = stop()
        if asked:
            return asked
        rows = np.arange(first, first + size)
        features, _ = extractor(draw(labels[rows % count], numbers[rows % count]))
        add(features, rows < count)
        jax.block_until_ready(features)  # neither the bar nor a signal's answer runs ahead of the devices
        done(min(count, first + size))
    return None
