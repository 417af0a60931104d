"""The autoencoder of Stable Diffusion (sd-vae-ft-ema, sd-vae-ft-mse): images to moments of latents and back."""

from gspn_jax.autoencoder.model import LATENT_SCALE, PIXELS, AutoencoderConfig, decode, encode
from gspn_jax.autoencoder.runner import Autoencoder, decode_to_uint8
from gspn_jax.autoencoder.tiles import TiledAutoencoder
from gspn_jax.autoencoder.weights import Scale, check_scale, expected_shapes, from_state_dict, load, weights_file

__all__ = [
    "LATENT_SCALE",
    "PIXELS",
    "Autoencoder",
    "AutoencoderConfig",
    "Scale",
    "TiledAutoencoder",
    "check_scale",
    "decode",
    "decode_to_uint8",
    "encode",
    "expected_shapes",
    "from_state_dict",
    "load",
    "weights_file",
]
