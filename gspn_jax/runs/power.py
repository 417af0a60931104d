"""Power-function averages of parameters over training, and their sums that are one of another width (EDM2, Karras et
al. 2024, arXiv 2312.02696, section 3 and appendix C).

The average of exponent g after step T weighs the parameters of time t <= T by p(t) = (g + 1) t^g / T^(g + 1). Step k is
the time from k - 1 to k, so that it has the weight (k^(g + 1) - (k - 1)^(g + 1)) / T^(g + 1), and the average follows
step by step from the one before, without knowing T. Its width is the standard deviation of p relative to T.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

TERMS_DROPPED = 1e-7
"""Terms of a sum whose coefficients are smaller: what they add is below the rounding of float32."""


class Averages(NamedTuple):
    """Averages, by step and width."""

    steps: Float64[np.ndarray, " N"]
    widths: Float64[np.ndarray, " N"]


class Sum(NamedTuple):
    """A sum of averages that is nearly that of another width."""

    coefficients: Float64[np.ndarray, " N"]
    error: float
    """Norm of the difference of both profiles, relative to that of the wanted one: 0 is exact, 1 is nothing of it."""


def exponent(width: float) -> float:
    """g of a width in (0, 1/sqrt(12)]: the root of (g + 1) / ((g + 2)^2 (g + 3)) = width^2 with g >= 0."""
    inverse = np.float64(width) ** -2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots.real.max()))


def share(width: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """Share of the parameters of `step`, from 1, in the average after it: 1 - (1 - 1/step)^(g + 1)."""
    power = np.float32(exponent(width) + 1.0)
    return -jnp.expm1(power * jnp.log1p(-1.0 / step.astype(jnp.float32)))  # 1 - x would round away most of it


def products(one: Averages, other: Averages) -> Float64[np.ndarray, "N M"]:
    """The integral of p q over time, for each average of `one` and each of `other`: closed form, without overflow."""
    powers = [np.array([exponent(width) for width in found.widths]) for found in (one, other)]
    g, h = powers[0][:, None], powers[1][None, :]
    first, second = one.steps[:, None], other.steps[None, :]
    ratio = np.where(first < second, first / second, second / first)
    return (g + 1) * (h + 1) / (g + h + 1) * ratio ** np.where(first < second, h, g) / np.maximum(first, second)


def reconstruct(found: Averages, step: float, width: float) -> Sum:
    """The least-squares sum of averages for that of `width` after `step`, with coefficients that sum to 1.

    A constant part of the parameters is thereby in it exactly. Raises ValueError without averages.
    """
    if not len(found.steps):
        raise ValueError("a width is made of one average or more, found none")
    same = (found.steps == step) & (found.widths == width)
    if same.any():
        return Sum(same.astype(np.float64), 0.0)
    wanted = Averages(np.array([float(step)]), np.array([float(width)]))
    norm = products(wanted, wanted)[0, 0]
    scale = np.sqrt(np.diag(products(found, found)))  # profiles of norm 1: otherwise early ones, which are high, rule
    gram = products(found, found) / np.outer(scale, scale)
    right = products(found, wanted)[:, 0] / scale
    coefficients = _constrained(gram, right, 1.0 / scale) / scale
    difference = norm - 2 * coefficients @ (right * scale) + coefficients @ products(found, found) @ coefficients
    return Sum(coefficients, float(np.sqrt(max(0.0, difference) / norm)))


def _constrained(
    gram: Float64[np.ndarray, "N N"], right: Float64[np.ndarray, " N"], sums: Float64[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    """x with gram x ~ right and sums x = 1, by a Lagrange multiplier."""
    size = len(right)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size], system[size, :size], system[:size, size] = gram, sums, sums
    return np.linalg.lstsq(system, np.append(right, 1.0), rcond=1e-13)[0][:size]
