"""The operator in its plainest form: one `jax.lax.scan` over lines for each direction, differentiated by JAX.

The other backends are tested against this, and take their forward mode and derivatives of derivatives from it. It
computes in float32, or in float64 where `x` is float64.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gspn_jax.kernels.weights import DIRECTIONS, line_axes, stochastic_weights, wide


def line_scan(
    x: Float[Array, "B H W C"],
    left: Float[Array, "B H W G"],
    center: Float[Array, "B H W G"],
    right: Float[Array, "B H W G"],
    direction: str,
    chunk: int | None,
) -> Float[Array, "B H W C"]:
    """See `kernels.line_scan`; arguments are checked there."""
    weights = (weight.astype(wide(x)) for weight in (left, center, right))
    return states(x.astype(wide(x)), *weights, direction, chunk).astype(x.dtype)


def propagate(
    x: Float[Array, "B H W C"],
    gates: Float[Array, "B H W 4 3 G"],
    lam: Float[Array, "B H W 4 C"],
    out_gate: Float[Array, "B H W 4 C"],
    merge: Float[Array, "4"] | Float[Array, "4 C"],
    skip: Float[Array, "B H W 4 C"] | None,
    chunk: int | None,
) -> Float[Array, "B H W C"]:
    """See `kernels.propagate`; arguments are checked there."""
    dtype, result = x.dtype, wide(x)
    x, gates, lam, out_gate, merge = (array.astype(result) for array in (x, gates, lam, out_gate, merge))
    y = jnp.zeros_like(x)
    for k, direction in enumerate(DIRECTIONS):
        weights = stochastic_weights(gates[..., k, :, :], direction=direction)
        h = states(lam[..., k, :] * x, *weights, direction, chunk)
        y += merge[k] * out_gate[..., k, :] * h
        if skip is not None:
            y += merge[k] * skip[..., k, :].astype(result) * x
    return y.astype(dtype)


def states(
    drive: Float[Array, "B H W C"],
    left: Float[Array, "B H W G"],
    center: Float[Array, "B H W G"],
    right: Float[Array, "B H W G"],
    direction: str,
    chunk: int | None,
) -> Float[Array, "B H W C"]:
    """h[t,i] = left h[t-1,i-1] + center h[t-1,i] + right h[t-1,i+1] + drive[t,i], all in one type."""
    lines_axis, _ = line_axes(direction)
    arrays = drive, *(_of_channels(weight, drive.shape[3]) for weight in (left, center, right))
    drive, left, center, right = (jnp.moveaxis(array, lines_axis, 0) for array in arrays)  # [line, B, position, C]
    backwards = direction in ("up", "left")
    visited = jnp.arange(len(drive))

    def step(h, line):
        t, left, center, right, drive = line
        if chunk is not None:
            h = jnp.where(t % chunk == 0, 0.0, h)
        h = left * _moved(h, 1) + center * h + right * _moved(h, -1) + drive
        return h, h

    t = visited[::-1] if backwards else visited
    _, found = jax.lax.scan(step, jnp.zeros_like(drive[0]), (t, left, center, right, drive), reverse=backwards)
    return jnp.moveaxis(found, 0, lines_axis)


def _of_channels(weight: Float[Array, "B H W G"], channels: int) -> Float[Array, "B H W C"]:
    """The weight of each channel: that of its group of C/G consecutive channels."""
    groups = weight.shape[3]
    return weight if groups == channels else jnp.repeat(weight, channels // groups, axis=3)


def _moved(h: Float[Array, "B position C"], offset: int) -> Float[Array, "B position C"]:
    """Element i is h[i - offset], 0 beyond the ends of the line."""
    padded = jnp.pad(h, ((0, 0), (1, 1), (0, 0)))
    return jax.lax.slice_in_dim(padded, 1 - offset, 1 - offset + h.shape[1], axis=1)


def depthwise_conv(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C"]) -> Float[Array, "B H W C"]:
    """Sums of `kernels.depthwise_conv` without a bias, in the type of the computation."""
    return jax.lax.conv_general_dilated(
        x.astype(wide(x)),
        kernel.astype(wide(x))[:, :, None],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )
