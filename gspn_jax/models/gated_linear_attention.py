"""Gated linear attention as a mixer: a state for each head is handed on from token to token, and fades on the way."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gspn_jax.config import ModelConfig, require
from gspn_jax.models.mixers import check_groups, check_heads, linear, own_options
from gspn_jax.models.norms import RMSNorm
from gspn_jax.models.recurrence import ORDERS, gated_products, gated_products_flops, in_four_orders, of_four_orders

SLOWNESS = 16
"""A decay is the root of this order of a sigmoid, so that states live for tens of tokens at first (GLA)."""


@dataclasses.dataclass(frozen=True)
class GatedLinearAttentionOptions:
    """Options of `GatedLinearAttention`, which has about the parameters of attention."""

    heads: int

    needs_positions = True
    has_chunks = False
    remat_on_cpu = "none"
    aligned = False

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        own_options(cls, model, ())
        check_groups(model)
        hidden, heads = check_heads(model)
        fits = heads % ORDERS == 0 and hidden // heads % 2 == 0
        expected = f"a multiple of {ORDERS}, the orders of tokens, with an even width of a head"
        require(fits, "model.heads", f"{expected}, with model.mixer={model.mixer!r}", heads)
        return cls(heads)

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "GatedLinearAttention":
        return GatedLinearAttention(width, self, dtype=dtype, rngs=rngs)

    def flops(self, width: int, tokens: int) -> float:
        """Linears and the products of the recurrence."""
        keys, values = width // 2 // self.heads, width // self.heads
        linears = 2.0 * tokens * width * (4 * width + self.heads)
        return linears + gated_products_flops(tokens, self.heads, keys, values)


class GatedLinearAttention(nnx.Module):
    """Gated linear attention (arXiv 2312.06635) of images: a quarter of the heads goes row by row from the first token,
    one from the last, and two column by column, in place of blocks that go one way each (DiG, arXiv 2405.18428).

    Keys are half as wide as values, the result is normed by head and gated, as there; the decay is one number a token
    and head, where theirs is one a channel of the keys (that of Mamba-2, arXiv 2405.21060).
    """

    def __init__(self, width: int, options: GatedLinearAttentionOptions, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads, made = options.heads, {"dtype": dtype, "rngs": rngs}
        self.q, self.k = (linear(width, width // 2, "embed", "heads", **made) for _ in "qk")
        self.v, self.gate = (linear(width, width, "embed", "heads", **made) for _ in "vg")
        self.decay = linear(width, options.heads, "embed", "heads", **made)
        self.norm = RMSNorm(width // options.heads, rngs=rngs)
        self.proj = linear(width, width, "heads", "embed", **made)

    def __call__(self, x: Float[Array, "B H W D"], *, chunk: int | None = None) -> Float[Array, "B H W D"]:
        """`chunk` has no meaning here; every mixer takes it."""
        q, k, v = (in_four_orders(f(x).reshape(*x.shape[:3], self.heads, -1)) for f in (self.q, self.k, self.v))
        decay = in_four_orders(jax.nn.log_sigmoid(self.decay(x).astype(jnp.float32)) / SLOWNESS)
        y = gated_products(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k, v, decay)
        y = of_four_orders(self.norm(y).astype(v.dtype), *x.shape[1:3])
        return self.proj(y.reshape(x.shape) * jax.nn.silu(self.gate(x)))
