"""Moving averages of the parameters, several at once: exponential ones by decay, power-function ones by width."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gspn_jax.runs import averages, power


def init(params: Any, names: Iterable[str]) -> dict[str, Any]:
    """Each average starts at the parameters. `names` are those of `averages.names`."""
    return {name: jax.tree.map(jnp.copy, params) for name in names}


def update(ema: Mapping[str, Any], params: Any, step: Int[Array, ""]) -> dict[str, Any]:
    """avg <- avg + share*(params - avg): with share = 1-d, d = min(decay, (1+step)/(10+step)) for a decay, and
    `power.share` of the step that is done, step+1, for a width.

    The bound lets a young average forget the initial weights; at decay 0.9999 it ends after 90,000 steps. An average of
    a width has nothing of them after the first step. A step that the guard leaves out is in no average.
    """

    def one(name: str, average: Any) -> Any:
        width = averages.width_in(name)
        if width is None:
            share = 1.0 - jnp.minimum(float(name), (1.0 + step) / (10.0 + step)).astype(jnp.float32)
        else:
            share = power.share(width, step + 1)
        return jax.tree.map(lambda a, p: a + share * (p - a), average, params)

    return {name: one(name, average) for name, average in ema.items()}
