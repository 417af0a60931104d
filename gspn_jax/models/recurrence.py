"""The recurrence of gated linear attention, as products of matrices, and orders in which it takes a map's tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from gspn_jax.models.attention import product

PIECE = 64
"""Tokens whose products are taken at once; between pieces the state of each head is handed on."""
ORDERS = 4
"""Row by row from the first token, from the last, column by column from the first, from the last."""


def gated_products(
    q: Float[Array, "B N heads d"], k: Float[Array, "B N heads d"], v: Float[Array, "B N heads e"],
    log_decay: Float[Array, "B N heads"],
) -> Float[Array, "B N heads e"]:  # fmt: skip
    """Result q_i S_i of S_i = exp(log_decay_i) S_(i-1) + k_i v_i^T, from S = 0, with a decay a token and head.

    Decays, sums and states are float32; `log_decay` is, and is at most 0. Source: the chunkwise form of arXiv
    2312.06635, section 4, with scalar decays, for which nothing can overflow (arXiv 2405.21060, section 6).
    """
    batch, tokens, heads, _ = q.shape
    length = min(PIECE, tokens)
    pieces = -(-tokens // length)

    def cut(a: Shaped[Array, "B N ..."]) -> Shaped[Array, "B pieces length ..."]:
        """Zeros behind the last token: nothing is added, nothing fades."""
        a = jnp.pad(a, [(0, 0), (0, pieces * length - tokens)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(batch, pieces, length, *a.shape[2:])

    q, k, v = cut(q), cut(k), cut(v)
    total = jnp.cumsum(cut(log_decay), axis=2)
    end = total[:, :, -1:]

    def faded(a: Float[Array, "B pieces length heads d"], by: Float[Array, "B pieces length heads"]) -> Array:
        return (a.astype(jnp.float32) * jnp.exp(by)[..., None]).astype(a.dtype)

    earlier = jnp.tril(jnp.ones((length, length), bool))[:, :, None]
    decay = jnp.exp(jnp.where(earlier, total[:, :, :, None] - total[:, :, None], -jnp.inf))
    scores = product("bpihd,bpjhd->bpijh", q, k) * decay
    y = product("bpijh,bpjhe->bpihe", scores.astype(v.dtype), v)

    added = product("bpjhd,bpjhe->pbhde", faded(k, end - total), v)

    def hand_on(state: Array, piece: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.exp(piece[1])[..., None, None] * state + piece[0], state

    _, before = jax.lax.scan(hand_on, jnp.zeros_like(added[0]), (added, end[:, :, 0].swapaxes(0, 1)))
    y = y + product("bpihd,pbhde->bpihe", faded(q, total), before.astype(q.dtype))
    return y.reshape(batch, pieces * length, heads, -1)[:, :tokens].astype(v.dtype)


def in_four_orders(a: Shaped[Array, "B H W heads ..."]) -> Shaped[Array, "B N heads ..."]:
    """Tokens as sequences: a quarter of the heads has each of the orders. Heads are a multiple of 4."""
    batch, height, width = a.shape[:3]
    rows, back, columns, up = jnp.split(a, ORDERS, axis=3)

    def flat(a: Array) -> Array:
        return a.reshape(batch, height * width, *a.shape[3:])

    columns, up = (flat(part.swapaxes(1, 2)) for part in (columns, up))
    return jnp.concatenate([flat(rows), flat(back)[:, ::-1], columns, up[:, ::-1]], axis=2)


def of_four_orders(a: Shaped[Array, "B N heads ..."], height: int, width: int) -> Shaped[Array, "B H W heads ..."]:
    """Inverse of `in_four_orders`."""
    rows, back, columns, up = jnp.split(a, ORDERS, axis=2)

    def of(a: Array, *sides: int) -> Array:
        return a.reshape(a.shape[0], *sides, *a.shape[2:])

    columns, up = (of(part, width, height).swapaxes(1, 2) for part in (columns, up[:, ::-1]))
    return jnp.concatenate([of(rows, height, width), of(back[:, ::-1], height, width), columns, up], axis=3)


def gated_products_flops(tokens: int, heads: int, keys: int, values: int) -> float:
    """Operations of the products of `gated_products`, with the tokens that fill the last piece."""
    length = min(PIECE, tokens)
    filled = -(-tokens // length) * length
    return 2.0 * filled * heads * (length * (keys + values) + 2 * keys * values)
