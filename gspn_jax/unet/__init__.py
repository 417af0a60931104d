"""The U-Net of Stable Diffusion 1, 2 and SDXL: noised latents, time and text to noise (or v)."""

from gspn_jax.unet.config import SDXL, STABLE_DIFFUSION_1, STABLE_DIFFUSION_2, UNetConfig
from gspn_jax.unet.model import Added, Attend, Execution, Mixer, apply, apply_with_features, attention, self_attention
from gspn_jax.unet.prediction import Prediction, split_prediction
from gspn_jax.unet.weights import expected_shapes, from_state_dict, init, load_unet, shapes, to_state_dict

__all__ = [
    "SDXL",
    "STABLE_DIFFUSION_1",
    "STABLE_DIFFUSION_2",
    "Added",
    "Attend",
    "Execution",
    "Mixer",
    "Prediction",
    "UNetConfig",
    "apply",
    "apply_with_features",
    "attention",
    "expected_shapes",
    "from_state_dict",
    "init",
    "load_unet",
    "self_attention",
    "shapes",
    "split_prediction",
    "to_state_dict",
]
