"""Terms that are in device memory, as the walk of a warpgroup reads them."""

from collections.abc import Iterable
from typing import NamedTuple

from jaxtyping import Array, Float

from gspn_jax.kernels import compat
from gspn_jax.kernels.terms import KINDS, LAM, Inputs
from gspn_jax.kernels.walk import Walk


class FromMemory(NamedTuple):
    """Terms of a walk's tiles."""

    inputs: Inputs
    walk: Walk

    def load(self, t: Array, position: object, kinds: Iterable[int]) -> dict[int, Array]:
        """Tiles of those of the kinds that there are, as they are in memory."""
        found = {}
        for kind in kinds:
            if kind < LAM:
                found[kind] = self.walk.load_weight(self.inputs.weights, t, position, kind)
            elif (ref := getattr(self.inputs, KINDS[kind])) is not None:
                index = self.walk.index(t, position, self.walk.k)
                found[kind] = compat.load(ref, index, self.walk.plan.layout)
        return found

    def term(self, loaded: dict[int, Array], kind: int) -> Float[Array, "P slab"] | Float[Array, "P"]:
        """One of them in float32; a number a position for a weight that channels share."""
        return self.walk.widened(loaded[kind])
