"""Published weight files to the weights of `model`, checked name by name."""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from gspn_jax.autoencoder.model import LATENT_SCALE, AutoencoderConfig
from gspn_jax.config import ConfigError
from gspn_jax.state_dict import WeightsError, read_state_dict
from gspn_jax.tensor_files import VARIANTS, read_json

log = logging.getLogger(__name__)

STEM = "diffusion_pytorch_model"
CONFIG = "config.json"

MOST = 1e6
"""Scale and shift that no latents have; float16 and float32 hold what is below."""

_NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Attention in older files -> in newer ones."""
_LEVEL = re.compile(r"encoder\.down_blocks\.(\d{1,3})\.resnets\.(\d{1,3})\.conv1\.weight")


class Scale(NamedTuple):
    """Scale and shift that latents are trained on: (latent - shift) * factor."""

    factor: float = LATENT_SCALE
    shift: float = 0.0


def load(
    path: str | pathlib.Path, scale: Scale | None = None
) -> tuple[dict[str, Float32[np.ndarray, "..."]], AutoencoderConfig]:
    """Reads diffusers' `AutoencoderKL`: its folder, that of a model with a folder `vae`, or one file of weights.

    Scale and shift of latents are those of the `config.json` beside the weights. Where there is none, or it does not
    tell, they are those of `scale`, known from elsewhere, or Stable Diffusion 1's, which is logged.
    Raises FileNotFoundError, ImportError for a .bin file without PyTorch, WeightsError for other contents, and
    ConfigError where `config.json` is of another network or tells another scale than `scale`.
    """
    file = weights_file(path)
    told = read_scale(file.parent / CONFIG)
    if None not in (told, scale) and told != scale:
        raise ConfigError(
            f"{file.parent / CONFIG} tells of latents of scaling_factor {told.factor:g} and shift_factor "
            f"{told.shift:g}, found {scale.factor:g} and {scale.shift:g} asked for"
        )
    if told is None and scale is None:
        log.info(
            "%s does not tell the scale of its latents: taken for Stable Diffusion 1's, %g (a %s beside it would tell)",
            file, LATENT_SCALE, CONFIG,
        )  # fmt: skip
    try:
        state_dict = read_state_dict(file)
        config = infer_config(state_dict)
        factor, shift = told or scale or Scale()
        config = dataclasses.replace(config, scaling_factor=factor, shift_factor=shift)
        return from_state_dict(state_dict, config), config
    except WeightsError as error:
        where = "" if str(file) in str(error) else f"{file}: "
        raise WeightsError(f"{where}{error}") from error


def weights_file(path: str | pathlib.Path) -> pathlib.Path:
    """The file of weights that `path` is, or that lies in the folder `path` or in its folder `vae`."""
    path = pathlib.Path(path)
    if not path.is_dir():
        return path
    names = [f"{STEM}{variant}{kind}" for kind in (".safetensors", ".bin") for variant in VARIANTS]
    found = [folder / name for folder in (path, path / "vae") for name in names if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"the folder of an autoencoder must hold {STEM}.safetensors, or a folder vae with it, found none in {path}"
        )
    return found[0]


def read_scale(path: pathlib.Path) -> Scale | None:
    """Reads the scale of latents in a `config.json` of diffusers; None if there is none, or it does not tell.

    Raises ConfigError for one of a network other than `model`'s, and for numbers that are none.
    """
    if not path.is_file():
        return None
    content = read_json(path)
    if content.get("_class_name", "AutoencoderKL") != "AutoencoderKL" and "scaling_factor" not in content:
        return None  # of something else in the same folder
    for name, value in (("norm_num_groups", 32), ("act_fn", "silu")):
        if content.get(name, value) != value:
            raise ConfigError(f"{path}: the autoencoder's {name} must be {value!r}, found {content[name]!r}")
    if content.get("latents_mean") is not None or content.get("latents_std") is not None:
        raise ConfigError(f"{path}: latents must have one scale and shift, found latents_mean or latents_std")
    factor, shift = content.get("scaling_factor"), content.get("shift_factor")
    if factor is None:
        return None
    return check_scale(factor, 0.0 if shift is None else shift, f"{path}: the autoencoder's scaling_factor")


def check_scale(factor: Any, shift: Any, what: str) -> Scale:
    """Raises ConfigError unless `factor` is a number above 0 and `shift` a number, both such as latents can have."""
    numbers = all(isinstance(value, float | int) and not isinstance(value, bool) for value in (factor, shift))
    if not (numbers and 1 / MOST <= factor <= MOST and abs(shift) <= MOST):
        shown = " and ".join(repr(value) if len(repr(value)) < 30 else "a longer one" for value in (factor, shift))
        raise ConfigError(f"{what} must be greater than 0 and its shift a number, up to {MOST:g}, found {shown}")
    return Scale(float(factor), float(shift))


def infer_config(state_dict: Mapping[str, np.ndarray]) -> AutoencoderConfig:
    """The sizes that the tensors tell; the number of groups (32) they do not."""
    levels: dict[int, int] = {}
    layers = 0
    for name, value in state_dict.items():
        if match := _LEVEL.fullmatch(name):
            levels[int(match[1])] = value.shape[0]
            layers = max(layers, int(match[2]) + 1)
    names = ("encoder.conv_in.weight", "decoder.conv_in.weight")
    ends = [state_dict[name] for name in names if name in state_dict and state_dict[name].ndim == 4]
    if sorted(levels) != list(range(len(levels))) or not levels or len(ends) < 2:
        raise WeightsError(
            "the weights must be those of an AutoencoderKL of diffusers (such as sd-vae-ft-mse), found "
            f"{len(state_dict)} tensors named {', '.join(sorted(state_dict)[:3])}, ..."
        )
    return AutoencoderConfig(
        channels=tuple(levels[i] for i in range(len(levels))),
        layers=layers,
        image_channels=ends[0].shape[1],
        latent_channels=ends[1].shape[1],
    )


def expected_shapes(config: AutoencoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a file of weights (PyTorch's layout, newer names)."""
    shapes = {}
    for name, shape in _layers(config):
        shapes |= {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}
    return shapes


