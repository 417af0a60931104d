"""Linear attention as a mixer: tokens read one sum over all of them, so that the cost is linear in their number."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gspn_jax.config import ModelConfig
from gspn_jax.models.attention import product
from gspn_jax.models.mixers import Attention, AttentionOptions, check_groups, check_heads, own_options

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class LinearAttentionOptions:
    """Options of `LinearAttention`, which has the parameters of attention."""

    heads: int

    needs_positions = True
    has_chunks = False
    remat_on_cpu = "dots"
    aligned = False

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        own_options(cls, model, ())
        check_groups(model)
        return cls(check_heads(model)[1])

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "LinearAttention":
        return LinearAttention(width, AttentionOptions(self.heads), dtype=dtype, rngs=rngs)

    def flops(self, width: int, tokens: int) -> float:
        """qkv and output linears, the states of the heads, what tokens read of them, and of the sums of keys."""
        return 2.0 * tokens * width * (4 * width + 2 * width // self.heads + 1)


class LinearAttention(Attention):
    """`Attention` with relu(q) . relu(k) in place of exp(q . k / sqrt(d)), as EfficientViT (arXiv 2205.14756) and SANA
    (arXiv 2410.10629) have it; without the convolutions that they put around it."""

    def attend(
        self, q: Float[Array, "B N heads d"], k: Float[Array, "B N heads d"], v: Float[Array, "B N heads d"]
    ) -> Float[Array, "B N heads d"]:
        """sum_j (q_i . k_j) v_j / (sum_j q_i . k_j + 1e-6 N), the positive parts of q and k; sums are float32."""
        dtype, tokens = q.dtype, q.shape[1]
        q, k = jax.nn.relu(q), jax.nn.relu(k)
        state = product("bnhd,bnhe->bhde", k, v) / tokens
        mean = k.astype(jnp.float32).mean(1)
        read = product("bnhd,bhde->bnhe", q, state.astype(dtype))
        weight = product("bnhd,bhd->bnh", q, mean.astype(dtype))
        return (read / (weight[..., None] + EPSILON)).astype(dtype)
