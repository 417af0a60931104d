"""Rotary positions of a grid (RoPE, arXiv 2104.09864, in two axes as EVA-02 and LightningDiT have it)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

THETA = 10_000.0


def rotate(x: Float[Array, "B N heads d"], rows: int, columns: int) -> Float[Array, "B N heads d"]:
    """Queries or keys of N = rows * columns tokens, row by row, turned by their positions; in the type of `x`.

    Channels 2i and 2i + 1 of a head are a vector, turned by position * 10000^(-i / (d/4)): by the row for the first
    half of the pairs, by the column for the second, i counted from 0 in each. The product of a query and a key then
    depends on the distance of their rows and columns only. Computed in float32; d is a multiple of 4.
    """
    cos, sin = (_table(function, rows, columns, x.shape[-1]) for function in (np.cos, np.sin))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _table(function: np.ufunc, rows: int, columns: int, size: int) -> Float[Array, "N 1 pairs"]:
    """Cosine or sine of the angle of each token and pair; only two one-dimensional tables are constants."""
    rate = THETA ** -(np.arange(size // 4, dtype=np.float64) / (size // 4))
    row, column = (function(np.arange(n)[:, None] * rate).astype(np.float32) for n in (rows, columns))
    grid = (rows, columns, size // 4)
    both = jnp.concatenate([jnp.broadcast_to(row[:, None], grid), jnp.broadcast_to(column[None], grid)], axis=-1)
    return both.reshape(rows * columns, 1, size // 2)