def _layers(config: AutoencoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each layer and the shape of its weight."""

    def residual(name: str, inputs: int, outputs: int):
        yield f"{name}.norm1", (inputs,)
        yield f"{name}.conv1", (outputs, inputs, 3, 3)
        yield f"{name}.norm2", (outputs,)
        yield f"{name}.conv2", (outputs, outputs, 3, 3)
        if inputs != outputs:
            yield f"{name}.conv_shortcut", (outputs, inputs, 1, 1)

    def middle(name: str, width: int):
        yield from residual(f"{name}.resnets.0", width, width)
        yield f"{name}.attentions.0.group_norm", (width,)
        for part in _NEW_NAMES.values():
            yield f"{name}.attentions.0.{part}", (width, width)
        yield from residual(f"{name}.resnets.1", width, width)

    first, last, latent = config.channels[0], config.channels[-1], config.latent_channels
    yield "encoder.conv_in", (first, config.image_channels, 3, 3)
    width = first
    for level, outputs in enumerate(config.channels):
        for layer in range(config.layers):
            yield from residual(f"encoder.down_blocks.{level}.resnets.{layer}", width, outputs)
            width = outputs
        if level < len(config.channels) - 1:
            yield f"encoder.down_blocks.{level}.downsamplers.0.conv", (width, width, 3, 3)
    yield from middle("encoder.mid_block", last)
    yield "encoder.conv_norm_out", (last,)
    yield "encoder.conv_out", (2 * latent, last, 3, 3)
    yield "quant_conv", (2 * latent, 2 * latent, 1, 1)

    yield "post_quant_conv", (latent, latent, 1, 1)
    yield "decoder.conv_in", (last, latent, 3, 3)
    yield from middle("decoder.mid_block", last)
    width = last
    for level, outputs in enumerate(reversed(config.channels)):
        for layer in range(config.layers + 1):
            yield from residual(f"decoder.up_blocks.{level}.resnets.{layer}", width, outputs)
            width = outputs
        if level < len(config.channels) - 1:
            yield f"decoder.up_blocks.{level}.upsamplers.0.conv", (width, width, 3, 3)
    yield "decoder.conv_norm_out", (first,)
    yield "decoder.conv_out", (config.image_channels, first, 3, 3)


def from_state_dict(
    state_dict: Mapping[str, np.ndarray], config: AutoencoderConfig
) -> dict[str, Float32[np.ndarray, "..."]]:
    """The weights for `model.encode` and `model.decode`.

    Attention may have either of the two names, as linears or as 1x1 convolutions.
    Raises WeightsError naming the tensor that is missing, unknown, of another shape, or not finite.
    """
    expected = expected_shapes(config)
    found = {_new_name(name): (name, value) for name, value in state_dict.items()}
    for name in expected:
        if name not in found:
            raise WeightsError(f"the weights of the autoencoder must have {name!r}, found {len(found)} other tensors")
    params = {}
    for name, (theirs, value) in found.items():
        if name not in expected:
            raise WeightsError(
                f"every tensor must belong to an autoencoder of channels {config.channels}, found {theirs!r}"
            )
        if ".attentions." in name and value.shape[2:] == (1, 1):
            value = value[..., 0, 0]
        if value.shape != expected[name]:
            raise WeightsError(f"{theirs!r} must have shape {expected[name]}, found {value.shape}")
        if not np.isfinite(value).all():
            raise WeightsError(f"{theirs!r} must be finite, found NaN or infinity")
        order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
        params[name] = np.ascontiguousarray(np.asarray(value, np.float32).transpose(order))
    return params


def _new_name(name: str) -> str:
    head, attention, tail = name.partition(".attentions.0.")
    part, _, kind = tail.rpartition(".")
    return f"{head}{attention}{_NEW_NAMES.get(part, part)}.{kind}" if attention else name
