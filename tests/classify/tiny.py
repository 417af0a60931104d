"""A classifier and its images small enough to compile and train in seconds."""

import pathlib

import numpy as np
from PIL import Image

from gspn_jax.classify import network
from gspn_jax.classify.config import AugmentConfig, ClassifierConfig, ClassifyConfig, ValidationConfig
from gspn_jax.config import DataConfig, OptimizerConfig, TrainConfig
from gspn_jax.models.hierarchy import Hierarchy, Stage
from gspn_jax.models.scan_mixer import LocalOptions

CLASSES = ("blue", "green", "red")


LOCAL = LocalOptions(expansion=1.0, kernel=3)


def use(patch, mixer=LOCAL) -> None:
    """Presets are of two stages of one block each, for images from 8 pixels on; scans take longest to compile."""

    def preset(name, *, drop_path=None, remat="none", **_):
        return Hierarchy((Stage(8, (2,), mixer), Stage(16, (None,), mixer)), drop_path or 0.0, remat)

    patch.setattr(network, "preset", preset)


def make_images(root: pathlib.Path, each: int, seed: int) -> str:
    """One folder a class: noise of 12x15 to 17x12 pixels whose own channel is the brightest."""
    random = np.random.default_rng(seed)
    for i in range(each * len(CLASSES)):
        label = i % len(CLASSES)
        path = root / CLASSES[label] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = random.integers(160, size=(12 + i % 6, 15 - i % 4, 3), dtype=np.uint8)
        image[..., 2 - label] += 90
        Image.fromarray(image).save(path)
    return str(root)


def config(run_dir, images: str, validation: str, **fields) -> ClassifyConfig:
    """Two evaluations in four steps of eight images of 8 pixels."""
    settings = {
        "model": ClassifierConfig(preset="GSPN-mini", drop_path=0.1),
        "data": DataConfig(source="folder", path=images, image_size=8, channels=3, num_classes=len(CLASSES)),
        "augment": AugmentConfig(crop_area=(0.5, 1.0)),
        "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=1, weight_decay=0.05, clip_norm=5.0),
        "train": TrainConfig(
            steps=4, batch_size=8, precision="params=float32,compute=float32", ema_decays=(0.9,), log_every=1,
            save_every=2,
        ),
        "eval": ValidationConfig(every=2, path=validation, batch_size=8),
    }  # fmt: skip
    return ClassifyConfig(run_dir=str(run_dir), **settings | fields)
