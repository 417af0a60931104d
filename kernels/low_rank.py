"""Terms of low rank from a proxy, by XLA."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gspn_jax.kernels import reference
from gspn_jax.kernels.terms import LAM, OUT_GATE, SKIP, Job


def expand(
    proxy: Float[Array, "B H W d"],
    gates: Float[Array, "d 4 3 G"],
    lam: Float[Array, "d 4 C"],
    out_gate: Float[Array, "d 4 C"],
    skip: Float[Array, "d 4 C"] | None,
) -> tuple[Array, Array, Array, Array | None]:
    """(gates, lam, out_gate, skip) of each pixel, in the type of `proxy`."""
    gates, lam, out_gate = (jnp.tensordot(proxy, factor.astype(proxy.dtype), 1) for factor in (gates, lam, out_gate))
    return gates, 1 + lam, 1 + out_gate, None if skip is None else jnp.tensordot(proxy, skip.astype(proxy.dtype), 1)


def expand_at_once(
    proxy: Float[Array, "B H W d"],
    gates: Float[Array, "d 4 3 G"],
    lam: Float[Array, "d 4 C"],
    out_gate: Float[Array, "d 4 C"],
    skip: Float[Array, "d 4 C"] | None,
) -> tuple[Array, Array, Array, Array | None]:
    """`expand`, rounded once less: a column of ones beside the proxy adds 1 to lam and out_gate within their products,
    for what is a kernel of its own on GPUs otherwise, and reads and writes 32 bytes an element of x in bfloat16.

    The proxy is made as wide as a multiple of 8, whose rows cuBLAS reads as they are.
    """
    more = 8 - proxy.shape[-1] % 8
    wider = jnp.pad(proxy, (*((0, 0),) * 3, (0, more)), constant_values=1)

    def product(factor: Array, plus: int) -> Array:
        rest = ((0, 0),) * (factor.ndim - 1)
        factor = jnp.pad(factor.astype(proxy.dtype), ((0, 1), *rest), constant_values=plus)
        return jnp.tensordot(wider, jnp.pad(factor, ((0, more - 1), *rest)), 1)

    return product(gates, 0), product(lam, 1), product(out_gate, 1), None if skip is None else product(skip, 0)


def expand_all(job: Job, proxy: Float[Array, "B H W d"], up: Float[Array, "4 N C d"]) -> tuple[Array | None, ...]:
    """Terms as `Inputs` has them: weights, lam, out_gate, skip."""
    factors = up.transpose(3, 0, 1, 2)
    lam, out_gate, *skip = (factors[:, :, kind] for kind in range(LAM, job.kinds))
    return expand_at_once(proxy, factors[:, :, :LAM], lam, out_gate, skip[0] if job.skip else None)


def by_slab(
    up: Float[Array, "K N C d"], order: Int[np.ndarray, "slab"], dtype: Any
) -> Float[Array, "K slabs N slab d"]:
    """Factors by slab of channels, in `order` within each; the last slab overlaps the one before it where slabs do not
    divide the channels."""
    channels, slab = up.shape[2], len(order)
    starts = jnp.minimum(jnp.arange(math.ceil(channels / slab)) * slab, channels - slab)
    return up.astype(dtype)[:, :, starts[:, None] + order].swapaxes(1, 2)


def plain(job: Job, arrays: tuple[Array, ...]) -> Float[Array, "B H W C"]:
    """The operator by `reference`, from x, proxy, up [4, N, C, d] and merge [4, C]; the terms are float32."""
    x, proxy, up, merge = arrays
    up = up.astype(x.dtype).astype(jnp.float32)
    terms = jnp.einsum("bhwd,kncd->nbhwkc", proxy.astype(jnp.float32), up)
    gates, skip = jnp.moveaxis(terms[:LAM], 0, 4), terms[SKIP] if job.skip else None
    return reference.propagate(x, gates, 1 + terms[LAM], 1 + terms[OUT_GATE], merge, skip, job.chunk)
