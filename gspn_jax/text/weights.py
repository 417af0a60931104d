"""Published weight files to the weights of `model`, checked name by name."""

import pathlib
from collections.abc import Mapping

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from gspn_jax.tensor_files import arrange, load_network
from gspn_jax.text.layers import layer_shapes, with_biases
from gspn_jax.text.model import TextConfig

_PREFIX = "text_model."
_POSITION_IDS = "embeddings.position_ids"
"""0 .. 76, which older files hold beside the weights."""


def load_tower(
    folder: str | pathlib.Path, dtype: DTypeLike | None = None
) -> tuple[dict[str, Float[np.ndarray, "..."]], TextConfig]:
    """Reads a folder such as `text_encoder`: `config.json` beside `model.safetensors` (or .fp16, or shards).

    `dtype` None keeps the file's types. Raises FileNotFoundError, ConfigError and WeightsError.
    """
    return load_network(folder, "model", TextConfig.from_json, from_state_dict, dtype)


def from_state_dict(
    tensors: Mapping[str, np.ndarray], config: TextConfig, dtype: DTypeLike | None = None
) -> dict[str, Float[np.ndarray, "..."]]:
    """The weights for `model.encode`, from names with or without the prefix `text_model.`; position_ids are dropped.

    Raises WeightsError naming the tensor that is missing, unknown, of another shape, or not finite.
    """
    return arrange(
        tensors,
        expected_shapes(config),
        "the text tower",
        dtype=dtype,
        rename=_without_prefix,
        as_stored=lambda name: "_embedding." in name,
    )


def expected_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Name, without `text_model.`, and shape of every tensor in a file of weights (PyTorch's layout)."""
    width, parts = config.width, layer_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (config.vocabulary, width),
        "embeddings.position_embedding.weight": (config.length, width),
    }
    names = {f"encoder.layers.{i}.{name}": shape for i in range(config.layers) for name, shape in parts.items()}
    shapes |= with_biases(names | {"final_layer_norm": (width,)})
    return shapes if config.projection is None else shapes | {"text_projection.weight": (config.projection, width)}


def _without_prefix(name: str) -> str | None:
    name = name.removeprefix(_PREFIX)
    return None if name == _POSITION_IDS else name
