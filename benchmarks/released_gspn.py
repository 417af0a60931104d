"""GSPN as the authors' code has it, for comparison: a mixer that `benchmarks/mixers.py` adds to the table.

Two departures from the paper, read in the release and written anew: every scan is local, two lines long, whatever is
asked for; and the four results are summed without being turned back, while weights, which are of the image, meet the
turned map. The rest (the convolution, no activations, parameters and how they start) is our mixer's, so that these two
are what differs; its skip term D * x can be had by `model.skip`.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gspn_jax.kernels import line_scan, stochastic_weights
from gspn_jax.models.mixers import DIRECTIONS, NEIGHBOURS, GSPNMixer, GSPNOptions

CHUNK = 2


@dataclasses.dataclass(frozen=True)
class ReleasedOptions(GSPNOptions):
    """Options of `ReleasedMixer`, those of GSPN."""

    aligned = False

    def build(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> "ReleasedMixer":
        return ReleasedMixer(width, self, dtype=dtype, rngs=rngs)


def turned(x: Float[Array, "B H W C"], direction: int) -> Float[Array, "B N M C"]:
    """The map turned so that a scan down, up, right or left goes down."""
    return (x, x[:, ::-1], x.swapaxes(1, 2), x[:, :, ::-1].swapaxes(1, 2))[direction]


class ReleasedMixer(GSPNMixer):
    """`GSPNMixer` with the propagation of the release, of square maps."""

    def propagate(
        self, x: Float[Array, "B H W C"], proxy: Float[Array, "B H W d"], chunk: int | None
    ) -> Float[Array, "B H W C"]:
        """Raises ValueError for a map that is not square."""
        if x.shape[1] != x.shape[2]:
            raise ValueError(f"GSPN as released must have square maps, found {x.shape[1]}x{x.shape[2]}")
        gates, lam, out_gate = (self.gates(proxy), 1 + self.lam(proxy), 1 + self.out_gate(proxy))
        gates = gates.reshape(*x.shape[:3], DIRECTIONS, NEIGHBOURS, -1)
        merge, y = self.merge[...], jnp.zeros(x.shape, jnp.float32)
        for k in range(DIRECTIONS):
            weights = stochastic_weights(gates[:, :, :, k], direction="down")
            given = lam[:, :, :, k] * turned(x, k)
            h = line_scan(given, *weights, direction="down", chunk=CHUNK, backend=self.backend)
            y += merge[k] * (out_gate[:, :, :, k] * h).astype(jnp.float32)
            if self.skip is not None:
                y += merge[k] * (self.skip(proxy)[:, :, :, k] * turned(x, k)).astype(jnp.float32)
        return y.astype(x.dtype)
