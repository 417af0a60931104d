"""Text to image with Stable Diffusion: a folder as diffusers writes it, and what the U-Net is told of a prompt."""

from gspn_jax.text_to_image.conditions import TextConditions, encode_prompts
from gspn_jax.text_to_image.folder import Model, TextPart, load_folder

__all__ = ["Model", "TextConditions", "TextPart", "encode_prompts", "load_folder"]
