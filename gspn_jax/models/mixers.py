"""Mixers, which let tokens see one another: attention, or the line scans of GSPN. Both map [B, H, W, D] to itself.

A mixer is two things: its options, a frozen dataclass that knows what follows from them (`MixerOptions`), and the
module that they build, whose parameters say how they are split and cast (`parameters.logical`).
"""

import dataclasses
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gspn_jax.config import ConfigError, ModelConfig, Remat, require
from gspn_jax.kernels import available_backends, depthwise_conv, propagate_low_rank
from gspn_jax.models.attention import attention
from gspn_jax.models.embeddings import XAVIER
from gspn_jax.models.norms import RMSNorm
from gspn_jax.models.parameters import MATRIX, logical
from gspn_jax.models.remat import named
from gspn_jax.models.rotary import rotate

DIRECTIONS = 4
NEIGHBOURS = 3
MIXER_KERNEL = 7
ALIGNED = 8
"""Multiple to which inner widths are rounded: 8 numbers of bfloat16 are the 16 bytes that tensor cores read at once."""
# Uniform in +-1/sqrt(kernel area): the usual default for a depthwise convolution.
DEPTHWISE = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1), out_axis=2)


class MixerOptions(Protocol):
    """The choices of a mixer and what follows from them; a frozen dataclass, for programs are compiled by it."""

    needs_positions: ClassVar[bool]
    """Whether it sees tokens without their places, so that positions are added to them."""
    has_chunks: ClassVar[bool]
    """Whether `chunk`, the lines of a local scan, means something to it."""
    remat_on_cpu: ClassVar[Remat]
    """Meaning of "none" on a CPU."""
    aligned: ClassVar[bool]
    """Whether `width` knows how to round its parameters up for tensor cores."""

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        """Those of a config in which layout, hidden and heads are those of the network. Raises ConfigError."""
        ...

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """A module that maps [B, H, W, width] to the same, with the keyword `chunk`: an int, or None for the map."""
        ...

    def flops(self, width: int, tokens: int) -> float:
        """Operations on a map of so many tokens: 2 per multiply-add."""
        ...


