"""The mixer of the classification networks: line scans on widened tokens, between a depthwise convolution and a GRN;
and the same with attention, or with nothing, in place of the scans."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gspn_jax.kernels import propagate, propagate_low_rank
from gspn_jax.models.attention import attention
from gspn_jax.models.embeddings import NORMAL
from gspn_jax.models.mixers import CHANNELS, DIRECTIONS, NEIGHBOURS, DepthwiseConv
from gspn_jax.models.parameters import logical
from gspn_jax.models.remat import named

NORM_EPSILON = 1e-5
GRN_EPSILON = 1e-6
SCAN_OPERATIONS = 6
"""Multiply-adds of a scan per pixel, channel and direction: lam, three neighbours, the sum with x, the output gate."""

# Uniform in +-1/sqrt(fan in), PyTorch's default for a convolution, which the release leaves as it is.
CONVOLUTION = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LayerNorm(nnx.LayerNorm):
    """Layer norm with scale and bias over the channels, computed in float32, in the type of its input."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        kept = logical(float32=True)
        super().__init__(
            width, epsilon=NORM_EPSILON, use_fast_variance=False, rngs=rngs, scale_metadata=kept, bias_metadata=kept
        )

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


class GlobalResponseNorm(nnx.Module):
    """Scales channels by their share of the map's energy (ConvNeXt V2, arXiv 2301.00808); the identity at first.

    With g_c the L2 norm of channel c over the map:  gamma x g / (mean(g) + 1e-6) + beta + x, in float32.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.gamma, self.beta = (nnx.Param(jnp.zeros((width,), jnp.float32), **logical(float32=True)) for _ in "ab")

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        dtype, x = x.dtype, x.astype(jnp.float32)
        energy = jnp.square(x).sum((1, 2), keepdims=True)
        # the slope of a root is infinite at zero, where that of a norm is taken as zero
        norm = jnp.where(energy > 0, jnp.sqrt(jnp.where(energy > 0, energy, 1.0)), 0.0)
        share = norm / (norm.mean(-1, keepdims=True) + GRN_EPSILON)
        return (x * (1 + self.gamma[...] * share) + self.beta[...]).astype(dtype)


@dataclasses.dataclass(frozen=True)
class ScanOptions:
    """Choices of `ScanMixer`.

    `proxy` is the width of the bottleneck that the scans' weights come from, `expansion` how many times wider than the
    block the scanned tokens are, `kernel` the (odd) size of the depthwise convolution. `groups` is the number of sets
    of propagation weights: None is one a channel, 1 shares them (GSPN-2). `skip` adds the term skip_k x of the released
    code, which the paper does not have. `released` starts as the released code does (see `ScanMixer`).
    """

    proxy: int
    expansion: float = 1.5
    kernel: int = 7
    groups: int | None = None
    skip: bool = False
    released: bool = False

    def channels(self, width: int) -> int:
        """Channels that are scanned in a block of `width`."""
        return round(self.expansion * width)

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "ScanMixer":
        return ScanMixer(width, self, dtype=dtype, rngs=rngs)

    def multiply_adds(self, width: int, tokens: int) -> int:
        """Multiply-adds of a map of `tokens` without those of the scans (`scan_multiply_adds`)."""
        channels = self.channels(width)
        kinds = NEIGHBOURS * (self.groups or channels) + (3 if self.skip else 2) * channels
        linears = 2 * width * channels + self.proxy * (channels + DIRECTIONS * kinds)
        return tokens * (linears + channels * (self.kernel**2 + DIRECTIONS))

    def scan_multiply_adds(self, width: int, tokens: int) -> int:
        """Multiply-adds of the scans over a map of `tokens`."""
        return tokens * DIRECTIONS * SCAN_OPERATIONS * self.channels(width)


class FramedMixer(nnx.Module):
    """The frame of GSPN's mixer (arXiv 2501.12381, figure 3a) around what lets distant tokens see one another.

    Linear to D channels, depthwise convolution, SiLU, then `spread`, which is nothing here, layer norm, global response
    norm, linear. No biases but those of the norms.
    """

    def __init__(self, width: int, channels: int, kernel: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.in_proj = _linear(width, channels, NORMAL, "embed", "channels", dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(kernel, channels, axes=CHANNELS, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(channels, rngs=rngs)
        self.grn = GlobalResponseNorm(channels, rngs=rngs)
        self.out_proj = _linear(channels, width, NORMAL, "channels", "embed", dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W d"], *, chunk: int | None = None) -> Float[Array, "B H W d"]:
        """`chunk` lines a local scan, None for the whole map; every mixer takes it."""
        x = jax.nn.silu(named(self.conv(named(self.in_proj(x), "in_proj")), "conv7"))
        y = self.spread(x, chunk)
        return named(self.out_proj(self.grn(self.norm(named(y, "scan")))), "out_proj")

    def spread(self, x: Float[Array, "B H W D"], chunk: int | None) -> Float[Array, "B H W D"]:
        return x


def _linear(
    inputs: int, features: int, init: jax.nn.initializers.Initializer, *axes: str, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear without bias whose kernel has the `axes`."""
    return nnx.Linear(
        inputs, features, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs, kernel_metadata=logical(*axes)
    )


