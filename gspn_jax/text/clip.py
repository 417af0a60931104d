"""A whole CLIP, image and text tower, from a folder as transformers or OpenCLIP write it; the feature network of CLIP
scores (a line of `tables.FEATURE_NETWORKS`)."""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from gspn_jax.config import ConfigError
from gspn_jax.state_dict import WeightsError
from gspn_jax.tensor_files import TensorFiles, arrange, errors_name, open_folder, read_json
from gspn_jax.text import vision
from gspn_jax.text.layers import Params
from gspn_jax.text.model import TextConfig, encode
from gspn_jax.text.tokenizer import Tokenizer, load_tokenizer
from gspn_jax.text.vision import VisionConfig
from gspn_jax.text.weights import from_state_dict as text_from_state_dict

OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")
"""Files of a folder of OpenCLIP; transformers' are config.json and model.safetensors."""
PROMPT = "A photo depicts "
"""Before the caption in a CLIP score (Hessel et al. 2021)."""

_BATCH = 64
"""Captions that are embedded at a time."""
_DROPPED = ("logit_scale", "logit_bias")
_POSITION_IDS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def require(path: str | None, flag: str) -> str:
    """`path` if it is a folder of CLIP. Raises ConfigError, which speaks of `flag`."""
    if path is None or not any((pathlib.Path(path) / name).is_file() for name in ("config.json", OPEN_CLIP[0])):
        raise ConfigError(
            f"{flag} must be a folder of CLIP as transformers or OpenCLIP write it, with config.json or "
            f"{OPEN_CLIP[0]}, found {path!r}"
        )
    return path


