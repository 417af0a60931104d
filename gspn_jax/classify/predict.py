"""Predictions of a trained classifier: files and folders of images -> the likeliest classes with their names."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from gspn_jax.classify import weights
from gspn_jax.classify.config import ClassifyConfig, check_view
from gspn_jax.classify.network import Network, forward
from gspn_jax.config import ConfigError, check_numbers
from gspn_jax.data.augment.crops import evaluation_crop
from gspn_jax.data.decoding import read_image
from gspn_jax.data.flat_folder import FlatFolder
from gspn_jax.parallel import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    """Name what is in images."""

    run: str
    """A run directory, or what `export` wrote."""
    images: tuple[str, ...]
    """Image files, and folders whose images are looked at wherever they lie below."""
    top: int = 5
    """Classes an image."""
    step: int | None = None
    ema: float | None = None
    """The EMA decay; the first of the run by default, 0 for the parameters themselves."""
    image_size: int | None = None
    crop: float | None = None
    batch_size: int = 32
    json: bool = False
    """Prints one JSON object a line in place of a table."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, found {getattr(self, name)}")
        check_view(self.image_size, self.crop)
        if not self.images:
            raise ConfigError("--images must name files or folders of images, found none")


def predict(arguments: Predict) -> list[dict]:
    """Prints the classes of every image, and returns them: {"image", "classes": [{"name", "probability"}, ...]}.

    Raises ConfigError, CheckpointError or WeightsError for what cannot be used; DataError for an image that cannot be
    decoded.
    """
    files = _files(arguments.images)
    mesh = sharding.make_mesh(ClassifyConfig(run_dir=".").mesh, jax.devices()[:1])
    is_run = not pathlib.Path(arguments.run).is_file() and not (pathlib.Path(arguments.run) / weights.WEIGHTS).is_file()
    decay = weights.first_average(arguments.run) if arguments.ema is None and is_run else arguments.ema
    trained = weights.read(arguments.run, mesh, step=arguments.step, decays=None if decay is None else (decay,))
    (params,) = trained.sets.values()
    config = trained.config
    size, crop = arguments.image_size or config.validation.image_size, arguments.crop or config.eval.crop
    network = Network(config, "float32")

    logits = forward(config, network, mesh)
    probabilities = jax.jit(lambda params, images: jax.nn.softmax(logits(params, images)))
    found, batch_size = [], min(arguments.batch_size, len(files))
    for start in range(0, len(files), batch_size):
        part = files[start : start + batch_size]
        images = np.stack([evaluation_crop(read_image(path, None, config.data.channels), size, crop) for path in part])
        padded = np.pad(images, [(0, batch_size - len(part)), (0, 0), (0, 0), (0, 0)])
        for path, row in zip(part, np.asarray(probabilities(params, jnp.asarray(padded))), strict=False):
            best = np.argsort(-row, kind="stable")[: arguments.top]
            classes = [{"name": trained.class_names[i], "probability": float(row[i])} for i in best]
            found.append({"image": path, "classes": classes})
            _show(found[-1], arguments.json)
    return found


def _files(images: tuple[str, ...]) -> list[str]:
    """Raises ConfigError for a path that is not there, or a folder without images."""
    files = []
    for path in images:
        if os.path.isdir(path):
            files += FlatFolder(path).files
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise ConfigError(f"--images must be files or folders of images, found nothing at {path!r}")
    return files


def _show(found: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
    else:
        classes = ", ".join(f"{one['name']} {100 * one['probability']:.1f} %" for one in found["classes"])
        print(f"{found['image']}: {classes}")
