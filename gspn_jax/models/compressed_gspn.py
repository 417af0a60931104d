"""GSPN whose scans run in a narrower space: tokens keep their width, what travels between them is compressed."""

import dataclasses
from typing import Self

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gspn_jax.config import ModelConfig, require
from gspn_jax.models.mixers import (
    CHANNELS,
    MIXER_KERNEL,
    DepthwiseConv,
    Propagation,
    linear,
    own_options,
    scan_flops,
    scan_options,
    widened,
)
from gspn_jax.models.remat import named


@dataclasses.dataclass(frozen=True)
class CompressedOptions:
    """Options of `CompressedGSPN`: those of `mixers.GSPNOptions`, but that `expansion` is of the convolved tokens, and
    how many times fewer channels than these have are scanned. As set it has about the parameters of attention."""

    groups: int
    proxy: int
    skip: bool = False
    backend: str | None = None
    expansion: float = 1.3
    compression: int = 4

    needs_positions = False
    has_chunks = True
    remat_on_cpu = "none"
    aligned = False

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        own = own_options(cls, model, ("expansion", "compression"))
        compression, expansion = own.get("compression", cls.compression), own.get("expansion", cls.expansion)
        require(compression > 0, "model.mixer_options", "such that compression is 1 or more", compression)
        widened(model.hidden, expansion)
        return cls(**scan_options(model, widened(model.hidden, expansion / compression)), **own)

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "CompressedGSPN":
        return CompressedGSPN(width, self, dtype=dtype, rngs=rngs)

    def flops(self, width: int, tokens: int) -> float:
        """Linears, the 7x7 convolution and the scans."""
        wide, channels = widened(width, self.expansion), widened(width, self.expansion / self.compression)
        linears = wide * (2 * width + 2 * channels + self.proxy)
        return tokens * (2.0 * (linears + MIXER_KERNEL**2 * wide) + scan_flops(self, channels))


class CompressedGSPN(Propagation):
    """Linear, depthwise 7x7; a linear to few channels, four-direction propagation of these, a linear back, added to the
    convolved tokens; and a last linear. After the idea of C-GSPN (arXiv 2606.00746), whose block this is not."""

    def __init__(self, width: int, options: CompressedOptions, *, dtype: DTypeLike, rngs: nnx.Rngs):
        wide, made = widened(width, options.expansion), {"dtype": dtype, "rngs": rngs}
        channels = widened(width, options.expansion / options.compression)
        self.in_proj = linear(width, wide, "embed", "channels", **made)
        self.conv = DepthwiseConv(MIXER_KERNEL, wide, axes=CHANNELS, **made)
        self.proxy = linear(wide, options.proxy, "channels", "embed", **made)
        self.compress = linear(wide, channels, "embed", "channels", **made)
        self.add_terms(channels, options, **made)
        self.expand = linear(channels, wide, "channels", "embed", **made)
        self.out_proj = linear(wide, width, "channels", "embed", **made)

    def __call__(self, x: Float[Array, "B H W D"], *, chunk: int | None = None) -> Float[Array, "B H W D"]:
        """`chunk` lines a local scan, None for the whole map."""
        x = named(self.conv(named(self.in_proj(x), "in_proj")), "conv7")
        y = self.propagate(self.compress(x), named(self.proxy(x), "proxy"), chunk)
        return named(self.out_proj(x + self.expand(named(y, "scan"))), "out_proj")
