"""Sets of features for runs on digits."""

import dataclasses
import pathlib

import numpy as np
from jaxtyping import Float

from gspn_jax.config import AlignConfig, Config
from gspn_jax.data.digits import DigitsSource
from gspn_jax.data.features import FeatureMetadata, FeatureSet, write_shard
from gspn_jax.data.record_files import shard_name

GRID = 4
"""Tokens a side of the tiny run."""


def write(
    folder: pathlib.Path,
    features: Float[np.ndarray, "N V h w D"],
    images: str | None = None,
    image_size: int = 8,
    parts: int = 2,
) -> FeatureSet:
    """The features of as many images, by default the digits, in shards."""
    folder.mkdir(parents=True)
    shards = [
        write_shard(folder / shard_name("features", i, parts), part.astype(np.float16))
        for i, part in enumerate(np.array_split(features, parts))
    ]
    FeatureMetadata(
        network="toy",
        network_sha256="0" * 64,
        image_size=image_size,
        shape=features.shape[2:],
        images=images or DigitsSource(8, 1).fingerprint,
        shards=tuple(shards),
        flips=features.shape[1] == 2,
    ).write(folder)
    return FeatureSet(str(folder))


def patches(images: np.ndarray, grid: int = GRID) -> np.ndarray:
    """[N, grid, grid, D]: the pixels of every patch, in -1..1."""
    count, side = len(images), images.shape[1] // grid
    x = images.reshape(count, grid, side, grid, side, -1) / 127.5 - 1
    return x.swapaxes(2, 3).reshape(count, grid, grid, -1)


def digits() -> np.ndarray:
    source = DigitsSource(8, 1)
    return np.stack([source[i]["image"] for i in range(len(source))])


def of_digits(folder: pathlib.Path, width: int = 6) -> FeatureSet:
    """A linear function of each patch of the digits and of their mirror images."""
    project = np.random.default_rng(0).standard_normal((4, width))
    images = digits()
    return write(folder, np.stack([patches(view) @ project for view in (images, images[:, :, ::-1])], axis=1))


def with_features(config: Config, features: FeatureSet | str, **settings) -> Config:
    path = features if isinstance(features, str) else features.path
    align = AlignConfig(features=path, **{"depth": 1, "hidden": 32} | settings)
    return dataclasses.replace(config, align=align)
