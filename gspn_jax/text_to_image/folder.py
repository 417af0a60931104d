"""A folder of Stable Diffusion 1, 2 or SDXL as diffusers writes it: every part read, and checked against the others."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Float32

from gspn_jax import autoencoder, text, unet
from gspn_jax.autoencoder import LATENT_SCALE, PIXELS, AutoencoderConfig
from gspn_jax.autoencoder.weights import infer_config
from gspn_jax.config import ConfigError
from gspn_jax.files import sha256_of
from gspn_jax.tensor_files import errors_name, open_folder, read_json, weight_files
from gspn_jax.text import TextConfig, Tokenizer
from gspn_jax.text_to_image.gspn_layers import Layers
from gspn_jax.unet import Prediction, UNetConfig

_TOWERS = {"StableDiffusionPipeline": ("",), "StableDiffusionXLPipeline": ("", "_2")}
"""Kinds of folder by `_class_name` of model_index.json, and what the names of their text parts end with."""


NOTHING = [None, None]
"""Entry of model_index.json for a part that a model does not have. Without "vae" it is one of pixels."""


UNET, STEM = "unet", "diffusion_pytorch_model"
"""The U-Net's folder within that of a model, and how its files of weights begin."""


class TextPart(NamedTuple):
    """A text tower and its tokenizer."""

    params: Mapping[str, Float[np.ndarray, "..."]]
    config: TextConfig
    tokenizer: Tokenizer


class Model(NamedTuple):
    """All that a folder holds. Weights have the types of the files, or one that was asked for; the VAE is float32."""

    unet: Mapping[str, Float[np.ndarray, "..."]]
    unet_config: UNetConfig
    texts: tuple[TextPart, ...]
    """One of Stable Diffusion 1 and 2, two of SDXL."""
    autoencoder: Mapping[str, Float32[np.ndarray, "..."]]
    autoencoder_config: AutoencoderConfig
    latent_scale: float
    """Brings latents to about unit variance."""
    prediction: Prediction
    scheduler: Mapping[str, Any]
    """`scheduler_config.json`: betas, spacing, which sampler."""
    empty_is_zero: bool
    """True where no negative prompt means text states of zeros (SDXL), not those of an empty text."""
    gspn: Layers | None = None
    """Layers in the place of the U-Net's self-attentions; they are in no folder."""


class Encoders(NamedTuple):
    """Parts of a folder that images and captions are encoded by. Text towers are float32, as the VAE."""

    texts: tuple[TextPart, ...]
    autoencoder: Mapping[str, Float32[np.ndarray, "..."]]
    autoencoder_config: AutoencoderConfig


def load_encoders(folder: str | pathlib.Path) -> Encoders:
    """Reads the text towers, tokenizers and the VAE of a folder. Raises as `load_folder`."""
    folder = pathlib.Path(folder)
    index, texts = _check_parts(folder)
    return Encoders(_read_texts(folder, texts), *_read_autoencoder(folder, index)[:2])


def load_texts(folder: str | pathlib.Path) -> tuple[tuple[TextPart, ...], bool]:
    """Reads the text towers of a folder, and whether zeros stand for an empty prompt. Raises as `load_folder`."""
    folder = pathlib.Path(folder)
    index, texts = _check_parts(folder)
    return _read_texts(folder, texts), _empty_is_zero(index, len(texts))


