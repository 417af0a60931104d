"""Pixels between the model's range, [-1, 1], and 8 bits; greyscale as RGB. The one place that says how."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

Images = TypeVar("Images", jax.Array, np.ndarray)


def to_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """[-1, 1] -> 0..255, as DiT and ADM do: 127.5 x + 128, clipped to [0, 255], truncated."""
    return jnp.clip(127.5 * jnp.asarray(x, jnp.float32) + 128, 0, 255).astype(jnp.uint8)


def from_uint8(x: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """0..255 -> float32 in [-1, 1]: x / 127.5 - 1. `to_uint8` gives x back exactly."""
    return jnp.asarray(x).astype(jnp.float32) / 127.5 - 1


def to_rgb(images: Images) -> Images:
    """[N, H, W, 1 or 3] -> [N, H, W, 3], in NumPy or JAX as given: greyscale as three equal channels."""
    return images if images.shape[-1] == 3 else images.repeat(3, axis=-1)
