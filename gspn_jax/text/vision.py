"""The image tower of CLIP (ViT) as a function of its weights, by the names of transformers' `CLIPVisionModel` without
the prefix `vision_model.`, beside `visual_projection.weight`.

The patch convolution is [p, p, 3, out], tables [rows, width], linears [in, out].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from gspn_jax.bicubic import resize_levels
from gspn_jax.config import ConfigError
from gspn_jax.text import layers
from gspn_jax.text.layers import ACTIVATIONS, HIGHEST, Params, layer_shapes, with_biases

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of each channel in 0..1, as every CLIP of OpenAI and OpenCLIP's ViTs have them (openai/CLIP)."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The defaults are those of CLIP ViT-L/14."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    hidden: int = 4096
    """Width inside an MLP."""
    activation: str = "quick_gelu"
    projection: int = 768
    """Width of the image's embedding."""
    image_size: int = 224
    patch: int = 14
    epsilon: float = 1e-5
    """Epsilon of every layer norm."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"the image tower's {field.name} must be a whole number above 0, found {value!r}")
        if self.width % self.heads or self.image_size % self.patch:
            raise ConfigError(
                f"the image tower's width must be a multiple of its heads and its image_size one of patch, found "
                f"{self.width} and {self.heads}, {self.image_size} and {self.patch}"
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"the image tower's hidden_act must be one of {', '.join(ACTIVATIONS)}, found {self.activation!r}"
            )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "VisionConfig":
        """Reads the `config.json` of transformers' `CLIPModel`; what it does not say is transformers' default."""
        inner = content.get("vision_config")
        if not isinstance(inner, Mapping):
            raise ConfigError(f"CLIP's config.json must have a vision_config, found {inner!r}")
        return cls(
            width=inner.get("hidden_size", 768),
            layers=inner.get("num_hidden_layers", 12),
            heads=inner.get("num_attention_heads", 12),
            hidden=inner.get("intermediate_size", 3072),
            activation=inner.get("hidden_act", "quick_gelu"),
            projection=content.get("projection_dim", 512),
            image_size=inner.get("image_size", 224),
            patch=inner.get("patch_size", 32),
            epsilon=inner.get("layer_norm_eps", 1e-5),
        )


def expected_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Name, without `vision_model.`, and shape of every tensor in a file of weights (PyTorch's layout)."""
    width, positions = config.width, 1 + (config.image_size // config.patch) ** 2
    parts = layer_shapes(config)
    names = {f"encoder.layers.{i}.{name}": shape for i in range(config.layers) for name, shape in parts.items()}
    return {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, config.patch, config.patch),
        "embeddings.position_embedding.weight": (positions, width),
        **with_biases({"pre_layrnorm": (width,)} | names | {"post_layernorm": (width,)}),
        "visual_projection.weight": (config.projection, width),
    }


def embed(params: Params, config: VisionConfig, images: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
    """Embeddings of images as `preprocess` makes them, H = W = `config.image_size`: the class token of the last layer,
    normalised and projected."""
    kernel = params["embeddings.patch_embedding.weight"].astype(images.dtype)
    patches = jax.lax.conv_general_dilated(
        images,
        kernel,
        (config.patch, config.patch),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=HIGHEST,
    )
    patches = patches.reshape(len(images), -1, config.width)
    first = jnp.broadcast_to(params["embeddings.class_embedding"].astype(images.dtype), (len(images), 1, config.width))
    x = jnp.concatenate([first, patches], axis=1)
    x += params["embeddings.position_embedding.weight"].astype(x.dtype)
    x = layers.layer_norm(params, "pre_layrnorm", config, x)
    for i in range(config.layers):
        x = layers.layer(params, f"encoder.layers.{i}", config, x, causal=False)
    pooled = layers.layer_norm(params, "post_layernorm", config, x[:, 0])
    return jnp.matmul(pooled, params["visual_projection.weight"].astype(x.dtype), precision=HIGHEST)


def preprocess(images: UInt8[Array, "B H W 3"], size: int) -> Float32[Array, "B S S 3"]:
    """Images as CLIP takes them: the short side to `size` by Pillow's bicubic filter, which rounds to levels behind
    each axis, the centre cropped, and channels normalised."""
    height, width = images.shape[1:3]
    short = min(height, width)
    scaled = size * height // short, size * width // short  # torchvision's rounding
    x = images.astype(jnp.float32)
    if short != size:
        x = resize_levels(x, *scaled)
    top, left = (round((side - size) / 2) for side in scaled)
    x = x[:, top : top + size, left : left + size] / 255
    return (x - jnp.asarray(MEAN, x.dtype)) / jnp.asarray(DEVIATION, x.dtype)
