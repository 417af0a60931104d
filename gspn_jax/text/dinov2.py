"""DINOv2 (arXiv 2304.07193), a vision transformer whose tokens are good features as they are: S, B, L and g, with
registers (arXiv 2309.16588) or without.

Weights are read from a folder of transformers, or from one file with its names or those of facebookresearch/dinov2;
sizes are those of the tensors. It is a line of `tables.FEATURE_NETWORKS`: the class token is what FD-DINOv2 sees, the
tokens of patches are what training is aligned with (`Dinov2.tokens`).
"""

import dataclasses
import hashlib
import math
import pathlib
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from gspn_jax import bicubic
from gspn_jax.config import ConfigError
from gspn_jax.state_dict import WeightsError, layer_numbers, read_state_dict
from gspn_jax.tensor_files import arrange, errors_name, open_folder, read_json
from gspn_jax.text import layers
from gspn_jax.text.layers import ACTIVATIONS, HIGHEST, Params

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of each channel of ImageNet in 0..1 (facebookresearch/dinov2, `data/transforms.py`)."""
SIDE = 224
"""Side of the images whose class tokens FD-DINOv2 compares (layer6ai-labs/dgm-eval)."""
HEAD = 64
"""Width of a head in every published size."""
OFFSET = 0.1
"""Patches by which the original's table of positions is stretched where it is resized (`interpolate_offset`), without
registers; transformers stretches by none."""

_TABLES = ("embeddings.cls_token", "embeddings.position_embeddings", "embeddings.register_tokens")


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """The defaults are those of ViT-L/14."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    hidden: int = 4096
    """Width inside an MLP."""
    swiglu: bool = False
    """SwiGLU in place of the MLP with a GELU, as in ViT-g."""
    patch: int = 14
    grid: int = 37
    """Side of the table of positions, in patches."""
    registers: int = 0
    epsilon: float = 1e-6
    """Epsilon of every layer norm."""
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ConfigError(
                f"DINOv2's width must be a multiple of its heads, found {self.width} and {self.heads} of them"
            )