class ScanMixer(FramedMixer):
    """GSPN's mixer for classification: D = expansion * width channels are scanned.

    The weights of the four-direction propagation come from a narrow proxy of each token.

    The start is our choice: `lam` and `out_gate` are 1 plus a linear and `merge` is 1/4, so that a token is handed on
    at scale 1. With `options.released` it is that of the released code: no 1, and merge uniform in +-1/2. What scans
    give is then a hundredth of the tokens at first, its variance below the epsilon of the norm that follows. That mode
    expands the proxy before the kernel, in memory 20 times as large as the tokens. What is wrong in the release it does
    not copy: there is no SiLU there, and scans are merged while still turned, which takes square maps.
    """

    def __init__(self, width: int, options: ScanOptions, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels = options.channels(width)
        super().__init__(width, channels, options.kernel, dtype=dtype, rngs=rngs)
        self.options = options

        def expand(*shape: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                options.proxy,
                shape,
                use_bias=False,
                kernel_init=CONVOLUTION,
                dtype=dtype,
                rngs=rngs,
                kernel_metadata=logical(*CHANNELS),
            )

        self.proxy = _linear(channels, options.proxy, CONVOLUTION, "channels", "embed", dtype=dtype, rngs=rngs)
        self.gates = expand(DIRECTIONS * NEIGHBOURS, options.groups or channels)
        self.lam = expand(DIRECTIONS, channels)
        self.out_gate = expand(DIRECTIONS, channels)
        self.skip = expand(DIRECTIONS, channels) if options.skip else None
        self.merge = nnx.Param(
            CONVOLUTION(rngs.params(), (DIRECTIONS, 1), jnp.float32)[:, 0]
            if options.released
            else jnp.full((DIRECTIONS,), 1 / DIRECTIONS, jnp.float32),
            **logical(float32=True),
        )

    def spread(self, x: Float[Array, "B H W D"], chunk: int | None) -> Float[Array, "B H W D"]:
        return self._propagate(x, named(self.proxy(x), "proxy"), chunk)

    def _propagate(self, x: Float[Array, "B H W D"], proxy: Float[Array, "B H W s"], chunk: int | None):
        gates, lam, out_gate, skip = (
            None if linear is None else linear.kernel[...].astype(x.dtype)
            for linear in (self.gates, self.lam, self.out_gate, self.skip)
        )
        gates = gates.reshape(gates.shape[0], DIRECTIONS, NEIGHBOURS, -1)
        if not self.options.released:
            return propagate_low_rank(x, proxy, gates, lam, out_gate, self.merge[...], skip=skip, chunk=chunk)
        gates, lam, out_gate, skip = (
            None if factor is None else jnp.tensordot(proxy, factor, 1) for factor in (gates, lam, out_gate, skip)
        )
        return propagate(x, gates, lam, out_gate, self.merge[...], skip=skip, chunk=chunk)


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Choices of `AttentionMixer`: heads of `head_width` channels; the others as in `ScanOptions`."""

    expansion: float = 1.0
    kernel: int = 7
    head_width: int = 32

    def channels(self, width: int) -> int:
        return round(self.expansion * width)

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "AttentionMixer":
        return AttentionMixer(width, self, dtype=dtype, rngs=rngs)

    def multiply_adds(self, width: int, tokens: int) -> int:
        channels = self.channels(width)
        products = 2 * width * channels + 3 * channels**2 + self.kernel**2 * channels
        return tokens * (products + 2 * tokens * channels)

    def scan_multiply_adds(self, width: int, tokens: int) -> int:
        return 0


class AttentionMixer(FramedMixer):
    """Multi-head self-attention over the whole map in the frame of GSPN's mixer, whose convolution tells positions."""

    def __init__(self, width: int, options: AttentionOptions, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Raises ValueError where channels are no multiple of the width of a head."""
        channels = options.channels(width)
        if channels % options.head_width:
            raise ValueError(
                f"attention must have a multiple of {options.head_width} channels, those of a head, found {channels}"
            )
        super().__init__(width, channels, options.kernel, dtype=dtype, rngs=rngs)
        self.head_width = options.head_width
        self.qkv = nnx.LinearGeneral(
            channels,
            (3, channels),
            use_bias=False,
            kernel_init=NORMAL,
            dtype=dtype,
            rngs=rngs,
            kernel_metadata=logical("embed", None, "heads"),
        )

    def spread(self, x: Float[Array, "B H W D"], chunk: int | None) -> Float[Array, "B H W D"]:
        batch, height, width, channels = x.shape
        heads = (batch, height * width, channels // self.head_width, self.head_width)
        qkv = self.qkv(x)
        return attention(*(qkv[..., i, :].reshape(heads) for i in range(3))).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class LocalOptions:
    """The frame of GSPN's mixer with nothing inside: tokens see no further than the depthwise convolution."""

    expansion: float = 2.35
    kernel: int = 7

    def channels(self, width: int) -> int:
        return round(self.expansion * width)

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> FramedMixer:
        return FramedMixer(width, self.channels(width), self.kernel, dtype=dtype, rngs=rngs)

    def multiply_adds(self, width: int, tokens: int) -> int:
        channels = self.channels(width)
        return tokens * channels * (2 * width + self.kernel**2)

    def scan_multiply_adds(self, width: int, tokens: int) -> int:
        return 0
