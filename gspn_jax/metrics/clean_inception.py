"""Inception as clean-fid feeds it (arXiv 2104.11222): the network and the weights of `inception`, of images scaled to
299 pixels by Pillow's antialiased bicubic filter in float32, neither rounded nor clipped. It is what `--inception
clean:FILE` names; its statistics compare with one another, and not with those of ADM's scaling."""

import hashlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from gspn_jax import bicubic
from gspn_jax.metrics import inception
from gspn_jax.metrics.inception import from_state_dict, network, read, require

__all__ = ["digest", "from_state_dict", "network", "read", "require", "resize"]


def resize(images: UInt8[Array, "N H W 3"]) -> Float32[Array, "N 299 299 3"]:
    """0..255 images as the network takes them: scaled, then (x - 128) / 128."""
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != jnp.uint8:
        raise ValueError(f"images must be uint8 [N, H, W, 3], found {images.dtype} {list(images.shape)}")
    rows, columns = (bicubic.pillow(side, inception.SIZE) for side in images.shape[1:3])
    scaled = bicubic.resize(images.astype(jnp.float32), rows, columns)
    return (scaled - 128) * 0.0078125


def digest(state_dict: Mapping[str, np.ndarray]) -> str:
    """Digest of the weights and the scaling, which is not that of the weights alone."""
    return hashlib.sha256(f"clean {inception.digest(state_dict)}".encode()).hexdigest()