def encoder_hashes(folder: str | pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file that decides how images and captions are encoded, by its path in the folder."""
    folder = pathlib.Path(folder)
    index, texts = _check_parts(folder)
    paths = []
    if index.get("vae") != NOTHING:
        paths += [*weight_files(folder / "vae", "diffusion_pytorch_model"), folder / "vae" / "config.json"]
    for encoder, words in texts:
        paths += [*weight_files(folder / encoder, "model"), folder / encoder / "config.json"]
        paths += [path for path in (folder / words).iterdir() if path.suffix in (".json", ".txt")]
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(paths)}


def read_unet_config(folder: str | pathlib.Path) -> UNetConfig:
    """Sizes of the U-Net in the folder of a model."""
    path = pathlib.Path(folder) / UNET
    with errors_name(path):
        return UNetConfig.from_json(read_json(path / "config.json"))


def unet_digest(folder: str | pathlib.Path) -> str:
    """SHA-256 of the file of a U-Net's weights; of shards, of their SHA-256 one after the other."""
    hashes = [sha256_of(path) for path in weight_files(pathlib.Path(folder) / UNET, STEM)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def load_folder(folder: str | pathlib.Path, dtype: DTypeLike | None = None) -> Model:
    """Reads a folder with model_index.json, unet, vae, text_encoder, tokenizer (SDXL: also _2) and scheduler. Where its
    index has [null, null] for "vae" there is none, and the U-Net's latents are pixels in [-1, 1].

    `dtype` is that of the U-Net and the text towers; None keeps the types of the files. Raises FileNotFoundError naming
    all parts that are missing, and ConfigError or WeightsError for a part that is wrong or does not fit the others.
    """
    folder = pathlib.Path(folder)
    index, texts = _check_parts(folder)
    scheduler, prediction = _read_scheduler(folder / "scheduler" / "scheduler_config.json")
    towers = tuple(_read_text(folder, *pair, dtype) for pair in texts)
    vae, vae_config, scale = _read_autoencoder(folder, index)
    model = Model(
        *unet.load_unet(folder / "unet", dtype),
        towers,
        vae,
        vae_config,
        scale,
        prediction,
        scheduler,
        empty_is_zero=_empty_is_zero(index, len(texts)),
    )
    with errors_name(folder):
        _check_fit(model)
    return model


def _check_parts(folder: pathlib.Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """model_index.json, and the names of each text tower and its tokenizer. Raises FileNotFoundError naming all parts
    that are missing, and ConfigError for another kind of folder."""
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in _TOWERS:
        raise ConfigError(f"{folder / 'model_index.json'} must be that of a {' or a '.join(_TOWERS)}, found {kind!r}")
    texts = [(f"text_encoder{end}", f"tokenizer{end}") for end in _TOWERS[kind]]
    latent = ["vae"] if index.get("vae") != NOTHING else []
    parts = ["unet", *latent, "scheduler", *(part for pair in texts for part in pair)]
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise FileNotFoundError(f"{folder} must hold the folders {', '.join(parts)}; {', '.join(missing)} not found")
    return index, texts


def _empty_is_zero(index: Mapping[str, Any], towers: int) -> bool:
    return bool(index.get("force_zeros_for_empty_prompt", towers == 2))


def _read_texts(folder: pathlib.Path, texts: Sequence[tuple[str, str]]) -> tuple[TextPart, ...]:
    towers = tuple(_read_text(folder, *pair, np.float32) for pair in texts)
    with errors_name(folder):
        _check_tokenizers(towers)
    return towers


def _read_text(folder: pathlib.Path, encoder: str, words: str, dtype: DTypeLike | None) -> TextPart:
    params, config = text.load_tower(folder / encoder, dtype)
    return TextPart(params, config, text.load_tokenizer(folder / words, length=min(config.length, text.LENGTH)))


def _read_scheduler(path: pathlib.Path) -> tuple[dict[str, Any], Prediction]:
    scheduler = read_json(path, nan=True)  # DPM-Solver++ has a "lambda_min_clipped": -Infinity
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in get_args(Prediction):
        raise ConfigError(
            f"{path}: prediction_type must be one of {', '.join(get_args(Prediction))}, found {prediction!r}"
        )
    return scheduler, prediction


def _read_autoencoder(
    folder: pathlib.Path, index: Mapping[str, Any]
) -> tuple[dict[str, Float32[np.ndarray, "..."]], AutoencoderConfig, float]:
    if index.get("vae") == NOTHING:
        return {}, PIXELS, 1.0
    folder = folder / "vae"
    with errors_name(folder):
        content = read_json(folder / "config.json")
        for name, value in (("shift_factor", None), ("norm_num_groups", 32), ("act_fn", "silu")):
            if content.get(name, value) != value:
                raise ConfigError(f"the autoencoder's {name} must be {value!r}, found {content[name]!r}")
        scale = content.get("scaling_factor", LATENT_SCALE)
        if not isinstance(scale, float | int) or isinstance(scale, bool) or not scale > 0:
            raise ConfigError(f"the autoencoder's scaling_factor must be a number greater than 0, found {scale!r}")
        tensors = open_folder(folder, "diffusion_pytorch_model")
        config = dataclasses.replace(infer_config(tensors), scaling_factor=float(scale))
        return autoencoder.from_state_dict(tensors, config), config, float(scale)


def _check_fit(model: Model) -> None:
    """Raises ConfigError for parts that are of different models."""
    _check_tokenizers(model.texts)
    config, channels = model.unet_config, model.autoencoder_config.latent_channels
    if (width := sum(part.config.width for part in model.texts)) != config.context_width:
        raise ConfigError(
            f"the U-Net must take text states as wide as the text towers give, {width}, found {config.context_width}"
        )
    pooled = (model.texts[-1].config.projection or 0) if len(model.texts) == 2 else 0
    if pooled != config.pooled_width:
        raise ConfigError(f"the U-Net must take a pooled text of width {pooled}, found {config.pooled_width}")
    if (config.in_channels, config.out_channels) != (channels, channels):
        raise ConfigError(
            f"the U-Net must take and give the autoencoder's {channels} latent channels, found "
            f"{config.in_channels} and {config.out_channels} (inpainting models are not supported)"
        )


def _check_tokenizers(texts: Sequence[TextPart]) -> None:
    for part in texts:
        if part.config.vocabulary != part.tokenizer.vocabulary:
            raise ConfigError(
                f"a tokenizer must fit its text tower of {part.config.vocabulary} words, found "
                f"{part.tokenizer.vocabulary}"
            )
    if len(lengths := {part.tokenizer.length for part in texts}) > 1:
        raise ConfigError(f"text towers must see as many tokens, found {' and '.join(map(str, sorted(lengths)))}")