def expected_shapes(config: Dinov2Config) -> dict[str, tuple[int, ...]]:
    """Name, as `renamed` gives it, and shape of every tensor (PyTorch's layout)."""
    width = config.width
    shapes = {
        "embeddings.cls_token": (1, width),
        "embeddings.position_embeddings": (1 + config.grid**2, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, config.patch, config.patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        **layers.with_biases({"layernorm": (width,)}),
    }
    if config.registers:
        shapes["embeddings.register_tokens"] = (config.registers, width)
    into = ("gate_proj", "up_proj") if config.swiglu else ("fc1",)
    parts = {f"attention.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    parts |= {f"mlp.{part}": (config.hidden, width) for part in into}
    parts |= {"mlp.down_proj" if config.swiglu else "mlp.fc2": (width, config.hidden)}
    parts = layers.with_biases(parts | {"norm1": (width,), "norm2": (width,)})
    parts |= {f"layer_scale{i}.lambda1": (width,) for i in (1, 2)}
    return shapes | {f"encoder.layer.{i}.{name}": shape for i in range(config.layers) for name, shape in parts.items()}


def encode(
    params: Params, config: Dinov2Config, images: Float[Array, "B H W 3"], *, offset: float = 0.0
) -> tuple[Float[Array, "B D"], Float[Array, "B h w D"]]:
    """Class token and tokens of patches behind the last norm, of normalised images whose sides are multiples of a
    patch. `offset` is that of `positions`."""
    count, height, width = len(images), *(side // config.patch for side in images.shape[1:3])
    kernel, bias = (params[f"embeddings.patch_embeddings.projection.{part}"] for part in ("weight", "bias"))
    patches = jax.lax.conv_general_dilated(
        images,
        kernel.astype(images.dtype),
        (config.patch, config.patch),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=HIGHEST,
    )
    patches = (patches + bias.astype(images.dtype)).reshape(count, -1, config.width)

    def repeated(tokens):
        return jnp.broadcast_to(tokens.astype(images.dtype), (count, *tokens.shape))

    x = jnp.concatenate([repeated(params["embeddings.cls_token"]), patches], axis=1)
    x = x + positions(params, config, height, width, offset=offset).astype(x.dtype)
    if config.registers:
        x = jnp.concatenate([x[:, :1], repeated(params["embeddings.register_tokens"]), x[:, 1:]], axis=1)
    for i in range(config.layers):
        x = _layer(params, f"encoder.layer.{i}", config, x)
    x = layers.layer_norm(params, "layernorm", config, x)
    return x[:, 0], x[:, 1 + config.registers :].reshape(count, height, width, config.width)


def positions(
    params: Params, config: Dinov2Config, height: int, width: int, *, offset: float = 0.0
) -> Float[Array, "N D"]:
    """The table of positions for a grid of patches, resized by a bicubic filter unless it is of that size: with
    registers by one that antialiases, without by one that does not, stretched by `offset` patches."""
    table = params["embeddings.position_embeddings"]
    if (height, width) == (config.grid, config.grid):
        return table
    if config.registers:
        rows, columns = (bicubic.pillow(config.grid, side) for side in (height, width))
    else:
        rows, columns = (bicubic.torch(config.grid, side, offset) for side in (height, width))
    square = table[1:].reshape(1, config.grid, config.grid, -1)
    return jnp.concatenate([table[:1], bicubic.resize(square, rows, columns).reshape(height * width, -1)])


def _layer(params: Params, name: str, config: Dinov2Config, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """Attention and an MLP, each of normalised tokens, scaled by channel and added to them."""
    scale = [params[f"{name}.layer_scale{i}.lambda1"].astype(x.dtype) for i in (1, 2)]
    tokens = layers.layer_norm(params, f"{name}.norm1", config, x)
    x = x + scale[0] * layers.attention(params, f"{name}.attention", config, tokens, causal=False)
    tokens = layers.layer_norm(params, f"{name}.norm2", config, x)
    if config.swiglu:
        gate, up = (layers.linear(params, f"{name}.mlp.{part}_proj", tokens) for part in ("gate", "up"))
        return x + scale[1] * layers.linear(params, f"{name}.mlp.down_proj", jax.nn.silu(gate) * up)
    hidden = ACTIVATIONS[config.activation](layers.linear(params, f"{name}.mlp.fc1", tokens))
    return x + scale[1] * layers.linear(params, f"{name}.mlp.fc2", hidden)


# --- the feature network
def require(path: str | None, flag: str) -> str:
    """`path` if it is a file or a folder. Raises ConfigError, which speaks of `flag`."""
    if path is None or not (pathlib.Path(path).is_file() or (pathlib.Path(path) / "config.json").is_file()):
        raise ConfigError(
            f"{flag} must be a folder of DINOv2 as transformers writes it, or a file of its weights, found {path!r}"
        )
    return path


def configured(path: str) -> "Dinov2":
    """The network of a folder or file. Raises ConfigError, WeightsError or FileNotFoundError for what cannot be
    used."""
    return load_dinov2(path)


@dataclasses.dataclass(frozen=True, eq=False)
class Dinov2:
    """A `metrics.networks.FeatureNetwork` in float32 whose features are the class token, or the tokens of patches.

    Images are scaled to squares of `side` by Pillow's bicubic filter, as FD-DINOv2 is defined.
    """

    config: Dinov2Config
    params: Mapping[str, Float32[np.ndarray, "..."]]
    side: int = SIDE
    of_patches: bool = False

    def tokens(self, side: int) -> "Dinov2":
        """The same network with features [N, side, side, D]."""
        return dataclasses.replace(self, side=side * self.config.patch, of_patches=True)

    def require(self, path: str | None, flag: str) -> str:
        return require(path, flag)

    def read(self, path: str) -> Mapping[str, Float32[np.ndarray, "..."]]:
        """The weights, which are read already."""
        return self.params

    def digest(self, state_dict: Mapping[str, np.ndarray]) -> str:
        """SHA-256 over the weights and their names, whatever file they came in."""
        total = hashlib.sha256()
        for name in sorted(state_dict):
            total.update(name.encode())
            total.update(np.ascontiguousarray(state_dict[name]).tobytes())
        return total.hexdigest()

    def from_state_dict(self, state_dict: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return state_dict

    def resize(self, images: UInt8[Array, "N H W 3"]) -> Float32[Array, "N side side 3"]:
        x = images.astype(jnp.float32)
        if images.shape[1:3] != (self.side, self.side):
            x = bicubic.resize_levels(x, self.side, self.side)
        return (x / 255 - jnp.asarray(MEAN, x.dtype)) / jnp.asarray(DEVIATION, x.dtype)

    def network(self, params: Params, images: Float32[Array, "N side side 3"]) -> Float32[Array, "N ..."]:
        token, patches = encode(params, self.config, images, offset=OFFSET)
        return patches if self.of_patches else token


def load_dinov2(path: str | pathlib.Path) -> Dinov2:
    """Reads a folder of transformers (`Dinov2Model`, also with registers), or one file with its names or the
    original's. Weights become float32; the number of heads is the folder's, else that of heads of 64.

    Raises FileNotFoundError, ConfigError and WeightsError that name the path.
    """
    path = pathlib.Path(path)
    with errors_name(path):
        heads = None
        if path.is_dir():
            about = read_json(path / "config.json")
            if (kind := about.get("model_type")) not in ("dinov2", "dinov2_with_registers"):
                raise ConfigError(f"the config.json of a DINOv2 must be that of a Dinov2Model, found {kind!r}")
            heads = about.get("num_attention_heads", 12)
            if about.get("hidden_act", "gelu") != "gelu" or about.get("layer_norm_eps", 1e-6) != 1e-6:
                raise ConfigError("the config.json of a DINOv2 must have hidden_act 'gelu' and layer_norm_eps 1e-6")
            found: Mapping[str, np.ndarray] = open_folder(path, "model")
        else:
            found = read_state_dict(path)
        tensors = dict(renamed(found))
        config = _config(tensors, heads)
        params = arrange(
            tensors, expected_shapes(config), "DINOv2", dtype=np.float32, as_stored=lambda name: name in _TABLES
        )
        return Dinov2(config, params)


def _config(tensors: Mapping[str, np.ndarray], heads: int | None) -> Dinov2Config:
    """Sizes of the network that has these tensors. Raises WeightsError where one that tells them is missing."""
    first = "encoder.layer.0.mlp."
    swiglu = f"{first}gate_proj.weight" in tensors
    telling = ("embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight")
    telling += (f"{first}{'gate_proj' if swiglu else 'fc1'}.weight",)
    for name, axes in zip(telling, (2, 4, 2), strict=True):
        if name not in tensors or tensors[name].ndim != axes:
            raise WeightsError(f"the weights of DINOv2 must have {name!r} of {axes} axes, found {len(tensors)} tensors")
    table, kernel, into = (tensors[name] for name in telling)
    grid = math.isqrt(len(table) - 1)
    if len(table) != 1 + grid**2:
        raise WeightsError(f"DINOv2's positions must be of a class token and a square, found {len(table)}")
    width = table.shape[1]
    return Dinov2Config(
        width=width,
        layers=len(layer_numbers(re.compile(r"encoder\.layer\.(\d+)\."), tensors)),
        heads=heads if isinstance(heads, int) else max(1, width // HEAD),
        hidden=len(into),
        swiglu=swiglu,
        patch=kernel.shape[-1],
        grid=grid,
        registers=len(tensors.get("embeddings.register_tokens", ())),
    )


_UNUSED = ("embeddings.mask_token", "mask_token")
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "norm.": "layernorm.",
}
"""The original's names, or how they begin -> ours."""
_PARTS = {
    # transformers before version 5, and its files
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "mlp.weights_out": "mlp.down_proj",
    # transformers 5
    "attention.o_proj": "attention.out_proj",
    # the original
    "attn.proj": "attention.out_proj",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w3": "mlp.down_proj",
}
"""Parts of a layer, or how they begin -> ours."""
_SPLIT = {
    "attn.qkv": tuple(f"attention.{part}_proj" for part in "qkv"),
    "mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Parts that lie in one tensor, in this order."""
_LAYER = re.compile(r"(?:blocks|encoder\.layer)\.(\d+)\.(.+)")


def renamed(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of transformers or of the original by the names of transformers' encoder, each linear apart; tables
    without an axis of length 1 in front. The mask token, of training, is left out."""
    for name in tensors:
        if name.removeprefix("dinov2.") in _UNUSED:
            continue
        short = name.removeprefix("dinov2.")  # of a model with a head
        found = _LAYER.fullmatch(short)
        if found is None:
            start = next((start for start in _NAMES if short.startswith(start)), "")
            ours = _NAMES.get(start, "") + short.removeprefix(start)
            value = tensors[name]
            yield ours, value.reshape(value.shape[1:]) if ours in _TABLES and value.ndim == 3 else value
            continue
        layer, part = f"encoder.layer.{found[1]}.", found[2]
        stem, _, kind = part.rpartition(".")
        if stem in _SPLIT:
            parts = _SPLIT[stem]
            if len(tensors[name]) % len(parts):
                raise WeightsError(f"{name!r} must hold {len(parts)} parts, found shape {tensors[name].shape}")
            for ours, value in zip(parts, np.split(tensors[name], len(parts)), strict=True):
                yield f"{layer}{ours}.{kind}", value
        elif part in _PARTS:
            yield layer + _PARTS[part], tensors[name]
        else:
            yield f"{layer}{_PARTS.get(stem, stem)}.{kind}", tensors[name]
