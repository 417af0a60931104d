"""Images of a checkpoint by the thousand, with a bar; what `sample.py` writes and `gspn_jax.evaluate` scores."""

import dataclasses
import logging
import math
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8
from tqdm import tqdm

from gspn_jax import autoencoder, models
from gspn_jax.config import ConfigError, SamplerConfig
from gspn_jax.diffusion.samplers import sampler_name
from gspn_jax.parallel.memory import check_fits
from gspn_jax.sampling import seeds
from gspn_jax.sampling.sampler import Sampler
from gspn_jax.sampling.weights import Weights

log = logging.getLogger(__name__)

Labels = Literal["random", "balanced"]

_GUIDES = ("guide", "guide_step", "guide_ema", "guide_ema_width", "guidance_sigmas")
"""Settings of a sampler that records have in other words, and only where they are used: older ones are not others."""


def draw_labels(kind: Labels, count: int, num_classes: int, seed: int) -> Int[np.ndarray, " N"]:
    """Uniform at random, or equally many of each class in turn; in neither case sorted by class."""
    if kind == "random":
        return np.random.default_rng(seed).integers(num_classes, size=count)
    return np.arange(count) % num_classes


class Drawing:
    """`drawing(labels, numbers)` are images of a run; draw in a `with` statement, which has the bar.

    `weights` may be set to others of the same model, with which the same program draws. An image is the set's seed, its
    number in it and its label, whatever the batch or the mesh (see `sampling.Sampler`).
    """

    def __init__(
        self,
        weights: Weights,
        sampler: SamplerConfig,
        *,
        total: int,
        batch_size: int,
        guide: Weights | None = None,
        seed: int = 0,
        image_size: tuple[int, int] | None = None,
        vae: autoencoder.Autoencoder | None = None,
        description: str = "sampling",
    ):
        """`total` images will be drawn, `batch_size` at a time, as `sampler` says; `guide` are the weights that it
        names (`weights.guide_of`), and `image_size` None is the run's own.

        Raises ConfigError or CheckpointError for what cannot be drawn.
        """
        config, mesh = dataclasses.replace(weights.config, sampler=sampler), weights.mesh
        seeds.check(seed, total)
        height, width = image_size or (config.data.image_size,) * 2
        factor, channels = (vae.config.factor, 3) if vae else (1, config.data.channels)
        self.shape = (height * factor, width * factor, channels)
        self.batch_size, self._size = batch_size, (height, width)
        self.weights, self._guide, self.config = weights, guide, config
        if guide is not None and sampler.guidance_scale == 1:
            log.warning("sampler.guide has nothing to do: sampler.guidance_scale is 1")
        self._sampler = Sampler(
            config,
            mesh,
            guide=guide and guide.config,
            seed=seed,
            image_size=(height, width),
            progress=self._progress,
            decode=vae.decode if vae else None,
        )
        trained, drawn_by = config.data.image_size, [config, *([guide.config] if guide else [])]
        positions = any(models.resolve(one.model).positions for one in drawn_by)
        if positions and (height, width) != (trained, trained):
            raise ConfigError(
                f"--image-size must be the one that a model with positions was trained on, {trained} "
                f"{trained}, whose positions it knows, found {height} {width}: GSPN takes any"
            )
        self._check_memory(mesh)
        self._evaluations = self._sampler.evaluations * -(-total // self.batch_size)
        self.description = description

    def _check_memory(self, mesh: Mesh) -> None:
        """Raises ConfigError for parameters and a batch of noise, of images in float32 and of a block's tokens that a
        device cannot hold together."""
        height, width = self._size
        arch, data = models.resolve(self.config.model), self.config.data
        images = -(-self.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]))
        tokens = (height // arch.patch) * (width // arch.patch) * arch.hidden
        an_image = 4 * (math.prod(self.shape) + height * width * data.channels) + 2 * tokens
        check_fits(
            self.weights.bytes_a_device() + (self._guide.bytes_a_device() if self._guide else 0) + images * an_image,
            mesh,
            f"the parameters and {images:,} images of {'x'.join(map(str, self.shape))}",
            "a smaller --batch-size or --image-size takes less",
        )

    def __enter__(self) -> "Drawing":
        self._params()
        self._batches = 0
        self._bar = tqdm(
            unit="evaluation",
            desc=self.description,
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
        return self._sampler(self._params(), *padded)[: len(labels)]

    def _params(self) -> Any:
        """Parameters that the sampler takes, read when they are first asked for."""
        return (self.weights.params, self._guide.params) if self._guide else self.weights.params

    def done(self, count: int) -> None:
        """Moves the bar to `count` images in all."""
        self._batches = -(-count // self.batch_size)
        self._bar.update(max(0, self._batches * self._sampler.evaluations - self._bar.n))

    def _progress(self, evaluations: int, total: int) -> None:  # called from the device's thread, in any order
        self._bar.update(max(0, self._batches * total + evaluations - self._bar.n))

    def settings(self) -> dict[str, Any]:
        """Settings that decide an image beside seed, number and label, as JSON values; `images_seen` in training."""
        config = self.config
        sampler = dataclasses.asdict(config.sampler) | {
            "name": sampler_name(config.sampler, config.diffusion),
            "guidance_interval": list(config.sampler.guidance_interval),
        }
        sampler = {name: value for name, value in sampler.items() if name not in _GUIDES}
        if config.sampler.guidance_sigmas is not None:
            sampler["guidance_sigmas"] = list(config.sampler.guidance_sigmas)
        guide = {"guide": self._guide.settings()} if self._guide else {}
        return (
            self.weights.settings()
            | guide
            | {"sampler": sampler, "image_size": list(self.shape[:2]), "noise": seeds.RULE}
        )
