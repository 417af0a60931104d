"""What lets tokens see one another: attention, or the line scans of GSPN. Both map [B, H, W, D] to [B, H, W, D]."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gspn_jax.kernels import depthwise_conv, propagate_low_rank
from gspn_jax.models.attention import attention
from gspn_jax.models.embeddings import XAVIER
from gspn_jax.models.presets import Architecture
from gspn_jax.models.remat import named

DIRECTIONS = 4
NEIGHBOURS = 3
MIXER_KERNEL = 7
FLOAT32 = ("merge",)
"""Parameters that are used in float32 whatever the type of the computation; the other ones are cast to it first."""

# Uniform in +-1/sqrt(kernel area): the usual default for a depthwise convolution.
DEPTHWISE = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1), out_axis=2)


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens, softmax in float32 (DiT, after ViT)."""

    def __init__(self, arch: Architecture, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = arch.heads
        self.qkv = nnx.LinearGeneral(arch.hidden, (3, arch.hidden), kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(arch.hidden, arch.hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W D"], *, chunk: int | None = None) -> Float[Array, "B H W D"]:
        """`chunk` has no meaning here; every mixer takes it."""
        batch, height, width, hidden = x.shape
        heads = (batch, height * width, self.heads, hidden // self.heads)
        y = attention(*(a.reshape(heads) for a in self._queries_keys_values(x)))
        return self.proj(y.reshape(x.shape))

    def _queries_keys_values(self, x: Float[Array, "B H W D"]) -> list[Float[Array, "B H W D"]]:
        """The linear `qkv`. A CPU takes three products: it pads and adds up the gradients of slices of one, where a GPU
        has them in one kernel (of a layer of DiT-XL/2 the bound is then 5 % lower)."""
        linear = self.qkv
        if jax.default_backend() != "cpu":
            qkv = linear(x)
            return [qkv[..., i, :] for i in range(3)]
        x, kernel, bias = linear.promote_dtype((x, linear.kernel[...], linear.bias[...]), dtype=linear.dtype)
        return [x @ kernel[:, i] + bias[i] for i in range(3)]


class DepthwiseConv(nnx.Module):
    """One odd square kernel a channel, zero padding, no bias; with `squared_relu` y * relu(y) of it."""

    def __init__(self, size: int, hidden: int, *, squared_relu: bool = False, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype, self.squared_relu = dtype, squared_relu
        self.kernel = nnx.Param(DEPTHWISE(rngs.params(), (size, size, hidden), jnp.float32))

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        kernel = self.kernel[...].astype(self.dtype)
        return depthwise_conv(x.astype(self.dtype), kernel, squared_relu=self.squared_relu)


class GSPNMixer(nnx.Module):
    """Four-direction propagation with weights that the tokens choose (arXiv 2501.12381, section 4).

    Linear, depthwise 7x7, then from a narrow proxy of each token: the propagation weights (`gates`), the scale of what
    enters the scan (`lam`) and of what leaves it (`out_gate`); the four scans are merged and pass a last linear.

    `lam` and `out_gate` are 1 plus a linear without bias, and `merge` starts at 1/4, so that at initialisation the
    propagation hands a token on at scale 1 with its context; this is our choice, the paper does not say. There are
    no biases beyond those of the linears: with them the parameter counts are those of the paper.
    """

    def __init__(self, arch: Architecture, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.backend = arch.backend
        self.in_proj = nnx.Linear(arch.hidden, arch.hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(MIXER_KERNEL, arch.hidden, dtype=dtype, rngs=rngs)
        self.proxy = nnx.Linear(arch.hidden, arch.proxy, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

        def expand(*shape: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(arch.proxy, shape, use_bias=False, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

        self.gates = expand(DIRECTIONS * NEIGHBOURS, arch.groups)
        self.lam = expand(DIRECTIONS, arch.hidden)
        self.out_gate = expand(DIRECTIONS, arch.hidden)
        self.skip = expand(DIRECTIONS, arch.hidden) if arch.skip else None
        self.merge = nnx.Param(jnp.full((DIRECTIONS,), 1 / DIRECTIONS, jnp.float32))
        self.out_proj = nnx.Linear(arch.hidden, arch.hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W D"], *, chunk: int | None = None) -> Float[Array, "B H W D"]:
        """`chunk` lines a local scan, None for the whole map."""
        x = named(self.conv(named(self.in_proj(x), "in_proj")), "conv7")
        proxy = named(self.proxy(x), "proxy")
        gates, lam, out_gate, skip = (
            None if linear is None else linear.kernel[...].astype(x.dtype)
            for linear in (self.gates, self.lam, self.out_gate, self.skip)
        )
        y = propagate_low_rank(
            x, proxy, gates.reshape(gates.shape[0], DIRECTIONS, NEIGHBOURS, -1), lam, out_gate, self.merge[...],
            skip=skip, chunk=chunk, backend=self.backend,
        )  # fmt: skip
        return named(self.out_proj(named(y, "scan")), "out_proj")


MIXERS = {"attention": Attention, "gspn": GSPNMixer}
