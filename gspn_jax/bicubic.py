"""Bicubic resampling as matrices of weights: Pillow's filter, and PyTorch's without antialiasing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64

_PILLOW, _TORCH = -0.5, -0.75
"""The parameter of Keys' cubic: Pillow's, which PyTorch has too where it antialiases, and PyTorch's where not."""


def resize_levels(x: Float32[Array, "B H W C"], height: int, width: int) -> Float32[Array, "B height width C"]:
    """Levels 0..255 scaled as Pillow does, which rounds to levels behind each axis."""
    for axis, scaled in ((2, width), (1, height)):  # Pillow's order
        x = _along(x, axis, pillow(x.shape[axis], scaled))
        x = jnp.clip(jnp.floor(x + 0.5), 0, 255)
    return x


def resize(x: Float[Array, "B H W C"], rows: Float64[np.ndarray, "h H"], columns: Float64[np.ndarray, "w W"]):
    """[B, h, w, C] by the weights of each axis."""
    return _along(_along(x, 2, columns), 1, rows)


def _along(x: jax.Array, axis: int, weights: Float64[np.ndarray, "scaled size"]) -> jax.Array:
    product = jnp.tensordot(x, jnp.asarray(weights, x.dtype), axes=[[axis], [1]], precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(product, -1, axis)


@functools.lru_cache(maxsize=8)
def pillow(size: int, scaled: int) -> Float64[np.ndarray, "scaled size"]:
    """Weights of each pixel in each scaled one (Pillow's `precompute_coeffs`): the filter grows with the reduction.

    PyTorch's with `antialias=True` are the same.
    """
    ratio = size / scaled
    stretch = max(ratio, 1.0)
    weights = np.zeros((scaled, size))
    for i in range(scaled):
        centre = (i + 0.5) * ratio
        first = max(0, math.floor(centre - 2 * stretch + 0.5))
        last = min(size, math.floor(centre + 2 * stretch + 0.5))
        values = _cubic((np.arange(first, last) - centre + 0.5) / stretch, _PILLOW)
        weights[i, first:last] = values / values.sum()
    return weights


@functools.lru_cache(maxsize=8)
def torch(size: int, scaled: int, offset: float = 0.0) -> Float64[np.ndarray, "scaled size"]:
    """Weights of PyTorch's `interpolate(mode="bicubic", align_corners=False)`, whose filter does not grow and repeats
    what is at the edge; with an `offset` for `scale_factor=(scaled + offset) / size`."""
    weights = np.zeros((scaled, size))
    for i in range(scaled):
        centre = (i + 0.5) * size / (scaled + offset) - 0.5
        taps = math.floor(centre) + np.arange(-1, 3)
        np.add.at(weights[i], np.clip(taps, 0, size - 1), _cubic(taps - centre, _TORCH))
    return weights


def _cubic(x: Float64[np.ndarray, " n"], a: float) -> Float64[np.ndarray, " n"]:
    """Keys' cubic convolution."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
