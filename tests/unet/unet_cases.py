"""Inputs, and the `config.json` that diffusers would write, of a `UNetConfig`."""

import numpy as np

from gspn_jax.unet import Added, UNetConfig

TIMESTEPS = np.array([999.0, 0.0, 500.5], np.float32)


def random_inputs(config: UNetConfig, height: int, width: int, seed: int = 1):
    """Latents, text states of 5 tokens, and pooled text and sizes in pixels or None; for three images."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, height, width, config.in_channels), np.float32)
    context = rng.standard_normal((3, 5, config.context_width), np.float32)
    if config.added_width is None:
        return x, context, None
    pooled = rng.standard_normal((3, config.pooled_width), np.float32)
    return x, context, Added(pooled, rng.integers(0, 1025, (3, 6)).astype(np.float32))


def as_json(config: UNetConfig) -> dict:
    added = (
        {}
        if config.added_width is None
        else {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.added_size_width,
            "projection_class_embeddings_input_dim": config.added_width,
        }
    )
    return added | {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths)],
        "layers_per_block": config.layers,
        "attention_head_dim": list(config.heads),
        "norm_num_groups": config.groups,
        "transformer_layers_per_block": [*(depth or 1 for depth in config.depths[:-1]), config.middle_depth],
        "cross_attention_dim": config.context_width,
        "use_linear_projection": config.linear_projection,
    }
