"""Random operands of terms of low rank, and what the operator makes of them."""

import jax
import jax.numpy as jnp
import numpy as np

from gspn_jax.kernels import propagate_low_rank

NAMES = ("x", "proxy", "gates", "lam", "out_gate", "merge", "skip")


def arguments(batch, size, channels, rank, *, groups=None, skip=False, merge=(4,), dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (batch, size, size, channels),
        "proxy": (batch, size, size, rank),
        "gates": (rank, 4, 3, groups or channels),
        "lam": (rank, 4, channels),
        "out_gate": (rank, 4, channels),
    }
    if skip:
        shapes["skip"] = (rank, 4, channels)
    arrays = {
        name: jnp.asarray(rng.normal(size=shape) * (1 if shape[0] == batch else rank**-0.5), dtype)
        for name, shape in shapes.items()
    }
    return arrays | {"merge": jnp.asarray(rng.normal(size=merge), jnp.float32)}


def value_and_gradients(arrays, **options):
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=arrays["x"].shape), arrays["x"].dtype)

    def run(arrays):
        y, pull = jax.vjp(lambda arrays: propagate_low_rank(**arrays, **options), arrays)
        return {"y": y, **pull(cotangent)[0]}

    return jax.jit(run)(arrays)


def error(found, right):
    right = np.asarray(right, np.float64)
    return np.linalg.norm(np.asarray(found, np.float64) - right) / np.linalg.norm(right)
