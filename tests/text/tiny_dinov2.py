"""A tiny DINOv2 with random weights, by the names of each kind of file."""

import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file

from gspn_jax.text.dinov2 import Dinov2Config, expected_shapes

CONFIG = Dinov2Config(width=24, layers=2, heads=3, hidden=96, patch=14, grid=5)


def random_state_dict(config: Dinov2Config = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """By our names; no part is negligible, and attention is sharp."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        value = rng.standard_normal(shape)
        if "embeddings" not in name or "projection" in name:
            if len(shape) > 1:
                value *= (2 if "attention" in name else 1) / math.sqrt(np.prod(shape[1:]))
            else:
                value = 0.3 * value + (name.endswith("weight") or "lambda" in name)
        weights[name] = value.astype(np.float32)
    return weights


def published(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the names of facebook/dinov2-base and -giant, with the mask token."""
    found, width = {}, weights["layernorm.weight"].size
    for name, value in weights.items():
        for there, here in (
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.out_proj"),
            ("mlp.weights_out", "mlp.down_proj"),
        ):
            name = name.replace(here, there)
        if "up_proj" in name:
            continue
        if "gate_proj" in name:
            value = np.concatenate([value, weights[name.replace("gate_proj", "up_proj")]])
            name = name.replace("gate_proj", "weights_in")
        found[name] = value[None] if name.endswith(("cls_token", "position_embeddings", "register_tokens")) else value
    return found | {"embeddings.mask_token": np.ones((1, width), np.float32)}


def original(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the names of facebookresearch/dinov2's files."""
    found = {"mask_token": np.ones((1, weights["layernorm.weight"].size), np.float32)}
    for name, value in weights.items():
        for there, here in (
            ("blocks.", "encoder.layer."),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("cls_token", "embeddings.cls_token"),
            ("register_tokens", "embeddings.register_tokens"),
            ("attn.proj", "attention.out_proj"),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
            ("mlp.w3", "mlp.down_proj"),
        ):
            name = name.replace(here, there)
        name = "norm" + name.removeprefix("layernorm") if name.startswith("layernorm") else name
        for whole, parts in (
            ("attn.qkv", [f"attention.{p}_proj" for p in "qkv"]),
            ("mlp.w12", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            if parts[0] in name:
                here = name.replace("blocks.", "encoder.layer.")
                value = np.concatenate([weights[here.replace(parts[0], part)] for part in parts])
                name = name.replace(parts[0], whole)
        if any(part in name for part in ("k_proj", "v_proj", "up_proj")):
            continue
        found[name] = value[None] if name in ("cls_token", "pos_embed", "register_tokens") else value
    return found


def write_folder(folder: pathlib.Path, config: Dinov2Config = CONFIG, seed: int = 0) -> pathlib.Path:
    """As transformers' `Dinov2Model`."""
    folder.mkdir(parents=True)
    about = {"model_type": "dinov2", "num_attention_heads": config.heads}
    (folder / "config.json").write_text(json.dumps(about))
    save_file(published(random_state_dict(config, seed)), folder / "model.safetensors")
    return folder