def own_options(cls: type, model: ModelConfig, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """`model.mixer_options` ("NAME=VALUE") as values of fields of the dataclass `cls`, of all or of those in `names`.

    Raises ConfigError."""
    fields = {field.name: field.type for field in dataclasses.fields(cls) if names is None or field.name in names}
    found = {}
    for entry in model.mixer_options:
        name, _, text = entry.partition("=")
        try:
            found[name] = {"True": True, "False": False}[text] if fields[name] is bool else fields[name](text)
        except (KeyError, ValueError) as error:
            known = ", ".join(f"{name}={kind.__name__.upper()}" for name, kind in fields.items())
            expected = f"some of {known}" if known else "empty"
            raise ConfigError(
                f"model.mixer_options must be {expected} with model.mixer={model.mixer!r}, found {entry!r}"
            ) from error
    return found


def check_groups(model: ModelConfig) -> None:
    """Raises ConfigError if groups are set, where no line scans are."""
    require(model.groups is None, "model.groups", f"None with model.mixer={model.mixer!r}", model.groups)


def check_heads(model: ModelConfig) -> tuple[int, int]:
    """(width, heads) of a mixer that has heads. Raises ConfigError unless they divide the width."""
    hidden, heads = model.hidden, model.heads
    require(heads is not None and hidden % heads == 0, "model.heads", f"a divisor of model.hidden ({hidden})", heads)
    return hidden, heads


def widened(width: int, expansion: float) -> int:
    """`expansion` times `width`, to the nearest multiple of 8, which tensor cores take; `width` itself for 1.

    Raises ConfigError for an expansion that is no number from 0 to 16, or leaves no channel."""
    found = width if expansion == 1 else ALIGNED * round(expansion * width / ALIGNED) if 0 < expansion <= 16 else 0
    expected = f"such that expansion is a number to 16 that leaves channels of {width}"
    require(found > 0, "model.mixer_options", expected, expansion)
    return found


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Options of `Attention`: heads, RMS norm of queries and keys, rotary positions."""

    heads: int
    qk_norm: bool = False
    rope: bool = False

    needs_positions = True
    has_chunks = False
    remat_on_cpu = "dots"
    """A CPU computes what is elementwise as fast as it reads it, in a third of the memory."""
    aligned = False

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        own_options(cls, model, ())
        check_groups(model)
        hidden, heads = check_heads(model)
        size = hidden // heads
        require(not model.rope or size % 4 == 0, "model.heads", "such that model.rope has heads of 4n channels", heads)
        return cls(heads, bool(model.qk_norm), bool(model.rope))

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "Attention":
        return Attention(width, self, dtype=dtype, rngs=rngs)

    def flops(self, width: int, tokens: int) -> float:
        """qkv and output linears, and two products of [tokens, tokens] with the heads."""
        return 2.0 * tokens * width * 4 * width + 2 * 2.0 * tokens * tokens * width


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens, softmax in float32 (DiT, after ViT); norms and rotary positions of
    queries and keys as LightningDiT and JiT have them (arXiv 2501.01423, 2511.13720)."""

    def __init__(self, width: int, options: AttentionOptions, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads, self.rope = options.heads, options.rope
        size = width // options.heads
        self.q_norm, self.k_norm = (RMSNorm(size, rngs=rngs) if options.qk_norm else None for _ in "qk")
        self.qkv = nnx.LinearGeneral(
            width,
            (3, width),
            kernel_init=XAVIER,
            dtype=dtype,
            rngs=rngs,
            kernel_metadata=logical("embed", None, "heads"),
            bias_metadata=logical(),
        )
        self.proj = nnx.Linear(
            width, width, kernel_init=XAVIER, dtype=dtype, rngs=rngs, kernel_metadata=logical("heads", "embed")
        )

    def __call__(self, x: Float[Array, "B H W D"], *, chunk: int | None = None) -> Float[Array, "B H W D"]:
        """`chunk` has no meaning here; every mixer takes it."""
        batch, height, width, hidden = x.shape
        heads = (batch, height * width, self.heads, hidden // self.heads)
        q, k, v = (a.reshape(heads) for a in self._queries_keys_values(x))
        if self.q_norm is not None:
            q, k = self.q_norm(q).astype(q.dtype), self.k_norm(k).astype(k.dtype)
        if self.rope:
            q, k = (rotate(a, height, width) for a in (q, k))
        return self.proj(self.attend(q, k, v).reshape(x.shape))

    def attend(
        self, q: Float[Array, "B N heads d"], k: Float[Array, "B N heads d"], v: Float[Array, "B N heads d"]
    ) -> Float[Array, "B N heads d"]:
        return attention(q, k, v)

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

    def __init__(
        self,
        size: int,
        hidden: int,
        *,
        axes: tuple[str | None, ...] = MATRIX,
        squared_relu: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """`axes` are the names of those of the kernel (`parameters.logical`)."""
        self.dtype, self.squared_relu = dtype, squared_relu
        self.kernel = nnx.Param(DEPTHWISE(rngs.params(), (size, size, hidden), jnp.float32), **logical(*axes))

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        kernel = self.kernel[...].astype(self.dtype)
        return depthwise_conv(x.astype(self.dtype), kernel, squared_relu=self.squared_relu)


@dataclasses.dataclass(frozen=True)
class GSPNOptions:
    """Options of `GSPNMixer`: sets of propagation weights, width of the proxy that they come from, the skip term of the
    authors' code, the kernel's backend (None is chosen where it runs), and how many times wider than the tokens what is
    scanned is (`widened`)."""

    groups: int
    proxy: int
    skip: bool = False
    backend: str | None = None
    expansion: float = 1.0

    needs_positions = False
    has_chunks = True
    remat_on_cpu = "none"
    aligned = True

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        own = own_options(cls, model, () if model.layout == "paper" else ("expansion",))
        return cls(**scan_options(model, widened(model.hidden, own.get("expansion", 1.0))), **own)

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "GSPNMixer":
        return GSPNMixer(width, self, dtype=dtype, rngs=rngs)

    def flops(self, width: int, tokens: int) -> float:
        """Linears, the 7x7 convolution and the scans."""
        channels = widened(width, self.expansion)
        linears = 2 * width * channels + channels * self.proxy
        return tokens * (2.0 * (linears + MIXER_KERNEL**2 * channels) + scan_flops(self, channels))


class ScanTerms(Protocol):
    """Choices of a four-direction propagation that options of several mixers have."""

    groups: int
    proxy: int
    skip: bool
    backend: str | None


def scan_options(model: ModelConfig, channels: int) -> dict[str, Any]:
    """Fields of `ScanTerms` where so many channels are scanned, as the config says them. Raises ConfigError."""
    hidden, backends = model.hidden, available_backends()
    require(
        model.backend in (None, *backends),
        "model.backend",
        f"None or one of {', '.join(map(repr, backends))} here",
        model.backend,
    )
    groups = channels if model.groups is None else model.groups
    scanned = f"model.hidden ({hidden})" if channels == hidden else f"the {channels} channels that are scanned"
    require(channels % groups == 0, "model.groups", f"a divisor of {scanned}", groups)
    require(model.proxy_ratio <= hidden, "model.proxy_ratio", f"at most model.hidden ({hidden})", model.proxy_ratio)
    return {"groups": groups, "proxy": hidden // model.proxy_ratio, "skip": model.skip, "backend": model.backend}


def scan_flops(options: ScanTerms, channels: int) -> float:
    """Operations of a pixel: the terms, which are products of its proxy, and the scans."""
    expanded = DIRECTIONS * (NEIGHBOURS * options.groups + (3 if options.skip else 2) * channels)
    # Of each channel in each direction: lam * x, three neighbours plus x, out_gate * h, times merge and sum; skip*x
    scan = DIRECTIONS * (1 + 2 * NEIGHBOURS + 1 + 2 + (2 if options.skip else 0))
    return 2.0 * options.proxy * expanded + channels * scan


CHANNELS = (None, None, "channels")
"""Axes of a parameter that has a number for each scanned channel: they are independent from `in_proj` to `out_proj`."""


class Propagation(nnx.Module):
    """Base of mixers with four-direction propagation, whose terms are linears of a narrow proxy of each token: the
    propagation weights (`gates`), the scale of what enters the scan (`lam`) and of what leaves it (`out_gate`).

    `lam` and `out_gate` are 1 plus a linear without bias, and `merge` starts at 1/4, so that at initialisation the
    propagation hands a token on at scale 1 with its context; this is our choice, the paper does not say.
    """

    def add_terms(self, channels: int, options: ScanTerms, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Makes the parameters for so many scanned channels."""

        def expand(*shape: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                options.proxy,
                shape,
                use_bias=False,
                kernel_init=XAVIER,
                dtype=dtype,
                rngs=rngs,
                kernel_metadata=logical(*CHANNELS),
            )

        self.backend = options.backend
        self.gates = expand(DIRECTIONS * NEIGHBOURS, options.groups)
        self.lam = expand(DIRECTIONS, channels)
        self.out_gate = expand(DIRECTIONS, channels)
        self.skip = expand(DIRECTIONS, channels) if options.skip else None
        self.merge = nnx.Param(jnp.full((DIRECTIONS,), 1 / DIRECTIONS, jnp.float32), **logical(float32=True))

    def propagate(
        self, x: Float[Array, "B H W C"], proxy: Float[Array, "B H W d"], chunk: int | None
    ) -> Float[Array, "B H W C"]:
        """The four scans, merged; `chunk` lines a local scan, None for the whole map."""
        gates, lam, out_gate, skip = (
            None if linear is None else linear.kernel[...].astype(x.dtype)
            for linear in (self.gates, self.lam, self.out_gate, self.skip)
        )
        return propagate_low_rank(
            x, proxy, gates.reshape(gates.shape[0], DIRECTIONS, NEIGHBOURS, -1), lam, out_gate, self.merge[...],
            skip=skip, chunk=chunk, backend=self.backend,
        )  # fmt: skip


def linear(inputs: int, features: int, *axes: str, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear with bias whose kernel has the `axes`."""
    return nnx.Linear(inputs, features, kernel_init=XAVIER, dtype=dtype, rngs=rngs, kernel_metadata=logical(*axes))


class GSPNMixer(Propagation):
    """Four-direction propagation with weights that the tokens choose (arXiv 2501.12381, section 4).

    Linear, depthwise 7x7, propagation with terms from a proxy of the convolved tokens, and a last linear. There are no
    biases beyond those of the linears: with them the parameter counts are those of the paper.
    """

    def __init__(self, width: int, options: GSPNOptions, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels, made = widened(width, options.expansion), {"dtype": dtype, "rngs": rngs}
        self.in_proj = linear(width, channels, "embed", "channels", **made)
        self.conv = DepthwiseConv(MIXER_KERNEL, channels, axes=CHANNELS, **made)
        self.proxy = linear(channels, options.proxy, "channels", "embed", **made)
        self.add_terms(channels, options, **made)
        self.out_proj = linear(channels, width, "channels", "embed", **made)

    def __call__(self, x: Float[Array, "B H W D"], *, chunk: int | None = None) -> Float[Array, "B H W D"]:
        """`chunk` lines a local scan, None for the whole map."""
        x = named(self.conv(named(self.in_proj(x), "in_proj")), "conv7")
        y = self.propagate(x, named(self.proxy(x), "proxy"), chunk)
        return named(self.out_proj(named(y, "scan")), "out_proj")
