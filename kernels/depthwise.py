"""Depthwise convolution without the slow path of XLA:CPU."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def depthwise_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"], bias: Float[Array, "C"] | None = None
) -> Float[Array, "B H W C"]:
    """Correlates every channel with its own kernel: SAME zero padding, stride 1, odd kernel sizes.

        y[b,i,j,c] = bias[c] + sum_{m,n} kernel[m,n,c] x[b, i + m - kh//2, j + n - kw//2, c]

    Accumulates in float32 and returns the dtype of `x`. Raises ValueError for wrong shapes or an even kernel size.
    """
    if x.ndim != 4:
        raise ValueError(f"x must have shape [B, H, W, C], found {list(x.shape)}.")
    if kernel.ndim != 3 or kernel.shape[2] != x.shape[3] or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(
            f"kernel must have shape [kh, kw, {x.shape[3]}] with odd kh and kw, found {list(kernel.shape)}."
        )
    if bias is not None and bias.shape != x.shape[3:]:
        raise ValueError(f"bias must have shape {list(x.shape[3:])}, found {list(bias.shape)}.")
    y = _shifted_products(x, kernel)
    if bias is not None:
        y += bias.astype(jnp.float32)
    return y.astype(x.dtype)


def _shifted_products(x: Array, kernel: Array) -> Array:
    height, width = x.shape[1:3]
    rows, columns = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0))).astype(jnp.float32)
    kernel = kernel.astype(jnp.float32)
    y = jnp.zeros(x.shape, jnp.float32)
    for m in range(rows):
        for n in range(columns):
            y += kernel[m, n] * padded[:, m : m + height, n : n + width]
    return y
