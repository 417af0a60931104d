"""The text tower of CLIP as a function of its weights, by the names of transformers' `CLIPTextModel` without the prefix
`text_model.` ("encoder.layers.0.self_attn.q_proj.weight").

Linears are [in, out], tables [rows, width]. Computed in the type of the token table, norms and softmax in float32.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gspn_jax.config import ConfigError
from gspn_jax.text import layers
from gspn_jax.text.layers import ACTIVATIONS, HIGHEST, Params


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The defaults are those of CLIP L/14 (Stable Diffusion 1): 123,060,480 parameters."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    """Width inside an MLP."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int | None = None
    """Width of the projected pooled state; None: not projected."""
    vocabulary: int = 49408
    length: int = 77
    """Positions; no text has more tokens."""
    epsilon: float = 1e-5
    """Epsilon of every layer norm."""

    def __post_init__(self):
        if self.width % self.heads:
            raise ConfigError(
                f"the text tower's width must be a multiple of its heads, found {self.width} and {self.heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"the text tower's hidden_act must be one of {', '.join(ACTIVATIONS)}, found {self.activation!r}"
            )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "TextConfig":
        """Reads a `config.json` of transformers' `CLIPTextModel` or `CLIPTextModelWithProjection`.

        Raises ConfigError for another architecture, a field that is missing, or an end token that is not the last id.
        """
        kind = (content.get("architectures") or ["CLIPTextModel"])[0]
        if kind not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            raise ConfigError(f"the text tower must be a CLIPTextModel or a CLIPTextModelWithProjection, found {kind}")
        names = {
            "width": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "hidden": "intermediate_size",
        }
        for name in names.values():
            if not isinstance(content.get(name), int):
                raise ConfigError(f"the text tower's {name} must be an integer, found {content.get(name)!r}")
        vocabulary = content.get("vocab_size", cls.vocabulary)
        # 2 stands in old files and means the largest id too
        if (end := content.get("eos_token_id", vocabulary - 1)) not in (2, vocabulary - 1):
            raise ConfigError(f"the text tower's eos_token_id must be its last id {vocabulary - 1}, found {end}")
        return cls(
            **{ours: content[theirs] for ours, theirs in names.items()},
            vocabulary=vocabulary,
            activation=content.get("hidden_act", cls.activation),
            projection=content.get("projection_dim", 512) if kind.endswith("WithProjection") else None,
            length=content.get("max_position_embeddings", cls.length),
            epsilon=content.get("layer_norm_eps", cls.epsilon),
        )


CLIP_L = TextConfig()
"""CLIP ViT-L/14: Stable Diffusion 1 and the first of SDXL."""
OPENCLIP_H = TextConfig(width=1024, layers=23, heads=16, hidden=4096, activation="gelu")
"""OpenCLIP ViT-H/14 without its last layer: Stable Diffusion 2."""
OPENCLIP_BIGG = TextConfig(width=1280, layers=32, heads=20, hidden=5120, activation="gelu", projection=1280)
"""OpenCLIP ViT-bigG/14: the second of SDXL."""


class TextStates(NamedTuple):
    """States of a text that diffusion models take."""

    last: Float[Array, "B N D"]
    """After the last layer and the final norm (Stable Diffusion 1 and 2)."""
    penultimate: Float[Array, "B N D"]
    """Before the last layer, not normalised (SDXL)."""
    pooled: Float[Array, "B P"]
    """`last` at the end token, projected where the config says so."""


def encode(params: Params, config: TextConfig, ids: Int[Array, "B N"]) -> TextStates:
    """States of texts of up to `config.length` token ids, N the same for all; later tokens are unseen by earlier ones.

    The end token of a text is the first one with its largest id. Raises ValueError for another shape.
    """
    if ids.ndim != 2 or not 0 < ids.shape[1] <= config.length:
        raise ValueError(f"ids must be [B, N] with N from 1 to {config.length}, found {list(ids.shape)}")
    x = params["embeddings.token_embedding.weight"][ids]
    x += params["embeddings.position_embedding.weight"][: ids.shape[1]].astype(x.dtype)
    before = x
    for layer in range(config.layers):
        before = x
        x = layers.layer(params, f"encoder.layers.{layer}", config, x, causal=True)
    last = layers.layer_norm(params, "final_layer_norm", config, x)
    pooled = last[jnp.arange(len(ids)), ids.argmax(1)]
    if config.projection is not None:
        pooled = jnp.matmul(pooled, params["text_projection.weight"].astype(x.dtype), precision=HIGHEST)
    return TextStates(last, before, pooled)
