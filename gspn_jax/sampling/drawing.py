"""Images of a checkpoint by the thousand, with a bar; what `sample.py` writes and `gspn_jax.evaluate` scores."""

import dataclasses
import math
import pathlib
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8
from tqdm import tqdm

from gspn_jax import autoencoder, models
from gspn_jax.config import Config, ConfigError
from gspn_jax.diffusion.samplers import sampler_name
from gspn_jax.parallel import sharding
from gspn_jax.parallel.memory import bytes_a_device, check_fits
from gspn_jax.runs import checkpoints
from gspn_jax.runs.digest import digest_of
from gspn_jax.sampling import seeds
from gspn_jax.sampling.sampler import Sampler

Labels = Literal["random", "balanced"]


def draw_labels(kind: Labels, count: int, num_classes: int, seed: int) -> Int[np.ndarray, " N"]:
    """Uniform at random, or equally many of each class in turn; in neither case sorted by class."""
    if kind == "random":
        return np.random.default_rng(seed).integers(num_classes, size=count)
    return np.arange(count) % num_classes


class Drawing:
    """`drawing(labels, numbers)` are images of the checkpoint of `step`; draw in a `with` statement, which has the bar.

    An image is the set's seed, its number in it and its label, whatever the batch or the mesh (see `sampling.Sampler`).
    """

    def __init__(
        self,
        run: str | pathlib.Path,
        step: int,
        config: Config,
        mesh: Mesh,
        *,
        total: int,
        batch_size: int,
        seed: int = 0,
        ema: float | None = None,
        image_size: tuple[int, int] | None = None,
        vae: autoencoder.Autoencoder | None = None,
        description: str = "sampling",
    ):
        """`total` images will be drawn, `batch_size` at a time; `ema` and `image_size` None are the run's own.

        Raises ConfigError or CheckpointError for what cannot be drawn.
        """
        seeds.check(seed, total)
        height, width = image_size or (config.data.image_size,) * 2
        factor, channels = (vae.config.factor, 3) if vae else (1, config.data.channels)
        self.shape = (height * factor, width * factor, channels)
        self.batch_size, self._size = batch_size, (height, width)
        self._run, self._step, self._config = run, step, config
        self._ema = config.train.ema_decays[0] if ema is None else ema
        self._sampler = Sampler(
            config,
            mesh,
            seed=seed,
            image_size=(height, width),
            progress=self._progress,
            decode=vae.decode if vae else None,
        )
        trained = config.data.image_size
        if models.resolve(config.model).options.needs_positions and (height, width) != (trained, trained):
            raise ConfigError(
                f"--image-size must be the one that a model with attention was trained on, {trained} "
                f"{trained}, whose positions it knows, found {height} {width}: GSPN takes any"
            )
        self._check_memory(mesh)
        try:
            self._params = checkpoints.restore_params(run, step, config, mesh, ema_decay=self._ema)
        except KeyError as error:  # an item that is not there
            raise checkpoints.CheckpointError(
                f"the checkpoint of step {step} in {run} must hold the parameters asked "
                f"for (--ema {self._ema:g}), found none: it was imported, without those"
            ) from error
        self._batches = 0
        self._evaluations = self._sampler.evaluations * -(-total // self.batch_size)
        self._description = description

    def _check_memory(self, mesh: Mesh) -> None:
        """Raises ConfigError for parameters and a batch of noise, of images in float32 and of a block's tokens that a
        device cannot hold together."""
        height, width = self._size
        arch, data = models.resolve(self._config.model), self._config.data
        images = -(-self.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]))
        tokens = (height // arch.patch) * (width // arch.patch) * arch.hidden
        an_image = 4 * (math.prod(self.shape) + height * width * data.channels) + 2 * tokens
        check_fits(
            bytes_a_device(sharding.stored(models.abstract(self._config)[1], mesh)) + images * an_image,
            mesh,
            f"the parameters and {images:,} images of {'x'.join(map(str, self.shape))}",
            "a smaller --batch-size or --image-size takes less",
        )

    def __enter__(self) -> "Drawing":
        self._bar = tqdm(
            unit="evaluation",
            desc=self._description,
            dynamic_ncols=True,
            total=self._evaluations,
            disable=jax.process_index() > 0,
        )
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def __call__(self, labels: Int[np.ndarray, " N"], numbers: Int[np.ndarray, " N"]) -> UInt8[np.ndarray, "N H W C"]:
        """Up to `batch_size` images. Every batch has the same shape, so that the sampler is compiled once."""
        padded = [np.resize(a, self.batch_size) for a in (labels, numbers)]
        return self._sampler(self._params, *padded)[: len(labels)]

    def done(self, count: int) -> None:
        """Moves the bar to `count` images in all."""
        self._batches = -(-count // self.batch_size)
        self._bar.update(max(0, self._batches * self._sampler.evaluations - self._bar.n))

    def _progress(self, evaluations: int, total: int) -> None:  # called from the device's thread, in any order
        self._bar.update(max(0, self._batches * total + evaluations - self._bar.n))

    def settings(self) -> dict[str, Any]:
        """Settings that decide an image beside seed, number and label, as JSON values; `images_seen` in training."""
        config = self._config
        sampler = dataclasses.asdict(config.sampler) | {
            "name": sampler_name(config.sampler, config.diffusion),
            "guidance_interval": list(config.sampler.guidance_interval),
        }
        return {
            "run": str(self._run),
            "model": config.model.preset,
            "step": self._step,
            "images_seen": self._step * config.train.batch_size,
            "ema_decay": self._ema,
            "sampler": sampler,
            "parameters_sha256": digest_of(self._params, models.abstract(config)[1]),
            "image_size": list(self.shape[:2]),
            "noise": seeds.RULE,
        }
