"""Convolution as a mixer: tokens see their neighbours, and channels are scaled by what the whole map has of them."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gspn_jax.config import ModelConfig, require
from gspn_jax.models.mixers import CHANNELS, DepthwiseConv, check_groups, linear, own_options, widened
from gspn_jax.models.remat import named


@dataclasses.dataclass(frozen=True)
class ConvolutionOptions:
    """Options of `Convolution`: the (odd) side of its depthwise kernel, and how many times wider than the tokens what
    is convolved is (`mixers.widened`); with 1.25 it has about the parameters of attention."""

    kernel: int = 3
    expansion: float = 1.25

    needs_positions = False
    has_chunks = False
    remat_on_cpu = "none"
    aligned = False

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        options = cls(**own_options(cls, model))
        check_groups(model)
        widened(model.hidden, options.expansion)
        odd = options.kernel > 0 and options.kernel % 2 == 1
        require(odd, "model.mixer_options", "such that kernel is an odd number from 1", options.kernel)
        return options

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "Convolution":
        return Convolution(width, self, dtype=dtype, rngs=rngs)

    def flops(self, width: int, tokens: int) -> float:
        """Two linears, the convolution, and a linear of the mean token."""
        channels = widened(width, self.expansion)
        return 2.0 * (tokens * channels * (2 * width + self.kernel**2) + channels**2)


class Convolution(nnx.Module):
    """Linear, depthwise convolution, GELU, channels scaled by sigmoid(linear(mean over the map)), linear: the module of
    DiCo (arXiv 2505.11196), with its compact channel attention."""

    def __init__(self, width: int, options: ConvolutionOptions, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels, made = widened(width, options.expansion), {"dtype": dtype, "rngs": rngs}
        self.in_proj = linear(width, channels, "embed", "channels", **made)
        self.conv = DepthwiseConv(options.kernel, channels, axes=CHANNELS, **made)
        self.scale = linear(channels, channels, "embed", "channels", **made)
        self.out_proj = linear(channels, width, "channels", "embed", **made)

    def __call__(self, x: Float[Array, "B H W D"], *, chunk: int | None = None) -> Float[Array, "B H W D"]:
        """`chunk` has no meaning here; every mixer takes it."""
        y = named(self.conv(named(self.in_proj(x), "in_proj")), "conv7")
        y = jax.nn.gelu(y, approximate=True)
        mean = y.astype(jnp.float32).mean((1, 2)).astype(y.dtype)
        scale = jax.nn.sigmoid(self.scale(mean))
        return named(self.out_proj(y * scale[:, None, None]), "out_proj")
