"""The transformer that CLIP's towers share, as functions of weights by the names of transformers.

Linears are [in, out]. Computed in the type of the tokens, norms and softmax in float32.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Params = Mapping[str, Float[Array, "..."]]

HIGHEST = jax.lax.Precision.HIGHEST

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class TowerConfig(Protocol):
    """Sizes of a tower that its layers need."""

    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def epsilon(self) -> float: ...


def layer(
    params: Params, name: str, config: TowerConfig, x: Float[Array, "B N D"], *, causal: bool
) -> Float[Array, "B N D"]:
    """Attention and an MLP, each of normalised tokens and added to them; with `causal` no token sees a later one."""
    tokens = layer_norm(params, f"{name}.layer_norm1", config, x)
    x = x + attention(params, f"{name}.self_attn", config, tokens, causal=causal)
    hidden = linear(params, f"{name}.mlp.fc1", layer_norm(params, f"{name}.layer_norm2", config, x))
    active = ACTIVATIONS[config.activation](hidden.astype(jnp.float32)).astype(x.dtype)
    return x + linear(params, f"{name}.mlp.fc2", active)


def attention(
    params: Params, name: str, config: TowerConfig, x: Float[Array, "B N D"], *, causal: bool
) -> Float[Array, "B N D"]:
    shape = (*x.shape[:2], config.heads, config.width // config.heads)
    q, k, v = (linear(params, f"{name}.{part}_proj", x).reshape(shape) for part in "qkv")
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, precision=HIGHEST, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(shape[-1])
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -jnp.inf)
    mixed = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores).astype(x.dtype), v, precision=HIGHEST)
    return linear(params, f"{name}.out_proj", mixed.reshape(x.shape))


def linear(params: Params, name: str, x: Float[Array, "B N D"]) -> Float[Array, "B N E"]:
    weight, bias = (params[f"{name}.{part}"].astype(x.dtype) for part in ("weight", "bias"))
    return jnp.matmul(x, weight, precision=HIGHEST) + bias


def layer_norm(params: Params, name: str, config: TowerConfig, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    exact = x.astype(jnp.float32)
    centred = exact - exact.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + config.epsilon)
    scale, shift = (params[f"{name}.{part}"].astype(jnp.float32) for part in ("weight", "bias"))
    return (normal * scale + shift).astype(x.dtype)


def layer_shapes(config: TowerConfig) -> dict[str, tuple[int, ...]]:
    """Shape of the weight of every part of a layer (PyTorch's layout); biases are as long as its first axis."""
    width, hidden = config.width, config.hidden
    return {
        "layer_norm1": (width,),
        **{f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")},
        "layer_norm2": (width,),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }


def with_biases(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of weights and biases, of the shapes of weights by the names of their parts."""
    return {
        f"{name}.{part}": shape if part == "weight" else shape[:1]
        for name, shape in shapes.items()
        for part in ("weight", "bias")
    }
