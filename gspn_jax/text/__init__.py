"""Tokenizer and towers of CLIP: prompts to the states that Stable Diffusion is conditioned on; images and captions to
the embeddings that a CLIP score compares (`clip`)."""

from gspn_jax.text.model import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, TextConfig, TextStates, encode
from gspn_jax.text.tokenizer import LENGTH, Tokenizer, Tokens, load_tokenizer
from gspn_jax.text.weights import expected_shapes, from_state_dict, load_tower

__all__ = [
    "CLIP_L",
    "LENGTH",
    "OPENCLIP_BIGG",
    "OPENCLIP_H",
    "TextConfig",
    "TextStates",
    "Tokenizer",
    "Tokens",
    "encode",
    "expected_shapes",
    "from_state_dict",
    "load_tokenizer",
    "load_tower",
]
