"""Residual blocks of the two layouts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gspn_jax.models.drop_path import BRANCHES, DropPath
from gspn_jax.models.embeddings import XAVIER
from gspn_jax.models.mixers import DepthwiseConv
from gspn_jax.models.norms import RMSNorm, layer_norm
from gspn_jax.models.parameters import cast, logical
from gspn_jax.models.presets import Architecture
from gspn_jax.models.remat import named
from gspn_jax.models.stack import split_over_devices, tensor_cores
from gspn_jax.models.width import pad_block

ZEROS = jax.nn.initializers.zeros
MLP_RATIO = 4


def norm_of(arch: Architecture, *, rngs: nnx.Rngs) -> Callable[[Float[Array, "B H W D"]], Float[Array, "B H W D"]]:
    """The norm of the DiT layout, a function or a module; float32."""
    return RMSNorm(arch.hidden, rngs=rngs) if arch.norm == "rms" else layer_norm


def modulate(x: Float[Array, "B H W D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]):
    """x * (1 + scale) + shift, the same at every token (adaLN), in the type of x."""
    shift, scale = (v[:, None, None].astype(x.dtype) for v in (shift, scale))
    return x * (1 + scale) + shift


class Modulation(nnx.Module):
    """The adaLN vectors of a condition: SiLU, then a linear that starts at zero."""

    def __init__(self, hidden: int, vectors: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = nnx.LinearGeneral(
            hidden,
            (vectors, hidden),
            kernel_init=ZEROS,
            dtype=dtype,
            rngs=rngs,
            kernel_metadata=logical("embed", None, None),
            bias_metadata=logical(),
        )

    def __call__(self, condition: Float[Array, "B D"]) -> list[Float[Array, "B D"]]:
        vectors = self.linear(jax.nn.silu(condition))
        return [vectors[:, i] for i in range(vectors.shape[1])]


class Mlp(nnx.Module):
    """Two linears around a tanh-approximated GELU."""

    def __init__(self, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        wide, into, out = MLP_RATIO * hidden, logical("embed", "mlp"), logical("mlp", "embed")
        self.fc1 = nnx.Linear(hidden, wide, kernel_init=XAVIER, dtype=dtype, rngs=rngs, kernel_metadata=into)
        self.fc2 = nnx.Linear(wide, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs, kernel_metadata=out)

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        return self.fc2(jax.nn.gelu(named(self.fc1(x), "fc1"), approximate=True))


def swiglu_width(hidden: int) -> int:
    """Width of SwiGLU with the parameters of an MLP: two thirds of its, rounded down as LightningDiT and JiT do."""
    return 2 * MLP_RATIO * hidden // 3


class SwiGLU(nnx.Module):
    """A linear of SiLU(first) * second, which are two linears (arXiv 2002.05202)."""

    def __init__(self, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        wide = swiglu_width(hidden)
        self.fc1 = nnx.LinearGeneral(
            hidden,
            (2, wide),
            kernel_init=XAVIER,
            dtype=dtype,
            rngs=rngs,
            kernel_metadata=logical("embed", None, "mlp"),
            bias_metadata=logical(),
        )
        self.fc2 = nnx.Linear(
            wide, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs, kernel_metadata=logical("mlp", "embed")
        )

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        both = named(self.fc1(x), "fc1")
        return self.fc2(jax.nn.silu(both[..., 0, :]) * both[..., 1, :])


class DiTBlock(nnx.Module):
    """adaLN-zero block of DiT (arXiv 2212.09748): mixer and MLP, each normalised, modulated and gated.

    With SwiGLU and RMS norm it is the block of LightningDiT and JiT (arXiv 2501.01423, 2511.13720).
    """

    def __init__(self, arch: Architecture, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.modulation = Modulation(arch.hidden, 6, dtype=dtype, rngs=rngs)
        self.mixer = arch.options.build(arch.hidden, dtype=dtype, rngs=rngs)
        self.mlp = {"gelu": Mlp, "swiglu": SwiGLU}[arch.mlp](arch.hidden, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2 = (norm_of(arch, rngs=rngs) for _ in range(BRANCHES))

    def __call__(
        self, x: Float[Array, "B H W D"], condition: Float[Array, "B D"], *,
        chunk: int | None, drop_path: DropPath | None = None, long_skip: None = None,
    ) -> Float[Array, "B H W D"]:  # fmt: skip
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        branches = (
            (self.norm1, lambda h: self.mixer(h, chunk=chunk), shift1, scale1, gate1),
            (self.norm2, self.mlp, shift2, scale2, gate2),
        )
        for index, (norm, branch, shift, scale, gate) in enumerate(branches):
            y = gate[:, None, None] * branch(modulate(norm(x), shift, scale))
            x = x + (y if drop_path is None else drop_path(y, index))
        return x


class GSPNBlock(nnx.Module):
    """Block of the paper layout: mixer, depthwise 3x3, y * relu(y), linear; no MLP and no modulation.

    With `long_skip` the tokens are first joined with those of an earlier block (concatenation, then a linear).
    """

    def __init__(self, arch: Architecture, *, long_skip: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.hidden = hidden = arch.hidden
        self.join = nnx.Linear(2 * hidden, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs) if long_skip else None
        self.mixer = arch.options.build(hidden, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(3, hidden, squared_relu=True, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(hidden, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W D"], condition: None = None, *,
        chunk: int | None, drop_path: DropPath | None = None, long_skip: Float[Array, "B H W D"] | None = None,
    ) -> Float[Array, "B H W D"]:  # fmt: skip
        if self.join is not None:
            x = named(self._joined(x, long_skip), "join")
        if tensor_cores():
            x = with_layout_constraint(x, Layout((0, 1, 2, 3)))
        y = named(self.conv(self.mixer(layer_norm(x, self.hidden), chunk=chunk)), "conv3")
        y = self.out_proj(y)
        return x + (y if drop_path is None else drop_path(y))

    def _joined(self, x: Float[Array, "B H W D"], long_skip: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        """The linear of both side by side; tensor cores add two products, so that nothing is put together first."""
        if not tensor_cores():
            return self.join(jnp.concatenate([x, long_skip], axis=-1))
        upper, lower = jnp.split(self.join.kernel[...].astype(x.dtype), 2)
        # without the barrier XLA merges the gradients of the two products, and puts their arguments together after all
        return x @ upper + jax.lax.optimization_barrier(long_skip @ lower) + self.join.bias[...].astype(x.dtype)


def prepared(params: Any, shapes: Any, arch: Architecture, dtype: DTypeLike) -> Any:
    """Parameters of a block, or of a stack of them, as blocks compute with them: in `dtype`, but for those that stay
    float32, and on a machine with tensor cores in the widths that those take."""
    params = cast(params, shapes, dtype)
    return pad_block(params, arch) if tensor_cores() and arch.layout == "paper" else params


def prepared_stack(params: Any, shapes: Any, arch: Architecture, dtype: DTypeLike) -> Any:
    """Part of `prepared` that can be done for all blocks at once; the cast, where parameters are split over devices."""
    return cast(params, shapes, dtype) if split_over_devices() else prepared(params, shapes, arch, dtype)
