"""Published weight files to the weights of `model`, checked name by name."""

import math
import pathlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from gspn_jax.tensor_files import arrange, load_network
from gspn_jax.unet.config import UNetConfig

_BIASLESS = ("to_q", "to_k", "to_v")


def load_unet(
    folder: str | pathlib.Path, dtype: DTypeLike | None = None
) -> tuple[dict[str, Float[np.ndarray, "..."]], UNetConfig]:
    """Reads a folder such as `unet`: `config.json` beside `diffusion_pytorch_model.safetensors` (or .fp16, or shards).

    `dtype` None keeps the file's types. Raises FileNotFoundError, ConfigError and WeightsError.
    """
    return load_network(folder, "diffusion_pytorch_model", UNetConfig.from_json, from_state_dict, dtype)


def from_state_dict(
    tensors: Mapping[str, np.ndarray], config: UNetConfig, dtype: DTypeLike | None = None
) -> dict[str, Float[np.ndarray, "..."]]:
    """The weights for `model.apply`, each read once. Raises WeightsError naming the tensor that is wrong."""
    return arrange(tensors, expected_shapes(config), "the U-Net", dtype=dtype)


def to_state_dict(params: Mapping[str, Float[Array, "..."] | Float[np.ndarray, "..."]]) -> dict[str, np.ndarray]:
    """The inverse of `from_state_dict`: weights in PyTorch's layout."""
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    found = {name: np.asarray(value) for name, value in params.items()}
    return {name: np.ascontiguousarray(value.transpose(order[value.ndim])) for name, value in found.items()}


def shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight as `model.apply` takes it."""
    laid_out = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
    return {
        name: tuple(shape[axis] for axis in laid_out[len(shape)]) for name, shape in expected_shapes(config).items()
    }


def init(config: UNetConfig, key: Key[Array, ""]) -> dict[str, Float[Array, "..."]]:
    """Fresh weights: uniform with the variance 1 / (3 fan-in) of PyTorch's layers, biases 0, norms 1; the last
    convolution of residual blocks and of the network, and what leaves a transformer, 0 (Ho et al. 2020).

    Pure: jit it with the first argument static.
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    params: dict[str, Array] = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            params[name] = jnp.full(shape, float(name.endswith("weight")), jnp.float32)
        elif name.endswith(_LAST):
            params[name] = jnp.zeros(shape, jnp.float32)
        else:
            alike.setdefault(shape, []).append(name)
    for number, (shape, names) in enumerate(alike.items()):  # few draws, of many weights each: small programs
        limit = 1 / math.sqrt(math.prod(shape[:-1]))
        drawn = jax.random.uniform(jax.random.fold_in(key, number), (len(names), *shape), minval=-limit, maxval=limit)
        params |= dict(zip(names, drawn, strict=True))
    return params


_LAST = (".conv2.weight", ".proj_out.weight", "conv_out.weight")


def expected_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a file of weights (PyTorch's layout)."""
    shapes = {}
    for name, shape in _layers(config):
        shapes[f"{name}.weight"] = shape
        if not name.endswith(_BIASLESS):
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def _layers(config: UNetConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each layer and the shape of its weight."""
    widths, last = config.channels, len(config.channels) - 1
    first, time = widths[0], config.time_width
    yield "conv_in", (first, config.in_channels, 3, 3)
    yield from _embedding("time_embedding", first, time)
    if config.added_width is not None:
        yield from _embedding("add_embedding", config.added_width, time)

    width, skips = first, [first]
    for level, outputs in enumerate(widths):
        for layer in range(config.layers):
            yield from _residual(f"down_blocks.{level}.resnets.{layer}", width, outputs, time)
            yield from _transformer(f"down_blocks.{level}.attentions.{layer}", outputs, config.depths[level], config)
            width = outputs
            skips.append(width)
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0.conv", (width, width, 3, 3)
            skips.append(width)

    yield from _residual("mid_block.resnets.0", width, width, time)
    yield from _transformer("mid_block.attentions.0", width, config.middle_depth, config)
    yield from _residual("mid_block.resnets.1", width, width, time)

    for level in range(last, -1, -1):
        block, outputs = f"up_blocks.{last - level}", widths[level]
        for layer in range(config.layers + 1):
            yield from _residual(f"{block}.resnets.{layer}", width + skips.pop(), outputs, time)
            yield from _transformer(f"{block}.attentions.{layer}", outputs, config.depths[level], config)
            width = outputs
        if level > 0:
            yield f"{block}.upsamplers.0.conv", (width, width, 3, 3)
    yield "conv_norm_out", (first,)
    yield "conv_out", (config.out_channels, first, 3, 3)


def _embedding(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.linear_1", (outputs, inputs)
    yield f"{name}.linear_2", (outputs, outputs)


def _residual(name: str, inputs: int, outputs: int, time: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.norm1", (inputs,)
    yield f"{name}.conv1", (outputs, inputs, 3, 3)
    yield f"{name}.time_emb_proj", (outputs, time)
    yield f"{name}.norm2", (outputs,)
    yield f"{name}.conv2", (outputs, outputs, 3, 3)
    if inputs != outputs:
        yield f"{name}.conv_shortcut", (outputs, inputs, 1, 1)


def _transformer(name: str, width: int, depth: int, config: UNetConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    if not depth:
        return
    projection = (width, width) if config.linear_projection else (width, width, 1, 1)
    yield f"{name}.norm", (width,)
    yield f"{name}.proj_in", projection
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for number, (attention, context) in enumerate((("attn1", width), ("attn2", config.context_width)), 1):
            yield f"{block}.norm{number}", (width,)
            yield f"{block}.{attention}.to_q", (width, width)
            yield f"{block}.{attention}.to_k", (width, context)
            yield f"{block}.{attention}.to_v", (width, context)
            yield f"{block}.{attention}.to_out.0", (width, width)
        yield f"{block}.norm3", (width,)
        yield f"{block}.ff.net.0.proj", (8 * width, width)
        yield f"{block}.ff.net.2", (width, 4 * width)
    yield f"{name}.proj_out", projection
