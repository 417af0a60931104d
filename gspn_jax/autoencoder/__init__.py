"""The autoencoder of Stable Diffusion (sd-vae-ft-ema, sd-vae-ft-mse): images to moments of latents and back."""

from gspn_jax.autoencoder.model import LATENT_SCALE, AutoencoderConfig, decode, encode
from gspn_jax.autoencoder.runner import Autoencoder, decode_to_uint8
from gspn_jax.autoencoder.weights import expected_shapes, from_state_dict, load

__all__ = [
    "LATENT_SCALE",
    "Autoencoder",
    "AutoencoderConfig",
    "decode",
    "decode_to_uint8",
    "encode",
    "expected_shapes",
    "from_state_dict",
    "load",
]
