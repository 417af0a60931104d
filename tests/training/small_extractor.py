"""A feature network that compiles in no time."""

import jax
import numpy as np

from gspn_jax.metrics import extractor, reference
from gspn_jax.metrics.inception import Features
from gspn_jax.training import evaluation

SIDE = 8


SIZES = {"pool": 12, "spatial": 6}


class SmallExtractor(extractor.Extractor):
    """In place of Inception, whose compilation takes longest: random projections of the pixels."""

    def __init__(self, params, **settings):
        super().__init__({}, **settings)
        random = np.random.default_rng(0)
        project = [random.standard_normal((3 * SIDE**2, size)).astype(np.float32) for size in (*SIZES.values(), 8)]
        self._resize = lambda images: images
        self._network = jax.jit(
            lambda params, images: Features(*(images.reshape(len(images), -1) / 255.0 @ p for p in project))
        )


def use_small_extractor(patch):
    patch.setattr(evaluation, "Extractor", SmallExtractor)
    patch.setattr(reference, "_SIZES", SIZES)
