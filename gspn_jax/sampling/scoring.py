"""Images drawn and scored a batch at a time: the one way, during training and for a checkpoint."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree, UInt8

from gspn_jax.metrics.extractor import Extractor

Draw = Callable[[Int[np.ndarray, " N"], Int[np.ndarray, " N"]], UInt8[Array | np.ndarray, "N H W 3"]]
Add = Callable[[PyTree[Array], Bool[Array | np.ndarray, " N"], str], None]


def draw_and_score(
    draw: Draw,
    labels: Int[np.ndarray, " N"],
    numbers: Int[np.ndarray, " N"],
    extractors: Mapping[str, Extractor],
    add: Add,
    *,
    stop: Callable[[], str | None] = lambda: None,
    done: Callable[[int], None] = lambda count: None,
) -> str | None:
    """Gives `add` the features of one image a (label, number), a mask that is True for rows that count, and the name of
    the feature network, for each of the `extractors`, which have it.

    Every batch has the extractors' size, so that all is compiled once: the last one is filled up with images that do
    not count. `done` is called with the number of images that are scored, `stop` before each batch: what it names ends
    the scoring and is returned; None says that all images are scored.
    """
    count, size = len(labels), next(iter(extractors.values())).batch_size
    for first in range(0, count, size):
        asked = stop()
        if asked:
            return asked
        rows = np.arange(first, first + size)
        images = draw(labels[rows % count], numbers[rows % count])
        for name, extractor in extractors.items():
            features, _ = extractor(images)
            add(features, rows < count, name)
            jax.block_until_ready(features)  # neither the bar nor a signal's answer runs ahead of the devices
        done(min(count, first + size))
    return None
