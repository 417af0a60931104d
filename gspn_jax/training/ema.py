"""Exponential moving averages of the parameters, several decays at once."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gspn_jax.runs import averages


def init(params: Any, decays: tuple[float, ...]) -> dict[str, Any]:
    """Each average starts at the parameters."""
    return {averages.name(decay): jax.tree.map(jnp.copy, params) for decay in decays}


def update(ema: Mapping[str, Any], params: Any, step: Int[Array, ""]) -> dict[str, Any]:
    """avg <- d*avg + (1-d)*params with d = min(decay, (1+step)/(10+step)).

    The bound lets a young average forget the initial weights; at decay 0.9999 it ends after 90,000 steps.
    """

    def one(decay: float, average: Any) -> Any:
        d = jnp.minimum(decay, (1.0 + step) / (10.0 + step)).astype(jnp.float32)
        return jax.tree.map(lambda a, p: a + (1.0 - d) * (p - a), average, params)

    return {key: one(float(key), average) for key, average in ema.items()}
