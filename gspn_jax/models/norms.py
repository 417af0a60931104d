"""RMS norm with a learned scale, of tokens and of the queries and keys of attention."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gspn_jax.models.parameters import logical

EPSILON = 1e-6


class RMSNorm(nnx.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, times a scale that starts at 1 (arXiv 1910.07467); computed and
    returned in float32, in which its scale stays."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, epsilon=EPSILON, rngs=rngs, scale_metadata=logical(float32=True))

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        return super().__call__(x.astype(jnp.float32))
