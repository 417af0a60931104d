"""Norms: the layer norm of tokens, and RMS norm, of tokens and of the queries and keys of attention."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gspn_jax.models.parameters import logical
from gspn_jax.models.remat import named
from gspn_jax.models.stack import tensor_cores

EPSILON = 1e-6


class RMSNorm(nnx.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, times a scale that starts at 1 (arXiv 1910.07467); computed and
    returned in float32, in which its scale stays."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, epsilon=EPSILON, rngs=rngs, scale_metadata=logical(float32=True))

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        return super().__call__(x.astype(jnp.float32))


def layer_norm(x: Float[Array, "B H W D"], width: int | None = None) -> Float[Array, "B H W D"]:
    """Zero mean and unit variance over D, without scale or bias, computed and returned in float32.

    With `width` over the first so many channels; the others must be zero, and come out as anything.
    """
    x, width = x.astype(jnp.float32), width or x.shape[-1]
    return _normalised(x, width) if tensor_cores() else _centred(x, width)


def _centred(x: Float[Array, "B H W D"], width: int) -> Float[Array, "B H W D"]:
    mean, added = named(x.sum(-1, keepdims=True) / width, "norm"), x.shape[-1] - width
    x = x - mean
    squares = jnp.square(x).sum(-1, keepdims=True)
    if added:  # a mask would be kept, as large as x: what was added is taken off the sum instead
        squares = squares - added * jnp.square(mean)
    return x * named(jax.lax.rsqrt(squares / width + EPSILON), "norm")


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _normalised(x: Float[Array, "B H W D"], width: int) -> Float[Array, "B H W D"]:
    """XLA makes one kernel of it where mean and deviation are not kept."""
    return _centred(x, width)


@_normalised.defjvp
def _normalised_jvp(width, primals, tangents):
    """The derivative by the result: its transpose makes both of its sums in one pass, where that of the operations
    makes three; mean and scale are kept."""
    y, scale = _by_moments(primals[0], width)
    (x,) = tangents
    mean = x.sum(-1, keepdims=True) / width
    along = (x * y).sum(-1, keepdims=True) / width
    return y, scale * (x - mean - y * along)


def _by_moments(x: Float[Array, "B H W D"], width: int) -> tuple[Float[Array, "B H W D"], Float[Array, "B H W 1"]]:
    """(x without its mean, over its deviation; one over its deviation), by two sums in one pass over x.

    Both are of differences from the first channel, so that nothing cancels far from zero.
    """
    first, added = x[..., :1], x.shape[-1] - width
    away = x - first
    mean = (away.sum(-1, keepdims=True) + added * first) / width
    squares = (jnp.square(away).sum(-1, keepdims=True) - added * jnp.square(first)) / width
    variance = jnp.maximum(squares - jnp.square(mean), 0.0)
    scale = named(jax.lax.rsqrt(variance + EPSILON), "norm")
    return (x - named(first + mean, "norm")) * scale, scale
