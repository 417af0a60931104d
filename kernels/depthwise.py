"""Depthwise convolution without the slow paths of XLA.

NVIDIA GPUs run our own kernel (`depthwise_gpu`) where it takes the arguments; a CPU sums shifted products, forward and
backward; the rest is XLA's grouped convolution. On 2 CPU cores, 7x7 on [8, 16, 16, 256] float32, that takes 39 ms
forward and 118 ms with gradients, shifted products 2.5 and 19. On an H100, 7x7 on [64, 16, 16, 1536] bfloat16, cuDNN
takes 203 us forward and 353 for both gradients, where a copy would take 34; with 1,200 channels several times as long.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gspn_jax.kernels.derivatives import differentiable
from gspn_jax.kernels.sharding import Shards, over_shards, split_by

try:
    from gspn_jax.kernels import depthwise_gpu, devices
except (ImportError, AttributeError) as error:  # a version of JAX that moves a name of an experimental part
    depthwise_gpu, _no_kernel = None, f"cannot be had from this JAX ({jax.__version__}: {error})"

logger = logging.getLogger(__name__)


def depthwise_conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "kh kw C"],
    bias: Float[Array, "C"] | None = None,
    *,
    squared_relu: bool = False,
    shards: Shards | None = None,
) -> Float[Array, "B H W C"]:
    """Correlates every channel with its own kernel: SAME zero padding, stride 1, odd kernel sizes.

        y[b,i,j,c] = bias[c] + sum_{m,n} kernel[m,n,c] x[b, i + m - kh//2, j + n - kw//2, c]

    or with `squared_relu` y * relu(y), which our GPU kernel computes in float32 where there is no bias, the rest in the
    dtype of `x`. Sums in float32 and returns the dtype of `x`, to which the sum of a GPU is rounded before a bias is
    added. Differentiable in both modes, and again. `shards` are those of `kernels.line_scan`.
    Raises ValueError for wrong shapes or an even kernel size.
    """
    if x.ndim != 4:
        raise ValueError(f"x must have shape [B, H, W, C], found {list(x.shape)}.")
    if kernel.ndim != 3 or kernel.shape[2] != x.shape[3] or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(
            f"kernel must have shape [kh, kw, {x.shape[3]}] with odd kh and kw, found {list(kernel.shape)}."
        )
    if bias is not None and bias.shape != x.shape[3:]:
        raise ValueError(f"bias must have shape {list(x.shape[3:])}, found {list(bias.shape)}.")
    with split_by(shards):
        reason = refusal(x, kernel)
        on_chip = reason is None and squared_relu and bias is None
        if reason is None:
            # the kernel in float32, in which the parts of a sharded batch then add up its gradient
            y = over_shards(depthwise_gpu.correlate, "bc -c")(x, kernel.astype(jnp.float32), on_chip)
        else:
            _log_refusal(reason)
            y = _correlate(x, kernel)
    if bias is not None:
        y = y.astype(jnp.float32) + bias.astype(jnp.float32)
    y = y.astype(x.dtype)
    return y * jax.nn.relu(y) if squared_relu and not on_chip else y


def refusal(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> str | None:
    """Reason why our GPU kernel does not run, in words, or None."""
    if depthwise_gpu is None:
        return _no_kernel
    return devices.missing() or depthwise_gpu.refuses(x, kernel)


@functools.cache
def _log_refusal(reason: str) -> None:
    if jax.default_backend() != "cpu":
        logger.info("Depthwise convolutions are XLA's: the GPU kernel %s.", reason)


def _correlate(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> Float[Array, "B H W C"]:
    """Without bias: in float32 on a CPU, elsewhere in the type of `x`, for XLA:GPU has a convolution of bfloat16 that
    widens read its arguments in float32 too. The gradients are written out because autodiff of the shifted sum is 5
    times slower."""
    return differentiable(_forward, plain=_forward, pull_back=_backward)((x, kernel))


def _forward(arrays: tuple[Array, Array]) -> Array:
    return _shifted_products(*arrays) if jax.default_backend() == "cpu" else _grouped(*arrays)


def _backward(arrays: tuple[Array, Array], _: tuple, cotangent: Array) -> tuple[Array, Array]:
    x, kernel = arrays
    gradients = _shifted_gradients if jax.default_backend() == "cpu" else _grouped_gradients
    grad_x, grad_kernel = gradients(x, kernel, cotangent)
    return grad_x.astype(x.dtype), grad_kernel.astype(kernel.dtype)


def _pad(x: Array, kernel: Array) -> Array:
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    return jnp.pad(x.astype(jnp.float32), ((0, 0), (rows, rows), (columns, columns), (0, 0)))


def _shifted_products(x: Array, kernel: Array) -> Array:
    padded, kernel = _pad(x, kernel), kernel.astype(jnp.float32)
    height, width = x.shape[1:3]
    rows, columns = kernel.shape[:2]
    return sum(kernel[m, n] * padded[:, m : m + height, n : n + width] for m in range(rows) for n in range(columns))


def _shifted_gradients(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    padded, (rows, columns) = _pad(x, kernel), kernel.shape[:2]

    def shifted_dot(tap):
        shifted = lax.dynamic_slice(padded, (0, tap // columns, tap % columns, 0), x.shape)
        return (shifted * cotangent).sum((1, 2))

    # A loop over taps: written out, they are 3 to 8 times slower. The batch is summed after it, so that a sharded batch
    # costs one collective and not one a tap.
    by_kernel = lax.map(shifted_dot, jnp.arange(rows * columns)).sum(1).reshape(kernel.shape)
    return _shifted_products(cotangent, kernel[::-1, ::-1]), by_kernel


def _grouped(x: Array, kernel: Array) -> Array:
    """XLA's convolution takes both arguments in one dtype, that of `x`, sums in float32 and rounds to that of `x`."""
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype)[:, :, None],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        preferred_element_type=x.dtype,
    )


def _grouped_gradients(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    cotangent = cotangent.astype(x.dtype)
    by_x = _grouped(cotangent, kernel[::-1, ::-1])
    _, transpose = jax.vjp(lambda kernel: _grouped(x, kernel), kernel.astype(x.dtype))
    return by_x, *transpose(cotangent)
