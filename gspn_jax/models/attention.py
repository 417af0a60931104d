"""Scaled dot-product attention: flash attention by cuDNN wherever it can run, else XLA's.

XLA's writes the scores, [B, heads, N, N] in float32, to memory: on a GPU no speed may be compared with it. The choice
is made where the function is traced, for the first device of this process or the one that `traced_for` names.
"""

import contextlib
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gspn_jax.kernels.sharding import over_shards

logger = logging.getLogger(__name__)

OLDEST_CAPABILITY = (8, 0)
"""Capability of the first NVIDIA GPU that has cuDNN's flash attention (Ampere)."""

_device = jax.make_user_context(default_value=None)
"""The device for which attention is traced, None for the one that is there."""


_forward_mode = jax.make_user_context(default_value=False)
"""Whether what is traced is differentiated in forward mode, which flash attention has no rule for."""


class Choice(NamedTuple):
    """The `implementation` of `jax.nn.dot_product_attention` that runs, and why it is not "cudnn" ("" if it is)."""

    implementation: str
    reason: str

    @property
    def fair(self) -> bool:
        """True if speeds measured on this device may be compared with it: on a GPU, only with flash attention."""
        return self.implementation == "cudnn" or _target().platform != "gpu"


def traced_for(device: Any) -> contextlib.AbstractContextManager:
    """Inside, `attention` is traced for `device`, a `jax.Device` that need not be attached (one of a topology)."""
    return _device(device)


def forward_mode(differentiated: bool) -> contextlib.AbstractContextManager:
    """Inside, `attention` is traced so that forward mode goes through it, if it is `differentiated` so."""
    return _forward_mode(differentiated)


def attention(
    q: Float[Array, "B N heads d"], k: Float[Array, "B M heads d"], v: Float[Array, "B M heads d"]
) -> Float[Array, "B N heads d"]:
    """softmax(q k^T / sqrt(d)) v of each head, with scores and softmax in float32, by what `choose` says."""
    choice = choose(q.shape, q.dtype)
    _log(choice)
    if choice.implementation == "cudnn":
        return _flash(q, k, v, None)
    dtype = q.dtype
    if jax.default_backend() == "cpu":  # has no fast bfloat16 products
        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, implementation="xla").astype(dtype)


def product(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum` of two arrays in float32, whatever their type; a CPU has no such product of bfloat16, and casts."""
    if jax.default_backend() == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def choose(shape: tuple[int, int, int, int], dtype: DTypeLike) -> Choice:
    """The implementation that runs for queries, keys and values of this shape [B, N, heads, d] and type."""
    reason = "has no forward mode" if _forward_mode.value else _why_not_cudnn(_target(), shape, jnp.dtype(dtype))
    return Choice("xla", reason) if reason else Choice("cudnn", "")


def _target() -> Any:
    device = _device.value
    return jax.local_devices()[0] if device is None else device


@functools.cache
def _why_not_cudnn(device: Any, shape: tuple[int, ...], dtype: jnp.dtype) -> str:
    """In words, or "". JAX has the limits of shape and of cuDNN's version, and is asked by a trace of the gradient."""
    capability = _compute_capability(device)
    if capability is None or capability < OLDEST_CAPABILITY:
        wanted = ".".join(map(str, OLDEST_CAPABILITY))
        return f"needs an NVIDIA GPU of compute capability {wanted} or newer, found {device.device_kind}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, found {dtype}"

    def loss(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").astype(jnp.float32).sum()

    try:
        jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), *[jax.ShapeDtypeStruct(shape, dtype)] * 3)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"cannot run here: {error}"
    return ""


def _compute_capability(device: Any) -> tuple[int, int] | None:
    """(9, 0) of a Hopper GPU; None of what is no NVIDIA GPU."""
    parts = str(getattr(device, "compute_capability", "")).split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdigit() for part in parts) else None


def _cudnn(q: Array, k: Array, v: Array, _: None) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


# Heads are split whole: JAX's own partitioning of this call fails where the axis does not divide them.
_flash = over_shards(_cudnn, "b-c- b-c- b-c-")


@functools.cache
def _log(choice: Choice) -> None:
    why_not = f": cuDNN's flash attention {choice.reason}" if choice.reason else " (flash attention)"
    logger.info("Attention runs on the %r implementation%s.", choice.implementation, why_not)
