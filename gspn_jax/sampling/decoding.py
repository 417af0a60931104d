"""From what a sampler draws to RGB: latents are decoded, greyscale gets three channels."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gspn_jax import autoencoder
from gspn_jax.config import Config, ConfigError
from gspn_jax.parallel import sharding
from gspn_jax.pixels import to_rgb
from gspn_jax.tensor_files import read_json

DECODED_AT_A_TIME, DECODED_PIXELS = 16, 16 * 256**2
"""Bound the memory of decoding, which at 256 pixels is more than that of sampling."""


def load_weights(
    path: str, flag: str, config: Config, latents: Mapping[str, Any] | None = None
) -> tuple[dict[str, np.ndarray], autoencoder.AutoencoderConfig]:
    """The autoencoder's weights in `path`, which `flag` named, for the latents of a run.

    Scale and shift are told by `latents`, which the checkpoint has ("scaling_factor", "shift_factor"), or where it has
    none by the set of latents that the run was trained on, if that is there.
    Raises ConfigError for an autoencoder of other latents, and as `autoencoder.load`.
    """
    weights, sizes = autoencoder.load(path, _trained_scale(config, latents))
    if sizes.latent_channels != config.data.channels:
        raise ConfigError(
            f"{flag} must be of {config.data.channels} latent channels, as the run is, found "
            f"{sizes.latent_channels} in {path}"
        )
    return weights, sizes


def _trained_scale(config: Config, latents: Mapping[str, Any] | None) -> autoencoder.Scale | None:
    metadata = pathlib.Path(config.data.path or "", "metadata.json")  # of `gspn_jax.data.latents`, which needs Grain
    if latents is None and config.data.latents and metadata.is_file():
        latents, told_by = read_json(metadata), str(metadata)
    else:
        told_by = "the checkpoint"
    if latents is None:
        return None
    factor, shift = latents.get("scaling_factor"), latents.get("shift_factor", 0.0)
    return autoencoder.check_scale(factor, shift, f"{told_by}: scaling_factor")


def load_autoencoder(
    path: str | None,
    config: Config,
    image_size: tuple[int, int] | None = None,
    latents: Mapping[str, Any] | None = None,
) -> autoencoder.Autoencoder | None:
    """The decoder for latents of `image_size` (that of the run by default); None for a run on pixels or without `path`.
    `latents` as `load_weights` has them.

    Raises ConfigError for weights that the run has no use for, and as `autoencoder.load`.
    """
    if path is None:
        return None
    if not config.data.latents:
        raise ConfigError(f"--vae is for a run on latents, found one with data.source {config.data.source!r}")
    weights, sizes = load_weights(path, "--vae", config, latents)
    height, width = image_size or (config.data.image_size,) * 2
    fitting = DECODED_PIXELS // (height * width * sizes.factor**2)
    return autoencoder.Autoencoder(weights, sizes, batch_size=max(1, min(DECODED_AT_A_TIME, fitting)))


def rgb_on(config: Config, mesh: Mesh, vae: str | None) -> tuple[Callable[[jax.Array], jax.Array], int]:
    """(function, S): from what `Sampler.draw` leaves on the devices of `mesh` to uint8 [N, S, S, 3], there.

    `vae` are the weights for a run on latents. Raises as `load_weights`.
    """
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    side = config.data.image_size
    if vae is None:
        return jax.jit(to_rgb, out_shardings=split), side
    weights, sizes = load_weights(vae, "eval.vae", config)
    weights = {
        name: jax.make_array_from_callback(value.shape, whole, lambda index, value=value: value[index])
        for name, value in weights.items()
    }
    decode = jax.jit(lambda weights, latents: autoencoder.decode_to_uint8(weights, sizes, latents), out_shardings=split)
    return lambda latents: decode(weights, latents), side * sizes.factor
