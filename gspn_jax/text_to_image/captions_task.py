"""The task that those of this package begin with: the U-Net in the folder of a model, on captions prepared for it."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gspn_jax import unet
from gspn_jax.config import ConfigError
from gspn_jax.data.captioned_latents import CaptionedLatents, make_loader
from gspn_jax.data.loader import Loader
from gspn_jax.data.source import Source
from gspn_jax.diffusion.scheduler_config import SchedulerConfig, alphas_cumprod
from gspn_jax.parallel import sharding
from gspn_jax.tensor_files import errors_name, read_json
from gspn_jax.text_to_image.config import LayersConfig, UNetTrainingConfig
from gspn_jax.text_to_image.folder import encoder_hashes, read_unet_config
from gspn_jax.training.given import Given
from gspn_jax.training.task import Batch, Task


class Noised(NamedTuple):
    """Inputs of a U-Net for a batch, and what it is to predict."""

    x: Float[Array, "B h w C"]
    added: unet.Added | None
    target: Float[Array, "B h w C"]
    """The noise, or v."""


class CaptionsTask(Task):
    """A task on the U-Net in `config.model.folder`, with the images and captions of `config.data`."""

    config: LayersConfig | UNetTrainingConfig

    def __init__(self, config: LayersConfig | UNetTrainingConfig):
        """Raises ConfigError, FileNotFoundError or WeightsError for a folder that has no U-Net."""
        super().__init__(config)
        folder = pathlib.Path(config.model.folder)
        self.unet_config = read_unet_config(folder)
        with errors_name(folder / "scheduler"):
            self.scheduler = SchedulerConfig.from_json(
                read_json(folder / "scheduler" / "scheduler_config.json", nan=True)
            )

    def noised(self, batch: Batch, times: Int[Array, " B"], noise: Float[Array, "B h w C"], dtype: DTypeLike) -> Noised:
        """The images of a batch at timesteps, in the type of the computation."""
        alpha = jnp.asarray(alphas_cumprod(self.scheduler), jnp.float32)[times][:, None, None, None]
        signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
        x = (signal * batch["image"] + sigma * noise).astype(dtype)
        target = noise if self.scheduler.prediction == "epsilon" else signal * noise - sigma * batch["image"]
        added = unet.Added(batch["pooled"], batch["sizes"]) if "pooled" in batch else None
        return Noised(x, added, target)

    def given_of(self, said: str, found: dict[str, np.ndarray]) -> Given:
        """Parameters of NumPy in their own shapes, by name, to begin with."""
        shapes = {name: self.shapes[name] for name in found}

        def read(mesh: Mesh) -> dict[str, Array]:
            where = sharding.param_shardings(shapes, mesh)
            return jax.jit(lambda found: sharding.pad(found, shapes, mesh), out_shardings=where)(found)

        return Given(said, shapes, read)

    def forward_flops(self) -> float:
        """Operations of one pass of the U-Net as it is."""
        metadata, config = self._source.metadata, self.unet_config
        shapes = unet.shapes(config)
        weights = {name: jax.ShapeDtypeStruct(own, jnp.float32) for name, own in shapes.items()}
        x = jax.ShapeDtypeStruct((1, *metadata.latent_shape), jnp.float32)
        context = jax.ShapeDtypeStruct((1, *metadata.context_shape), jnp.float32)
        pooled: Any = jax.ShapeDtypeStruct((1, metadata.pooled_width), jnp.float32)
        sizes: Any = jax.ShapeDtypeStruct((1, 6), jnp.float32)
        added = unet.Added(pooled, sizes) if metadata.pooled_width else None
        time = jax.ShapeDtypeStruct((1,), jnp.float32)
        apply = jax.jit(lambda *arguments: unet.apply(arguments[0], config, *arguments[1:]))
        found = apply.lower(weights, x, time, context, added).cost_analysis()
        return float((found or {}).get("flops", 0.0))

    # --- data
    def source(self) -> Source:
        """The set of `data.path`. Raises ConfigError unless it was made by the encoders of the folder."""
        return self._source

    @functools.cached_property
    def _source(self) -> CaptionedLatents:
        source, config, folder = CaptionedLatents(self.config.data.path), self.unet_config, self.config.model.folder
        about = source.metadata
        found = (about.latent_shape[2], about.context_shape[1], about.pooled_width)
        if found != (expected := (config.in_channels, config.context_width, config.pooled_width)):
            raise ConfigError(
                f"data.path must hold latents, text states and pooled states as wide as the U-Net takes, {expected}, "
                f"found {found} in {self.config.data.path}"
            )
        hashes = encoder_hashes(folder)
        if changed := sorted(name for name in hashes | about.files if hashes.get(name) != about.files.get(name)):
            raise ConfigError(
                f"data.path must be prepared by the encoders of {folder}, found a set that was made with "
                f"{'another' if changed[0] in about.files else 'no'} {changed[0]}: prepare the captions again"
            )
        return source

    def loader(self, source: Source, **place: int) -> Loader:
        return make_loader(self._source, batch_size=self.config.train.batch_size, **place)

    def images_with_captions(self, source: Source) -> str:
        """Words for `describe`."""
        size = self._source.metadata.image_size
        return f"{len(source):,} images of {size}x{size} with captions"


def mean_square(one: Float[Array, "B *N D"], other: Float[Array, "B *N D"]) -> Float[Array, ""]:
    """Mean of the squared difference, in float32."""
    return jnp.square(one.astype(jnp.float32) - other.astype(jnp.float32)).mean()
