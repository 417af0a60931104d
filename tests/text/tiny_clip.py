"""Folders of a tiny CLIP with random weights, as transformers and as OpenCLIP write them."""

import json
import math
import pathlib

import numpy as np
from safetensors.numpy import save_file

from gspn_jax.text import TextConfig
from gspn_jax.text.vision import VisionConfig, expected_shapes
from tests.text import numpy_clip
from tests.text.plain_bpe import small_vocabulary

IMAGE = VisionConfig(width=24, layers=2, heads=3, hidden=96, projection=20, image_size=28, patch=7)
TEXT = TextConfig(
    width=16, layers=2, heads=2, hidden=64, vocabulary=len(small_vocabulary()[0]), length=40, projection=20
)


def random_state_dict(seed: int = 0) -> dict[str, np.ndarray]:
    """Both towers by the names of transformers; no layer is negligible, and attention is sharp."""
    rng = np.random.default_rng(seed)
    weights = {"logit_scale": np.array(4.6, np.float32)}
    for name, shape in expected_shapes(IMAGE).items():
        value = rng.standard_normal(shape)
        if len(shape) > 1 and "position" not in name:
            value *= (2 if "_proj." in name else 1) / math.sqrt(np.prod(shape[1:]))
        elif len(shape) == 1 and "class_embedding" not in name:
            value = 0.3 * value + name.endswith("weight")
        weights[name if name.startswith("visual") else f"vision_model.{name}"] = value.astype(np.float32)
    return weights | numpy_clip.random_state_dict(TEXT, seed + 1)


def write_tokenizer(folder: pathlib.Path) -> None:
    words, merges = small_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(words))
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")


def transformers_config() -> dict:
    text = numpy_clip.config_json(TEXT)
    image = {
        "hidden_size": IMAGE.width,
        "num_hidden_layers": IMAGE.layers,
        "num_attention_heads": IMAGE.heads,
        "intermediate_size": IMAGE.hidden,
        "hidden_act": IMAGE.activation,
        "image_size": IMAGE.image_size,
        "patch_size": IMAGE.patch,
        "projection_dim": IMAGE.projection,
    }
    return {"model_type": "clip", "projection_dim": 20, "text_config": text, "vision_config": image}


def write_folder(folder: pathlib.Path) -> pathlib.Path:
    """As transformers' `CLIPModel`."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(transformers_config()))
    save_file(random_state_dict(), folder / "model.safetensors")
    return folder


def write_open_clip_folder(folder: pathlib.Path) -> pathlib.Path:
    """The same network as OpenCLIP writes it."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    model = {
        "embed_dim": 20,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 24, "head_width": 8, "patch_size": 7},
        "text_cfg": {"context_length": 40, "vocab_size": TEXT.vocabulary, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    save_file(open_clip_state_dict(random_state_dict()), folder / "open_clip_model.safetensors")
    return folder


def open_clip_state_dict(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """OpenCLIP's names, query, key and value in one, projections as matrices."""
    towers = {"vision_model": "visual.transformer", "text_model": "transformer"}
    found = {
        "logit_scale": weights["logit_scale"],
        "visual.class_embedding": weights["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": weights["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": weights["visual_projection.weight"].T,
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "text_projection": weights["text_projection.weight"].T,
    }
    for part in ("weight", "bias"):
        found[f"visual.ln_pre.{part}"] = weights[f"vision_model.pre_layrnorm.{part}"]
        found[f"visual.ln_post.{part}"] = weights[f"vision_model.post_layernorm.{part}"]
        found[f"ln_final.{part}"] = weights[f"text_model.final_layer_norm.{part}"]
        for ours, theirs in towers.items():
            for i in range(2):
                block, name = f"{theirs}.resblocks.{i}", f"{ours}.encoder.layers.{i}"
                found[f"{block}.attn.in_proj_{part}"] = np.concatenate(
                    [weights[f"{name}.self_attn.{letter}_proj.{part}"] for letter in "qkv"]
                )
                for there, here in (
                    ("ln_1", "layer_norm1"),
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    found[f"{block}.{there}.{part}"] = weights[f"{name}.{here}.{part}"]
    return {name: np.ascontiguousarray(value) for name, value in found.items()}
