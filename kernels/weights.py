"""Logits to row-stochastic weights: the stability-context condition of GSPN (arXiv 2501.12381, section 3.2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DIRECTIONS = ("down", "up", "right", "left")
"""Where a scan goes, in the order of the direction axis of `propagate`; the lines of the first two are rows."""

LOGIT_FLOOR = -25.0
"""Lower logits count as this (their gradient passes), so that three tiny sigmoids still have a sum to divide by."""


def check_direction(direction: str) -> None:
    """Raises ValueError unless `direction` is one of DIRECTIONS."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(map(repr, DIRECTIONS))}, found {direction!r}.")


def line_axes(direction: str) -> tuple[int, int]:
    """(axis that counts the lines, axis of the position along a line) of a [B, H, W, ...] array."""
    return (1, 2) if direction in ("down", "up") else (2, 1)


def wide(array: Float[Array, "..."]) -> jnp.dtype:
    """The type in which to compute: float32, and for float64 that."""
    return jnp.dtype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)


def inside(shape: tuple[int, ...], axis: int) -> tuple[Array, Array]:
    """(has a left neighbour, has a right neighbour) along `axis`, as float32 1 and 0."""
    position = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return (position > 0).astype(jnp.float32), (position < shape[axis] - 1).astype(jnp.float32)


def stochastic_weights(
    gates: Float[Array, "B H W 3 G"], *, direction: str
) -> tuple[Float[Array, "B H W G"], Float[Array, "B H W G"], Float[Array, "B H W G"]]:
    """Weights of the left, center and right neighbour: sigmoid, divided by the sum over the neighbours that exist.

    `gates` holds the logits in that order on its fourth axis; logits below -25 count as -25. A weight whose neighbour
    lies outside the map is 0, and the weights of a pixel sum to 1. Computed in float32 or, from
    float64, in that; returned in the dtype of `gates`. Source: the row-stochastic matrices of GSPN (arXiv 2501.12381).

    Raises ValueError for another rank, a fourth axis that is not 3, or an unknown direction.
    """
    check_direction(direction)
    if gates.ndim != 5 or gates.shape[3] != 3:
        raise ValueError(f"gates must have shape [B, H, W, 3, G], found {list(gates.shape)}.")
    logits = gates.astype(wide(gates))
    sigmoids = jax.nn.sigmoid(logits + jax.lax.stop_gradient(jnp.maximum(LOGIT_FLOOR - logits, 0.0)))
    left, center, right = sigmoids[..., 0, :], sigmoids[..., 1, :], sigmoids[..., 2, :]
    has_left, has_right = (there.astype(left.dtype) for there in inside(left.shape, line_axes(direction)[1]))
    left, right = left * has_left, right * has_right
    scale = 1.0 / (left + center + right)
    return tuple((weight * scale).astype(gates.dtype) for weight in (left, center, right))
