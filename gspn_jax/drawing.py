"""Images of a checkpoint by the thousand, with a bar; what `sample.py` writes and `gspn_jax.evaluate` scores."""

import dataclasses
import hashlib
import pathlib
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int, UInt8
from tqdm import tqdm

from gspn_jax import autoencoder, models
from gspn_jax.config import Config, ConfigError
from gspn_jax.diffusion.samplers import sampler_name
from gspn_jax.sampling import Sampler
from gspn_jax.training import checkpoints

Labels = Literal["random", "balanced"]

DECODED_AT_A_TIME, DECODED_PIXELS = 16, 16 * 256**2
"""Bound the memory of decoding, which at 256 pixels is more than that of sampling."""


def draw_labels(kind: Labels, count: int, num_classes: int, seed: int) -> Int[np.ndarray, " N"]:
    """Uniform at random, or equally many of each class in turn; in neither case sorted by class."""
    if kind == "random":
        return np.random.default_rng(seed).integers(num_classes, size=count)
    return np.arange(count) % num_classes


def load_autoencoder(path: str | None, config: Config,
                     image_size: tuple[int, int] | None = None) -> autoencoder.Autoencoder | None:
    """The decoder for latents of `image_size` (that of the run by default); None for a run on pixels or without `path`.

    Raises ConfigError for weights that the run has no use for, and as `autoencoder.load`.
    """
    if path is None:
        return None
    if config.data.source != "latents":
        raise ConfigError(f"--vae is for a run on latents, found one with data.source {config.data.source!r}")
    weights, sizes = autoencoder.load(path)
    if sizes.latent_channels != config.data.channels:
        raise ConfigError(f"--vae must be of {config.data.channels} latent channels, as the run is, found "
                          f"{sizes.latent_channels} in {path}")
    height, width = image_size or (config.data.image_size,) * 2
    fitting = DECODED_PIXELS // (height * width * sizes.factor**2)
    return autoencoder.Autoencoder(weights, sizes, batch_size=max(1, min(DECODED_AT_A_TIME, fitting)))


class Drawing:
    """`drawing(labels, seeds)` are images of the checkpoint of `step`; draw in a `with` statement, which has the bar.

    An image is its seed and label, whatever the batch or the mesh (see `sampling.Sampler`).
    """

    def __init__(self, run: str | pathlib.Path, step: int, config: Config, mesh: Mesh, *, total: int, batch_size: int,
                 ema: float | None = None, image_size: tuple[int, int] | None = None,
                 vae: autoencoder.Autoencoder | None = None, description: str = "sampling"):
        """`total` images will be drawn, `batch_size` at a time; `ema` and `image_size` None are the run's own.

        Raises ConfigError or CheckpointError for what cannot be drawn.
        """
        height, width = image_size or (config.data.image_size,) * 2
        factor, channels = (vae.config.factor, 3) if vae else (1, config.data.channels)
        self.shape = (height * factor, width * factor, channels)
        self.batch_size = min(batch_size, total)
        self._run, self._step, self._config = run, step, config
        self._ema = config.train.ema_decays[0] if ema is None else ema
        self._sampler = Sampler(config, mesh, image_size=(height, width), progress=self._progress,
                                decode=vae.decode if vae else None)
        trained = config.data.image_size
        if models.resolve(config.model).mixer == "attention" and (height, width) != (trained, trained):
            raise ConfigError(f"--image-size must be the one that a model with attention was trained on, {trained} "
                              f"{trained}, whose positions it knows, found {height} {width}: GSPN takes any")
        try:
            self._params = checkpoints.restore_params(run, step, config, mesh, ema_decay=self._ema)
        except KeyError as error:  # an item that is not there
            raise checkpoints.CheckpointError(f"the checkpoint of step {step} in {run} must hold the parameters asked "
                                              f"for (--ema {self._ema:g}), found none: it was imported, without those"
                                              ) from error
        self._batches = 0
        self._evaluations = self._sampler.evaluations * -(-total // self.batch_size)
        self._description = description

    def __enter__(self) -> "Drawing":
        self._bar = tqdm(unit="evaluation", desc=self._description, dynamic_ncols=True, total=self._evaluations,
                         disable=jax.process_index() > 0)
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def __call__(self, labels: Int[np.ndarray, " N"], seeds: Int[np.ndarray, " N"]) -> UInt8[np.ndarray, "N H W C"]:
        """Up to `batch_size` images. Every batch has the same shape, so that the sampler is compiled once."""
        padded = [np.resize(a, self.batch_size) for a in (labels, seeds)]
        return self._sampler(self._params, *padded)[:len(labels)]

    def done(self, count: int) -> None:
        """Moves the bar to `count` images in all."""
        self._batches = -(-count // self.batch_size)
        self._bar.update(max(0, self._batches * self._sampler.evaluations - self._bar.n))

    def _progress(self, evaluations: int, total: int) -> None:  # called from the device's thread, in any order
        self._bar.update(max(0, self._batches * total + evaluations - self._bar.n))

    def settings(self) -> dict[str, Any]:
        """What an image depends on beside its seed and label, as JSON values; `images_seen` in training."""
        config = self._config
        sampler = dataclasses.asdict(config.sampler) | {"name": sampler_name(config.sampler, config.diffusion),
                                                        "guidance_interval": list(config.sampler.guidance_interval)}
        return {"run": str(self._run), "model": config.model.preset, "step": self._step,
                "images_seen": self._step * config.train.batch_size, "ema_decay": self._ema, "sampler": sampler,
                "parameters_sha256": digest_of(self._params, config), "image_size": list(self.shape[:2])}


def digest_of(params: Any, config: Config) -> str:
    """SHA-256 over the parameters of `config` and where they are in the tree; the same on any mesh, however it stores
    them (`sharding.stored`). Every host must call it."""
    total = hashlib.sha256()
    shapes = jax.tree.leaves(models.abstract(config)[1])
    for (path, leaf), own in zip(jax.tree_util.tree_leaves_with_path(params), shapes, strict=True):
        total.update(jax.tree_util.keystr(path, simple=True, separator="/").encode())
        if not getattr(leaf, "is_fully_addressable", True):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        total.update(np.ascontiguousarray(np.asarray(leaf)[tuple(map(slice, own.shape))]).tobytes())
    return total.hexdigest()
