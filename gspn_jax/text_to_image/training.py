"""The task of training a U-Net on images with captions, from the weights of its folder or afresh."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from gspn_jax import unet
from gspn_jax.data.source import Source
from gspn_jax.diffusion import objectives
from gspn_jax.models.parameters import ParamShape
from gspn_jax.parallel import sharding
from gspn_jax.text_to_image.captions_task import CaptionsTask, mean_square
from gspn_jax.text_to_image.conditions import null_condition
from gspn_jax.text_to_image.config import UNetTrainingConfig
from gspn_jax.text_to_image.drawing import attend_of
from gspn_jax.text_to_image.folder import UNET, load_texts
from gspn_jax.training.given import Given
from gspn_jax.training.task import Batch, Metrics
from gspn_jax.training.train import train_task
from gspn_jax.unet import UNetConfig

Weights = dict[str, Float[Array, "..."]]

_AXES = {4: (None, None, "embed", "channels"), 2: ("embed", "channels"), 1: ("channels",)}


def train(config: UNetTrainingConfig) -> pathlib.Path:
    """Trains as `train_task`; returns the run directory."""
    return train_task(UNetTask(config))


def shapes_of(config: UNetConfig) -> dict[str, ParamShape]:
    """Shape of every weight, float32, with the names of its axes."""
    return {name: ParamShape(own, jnp.float32, axes=_AXES[len(own)]) for name, own in unet.shapes(config).items()}


class UNetTask(CaptionsTask):
    """The U-Net of `config.model` as a denoiser of the images of `config.data`, told their captions."""

    config: UNetTrainingConfig

    # --- parameters
    @property
    def shapes(self) -> dict[str, ParamShape]:
        return shapes_of(self.unet_config)

    def init(self, key: Key[Array, ""]) -> Weights:
        return unet.init(self.unet_config, key)

    def given(self) -> Given | None:
        super().given()  # refuses init_from
        if self.config.model.start == "fresh":
            return None
        folder = pathlib.Path(self.config.model.folder) / UNET
        return self.given_of(str(folder), unet.load_unet(folder, np.float32)[0])

    def frozen(self, mesh: Mesh) -> tuple[Any, ...]:
        """The text states of an empty prompt, which take the place of a caption that is dropped."""
        texts, empty_is_zero = load_texts(self.config.model.folder)
        return (jax.device_put(null_condition(texts, None, zero=empty_is_zero), sharding.replicated(mesh)),)

    # --- a step
    def loss(self, params: Any, batch: Batch, key: Key[Array, ""], *frozen: Any) -> tuple[Float[Array, ""], Metrics]:
        """Mean squared error of the prediction of noise (or v) of a batch as `LayersTask.loss` has it; dropped
        captions, timesteps, uniform over those of the model, and noise come from `key`."""
        drop_key, time_key, noise_key = jax.random.split(key, 3)
        dtype = jnp.dtype(self.config.train.compute)
        (null,) = frozen
        told = {name: batch[name] for name in null}
        batch = batch | objectives.drop_condition(drop_key, told, self.config.diffusion.caption_dropout, null)
        image = batch["image"]
        times = jax.random.randint(time_key, image.shape[:1], 0, self.scheduler.timesteps)
        noise = jax.random.normal(noise_key, image.shape, jnp.float32)
        noised = self.noised(batch, times, noise, dtype)
        output = unet.apply(
            params, self.unet_config, noised.x, times, batch["context"], noised.added, attend=attend_of(dtype)
        )
        return mean_square(output, noised.target), {}

    # --- beside the steps
    def describe(self, source: Source) -> str:
        count = sum(int(np.prod(own.shape)) for own in self.shapes.values())
        return f"the U-Net ({count / 1e6:.1f}M parameters) of {self.config.model.folder} on " + (
            self.images_with_captions(source)
        )
