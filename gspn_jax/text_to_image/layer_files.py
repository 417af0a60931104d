"""Files of GSPN layers: safetensors of the layers alone, which say what they are; a JSON beside says it again."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gspn_jax.config import ConfigError
from gspn_jax.files import replacing
from gspn_jax.state_dict import WeightsError
from gspn_jax.tensor_files import TensorFiles, arrange, errors_name
from gspn_jax.text_to_image.gspn_layers import LayerOptions, Layers, shapes
from gspn_jax.unet import UNetConfig

HEADER = "gspn_layers"
"""Entry of a file's metadata that holds the JSON."""
VERSION = 1

_RELEASED = re.compile(r"(.*\.)?\d+\.(x_conv_down|w_conv_up|l_conv_up|u_conv_up|d_conv|m_conv)\.weight")
"""Names of tensors in a checkpoint of the released code."""


def save(
    path: str | pathlib.Path,
    params: Mapping[str, Float[Array, "..."] | Float[np.ndarray, "..."]],
    config: UNetConfig,
    options: LayerOptions,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes `path`, a new .safetensors file, and a .json of the same name. `about` are JSON values: how the layers
    were trained, from which model.

    Raises ConfigError for a name that does not end in .safetensors and for files that are there already.
    """
    from safetensors.numpy import save_file

    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"the file of GSPN layers must end in .safetensors, found {str(path)!r}")
    if path.with_suffix(".json").exists():
        raise ConfigError(f"{path.with_suffix('.json')} exists already: choose another name, or delete it")
    header = {
        "version": VERSION,
        "options": dataclasses.asdict(options),
        "unet": _sizes(config),
        "about": dict(about or {}),
    }
    tensors = {name: np.ascontiguousarray(params[name]) for name in shapes(config, options)}
    with replacing(path, new=True) as temporary:
        save_file(tensors, temporary, metadata={"format": "np", HEADER: json.dumps(header)})
    said = header | {"parameters": sum(value.size for value in tensors.values()), "tensors": len(tensors)}
    with replacing(path.with_suffix(".json"), new=True) as temporary:
        temporary.write_text(json.dumps(said, indent=1) + "\n")


def load(path: str | pathlib.Path, config: UNetConfig, dtype: DTypeLike | None = None) -> Layers:
    """Reads what `save` wrote, for a U-Net of `config`; `dtype` None keeps the types of the file.

    Raises FileNotFoundError, and WeightsError or ConfigError naming the file for other contents, for layers of another
    U-Net and for a checkpoint of the released code.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the GSPN layers must be a file, found nothing at {path}")
    with errors_name(path):
        tensors = TensorFiles([path])
        header = _header(path, tensors)
        options = _options(header)
        if header.get("unet") != _sizes(config):
            raise ConfigError(
                f"the GSPN layers must be those of a U-Net of {_sizes(config)}, found {header.get('unet')}"
            )
        expected = {name: own.shape for name, own in shapes(config, options).items()}
        params = arrange(tensors, expected, "the GSPN layers", dtype=dtype, as_stored=lambda name: True)
    about = header.get("about")
    return Layers(params, options, about if isinstance(about, dict) else {})


def _header(path: pathlib.Path, tensors: TensorFiles) -> dict[str, Any]:
    from safetensors import safe_open

    if released := next((name for name in tensors if _RELEASED.fullmatch(name)), None):
        raise WeightsError(
            "a checkpoint of the released code is not read, as its layers are another function (lam and u without 1, "
            f"terms of one direction taken at pixels of another), found {released!r}"
        )
    with safe_open(path, "np") as file:
        text = (file.metadata() or {}).get(HEADER)
    try:
        header = json.loads(text or "null")
    except (json.JSONDecodeError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise WeightsError(
            f"GSPN layers must be a file that this project wrote (version {VERSION} in its metadata {HEADER!r}), found "
            f"{len(tensors)} tensors " + ("without it" if header is None else "with another")
        )
    return header


def _options(header: Mapping[str, Any]) -> LayerOptions:
    try:
        return LayerOptions(**header["options"])
    except (KeyError, TypeError) as error:
        raise WeightsError(f"the options of GSPN layers must be those of version {VERSION}, found others") from error


def _sizes(config: UNetConfig) -> dict[str, Any]:
    """Numbers of a U-Net that its layers follow from, as JSON values."""
    return {
        "channels": list(config.channels),
        "layers": config.layers,
        "depths": list(config.depths),
        "middle_depth": config.middle_depth,
    }