def configured(path: str) -> "Clip":
    """The network of a folder. Raises ConfigError, WeightsError or FileNotFoundError for what cannot be used."""
    return load_clip(path)


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """Both towers, in float32, as a `metrics.networks.FeatureNetwork` whose features are embeddings of length 1."""

    vision_config: VisionConfig
    vision: Mapping[str, Float32[np.ndarray, "..."]]
    text_config: TextConfig
    text: Mapping[str, Float32[np.ndarray, "..."]]
    tokenizer: Tokenizer

    def require(self, path: str | None, flag: str) -> str:
        return require(path, flag)

    def read(self, path: str) -> Mapping[str, Float32[np.ndarray, "..."]]:
        """The weights of the image tower, which are read already."""
        return self.vision

    def digest(self, state_dict: Mapping[str, np.ndarray]) -> str:
        """SHA-256 over the weights of both towers and their names."""
        total = hashlib.sha256()
        for weights in (state_dict, self.text):
            for name in sorted(weights):
                total.update(name.encode())
                total.update(np.ascontiguousarray(weights[name]).tobytes())
        return total.hexdigest()

    def from_state_dict(self, state_dict: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return state_dict

    def resize(self, images: UInt8[Array, "N H W 3"]) -> Float32[Array, "N h w 3"]:
        return vision.preprocess(images, self.vision_config.image_size)

    def network(self, params: Params, images: Float32[Array, "N h w 3"]) -> Float32[Array, "N P"]:
        return _unit(vision.embed(params, self.vision_config, images))

    def embed_captions(self, captions: Sequence[str]) -> Float32[np.ndarray, "N P"]:
        """Embeddings of "A photo depicts " + caption, cut at what the tower sees."""
        found = []
        for start in range(0, len(captions), _BATCH):
            part = [PROMPT + caption for caption in captions[start : start + _BATCH]]
            ids = self.tokenizer([*part, *[""] * (_BATCH - len(part))]).ids  # one shape, compiled once
            found.append(np.asarray(_embed_text(self.text, self.text_config, ids))[: len(part)])
        return np.concatenate(found)


def _unit(x: Float[Array, "N P"]) -> Float[Array, "N P"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=1)
def _embed_text(params: Params, config: TextConfig, ids: Int[Array, "N M"]) -> Float[Array, "N P"]:
    return _unit(encode(params, config, ids).pooled)


def load_clip(folder: str | pathlib.Path) -> Clip:
    """Reads a folder of transformers' `CLIPModel` (L/14, H, bigG, g and others of the family) or of OpenCLIP, with the
    tokenizer's files in it. Weights become float32.

    Raises FileNotFoundError, ConfigError and WeightsError that name the folder.
    """
    folder = pathlib.Path(folder)
    with errors_name(folder):
        if (folder / OPEN_CLIP[0]).is_file():
            image, text = _open_clip_configs(read_json(folder / OPEN_CLIP[0]))
            if not (folder / OPEN_CLIP[1]).is_file():
                raise FileNotFoundError(f"{folder} must hold {OPEN_CLIP[1]}; pickled .bin files are not read")
            tensors: Mapping[str, np.ndarray] = dict(_renamed(TensorFiles([folder / OPEN_CLIP[1]])))
        else:
            image, text = _transformers_configs(read_json(folder / "config.json"))
            tensors = open_folder(folder, "model")
        known = ("vision_model.", "visual_projection.", "text_model.", "text_projection.", *_DROPPED)
        if other := [name for name in tensors if not name.startswith(known)]:
            raise WeightsError(f"every tensor must belong to CLIP's towers, found {other[0]!r}")
        tokenizer = load_tokenizer(folder, length=text.length)
        if tokenizer.vocabulary != text.vocabulary:
            raise ConfigError(
                f"the tokenizer must have the text tower's {text.vocabulary} words, found {tokenizer.vocabulary}"
            )
        return Clip(
            image,
            arrange(
                _Part(tensors, "vision_model.", "visual_projection."),
                vision.expected_shapes(image),
                "the image tower",
                dtype=np.float32,
                rename=lambda name: None if name in _POSITION_IDS else name.removeprefix("vision_model."),
                as_stored=lambda name: "position_embedding" in name,
            ),
            text,
            text_from_state_dict(_Part(tensors, "text_model.", "text_projection."), text, np.float32),
            tokenizer,
        )


class _Part(Mapping[str, np.ndarray]):
    """The tensors whose names begin in one of some ways, read when they are asked for."""

    def __init__(self, tensors: Mapping[str, np.ndarray], *starts: str):
        self._tensors, self._names = tensors, [name for name in tensors if name.startswith(starts)]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _transformers_configs(content: Mapping[str, Any]) -> tuple[VisionConfig, TextConfig]:
    if (kind := content.get("model_type")) != "clip" or not isinstance(content.get("text_config"), Mapping):
        raise ConfigError(
            f"the config.json of a CLIP must be that of transformers' CLIPModel, found model_type {kind!r}"
        )
    defaults = {
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "hidden_act": "quick_gelu",
    }
    given = {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": content.get("projection_dim", 512)}
    return VisionConfig.from_json(content), TextConfig.from_json(defaults | dict(content["text_config"]) | given)


def _open_clip_configs(content: Mapping[str, Any]) -> tuple[VisionConfig, TextConfig]:
    """Of an `open_clip_config.json`. Raises ConfigError for a tower that is no plain ViT or CLIP's text transformer."""
    try:
        model, seen = content["model_cfg"], content.get("preprocess_cfg") or {}
        image, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
        plain = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
        for part, known in ((image, plain), (text, {"context_length", "vocab_size", "width", "heads", "layers"})):
            if other := {name for name, value in part.items() if value and name not in known}:
                raise ConfigError(f"CLIP's {min(other)} must be left out, found {part[min(other)]!r}")
        if tuple(seen.get("mean", vision.MEAN)) != vision.MEAN or tuple(seen.get("std", vision.DEVIATION)) != (
            vision.DEVIATION
        ):
            raise ConfigError(f"CLIP's mean must be {vision.MEAN}, found {seen.get('mean')}")
        activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
        return VisionConfig(
            width=image["width"],
            layers=image["layers"],
            heads=image["width"] // image.get("head_width", 64),
            hidden=int(image["width"] * image.get("mlp_ratio", 4.0)),
            activation=activation,
            projection=model["embed_dim"],
            image_size=image["image_size"],
            patch=image["patch_size"],
        ), TextConfig(
            width=text["width"],
            layers=text["layers"],
            heads=text["heads"],
            hidden=4 * text["width"],
            activation=activation,
            projection=model["embed_dim"],
            vocabulary=text["vocab_size"],
            length=text["context_length"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{OPEN_CLIP[0]} must have model_cfg with embed_dim, vision_cfg and text_cfg of a ViT, found an entry "
            f"that is none: {error!r}"
        ) from error


_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_OPEN_CLIP_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _renamed(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of OpenCLIP by the names of transformers, query, key and value apart and projections as linears."""
    for name in tensors:
        if name in _DROPPED or name == "attn_mask":
            continue
        if name in _OPEN_CLIP_NAMES:
            value = tensors[name]
            yield _OPEN_CLIP_NAMES[name], value.T if name in ("visual.proj", "text_projection") else value
            continue
        found = _BLOCK.fullmatch(name)
        part = found[3] if found else ""
        block = f"{'vision' if found and found[1] else 'text'}_model.encoder.layers.{found and found[2]}"
        if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for letter, value in zip("qkv", np.split(tensors[name], 3), strict=True):
                yield f"{block}.self_attn.{letter}_proj.{part.rpartition('_')[2]}", value
            continue
        layer, _, kind = part.rpartition(".")
        if layer not in _PARTS:
            raise WeightsError(f"every tensor must belong to CLIP's towers, found {name!r}")
        yield f"{block}.{_PARTS[layer]}.{kind}", tensors[name]
