"""Stochastic depth: residual branches that are left out, sample by sample."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

BRANCHES = 2
"""At most so many residual branches in a block."""


class DropPath(NamedTuple):
    """Stochastic depth (arXiv 1603.09382): a sample's branch is left out with probability `rate`.

    A leading axis on both fields makes it one entry a block.
    """

    key: Key[Array, "..."]
    rate: Float[Array, "..."]

    def __call__(self, branch: Float[Array, "B H W D"], index: int = 0) -> Float[Array, "B H W D"]:
        """Leaves out samples of `branch`, the one numbered `index` in its block, and scales the others up."""
        return self.draw(branch.shape[0])(branch, index)

    def draw(self, batch: int) -> "Drawn":
        """Draws the factor of every branch of one block."""
        keep = 1 - self.rate
        kept = [
            jax.random.bernoulli(jax.random.fold_in(self.key, index), keep, (batch, 1, 1, 1))
            for index in range(BRANCHES)
        ]
        return Drawn(jnp.where(jnp.stack(kept, axis=1), 1 / keep, 0.0))


class Drawn(NamedTuple):
    """Stochastic depth of one block, by the factor of each sample's branches: 0 leaves it out."""

    factor: Float[Array, "B n 1 1 1"]

    def __call__(self, branch: Float[Array, "B H W D"], index: int = 0) -> Float[Array, "B H W D"]:
        return branch * self.factor[:, index].astype(branch.dtype)
