"""Terms of low rank: what the operator computes, and where XLA expands them. Kernels that do are tested beside it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import api, compat, propagate, propagate_low_rank
from tests.kernels import numpy_scan as truth
from tests.kernels.low_rank_cases import arguments


def test_what_it_computes():
    """On any backend: `propagate` of the products."""
    arrays = arguments(2, 3, 8, 4, groups=2, skip=True, dtype=jnp.float32)
    proxy = np.asarray(arrays["proxy"], np.float64)
    gates, lam, out_gate, skip = (
        jnp.asarray(np.tensordot(proxy, np.asarray(arrays[name], np.float64), 1), jnp.float32)
        for name in ("gates", "lam", "out_gate", "skip")
    )
    expected = propagate(arrays["x"], gates, 1 + lam, 1 + out_gate, arrays["merge"], skip=skip, chunk=2)
    assert truth.relative_error(propagate_low_rank(**arrays, chunk=2), expected) < 1e-6


@pytest.mark.parametrize(("dtype", "size", "rank", "reason"), [
    (jnp.float32, 16, 16, "takes bfloat16, not float32"),
    (jnp.bfloat16, 16, 2048, "has no room on chip for a proxy of 2048 and lines of 16 positions"),
    (jnp.bfloat16, 2048, 32, "has no room on chip for a proxy of 32 and lines of 2048 positions"),
])  # fmt: skip
def test_what_it_cannot_take_is_expanded_by_xla_with_a_line_that_says_why(dtype, size, rank, reason, caplog):
    api._log_expansion.cache_clear()
    shapes = jax.eval_shape(lambda: arguments(4, size, 64, rank, dtype=dtype))
    with compat.interpreted(), caplog.at_level(logging.INFO):
        jax.eval_shape(lambda a: propagate_low_rank(**a, backend="mosaic_gpu"), shapes)
    assert any("XLA expands the proxy" in line and reason in line for line in caplog.messages)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(("name", "shape", "message"), [
    ("proxy", (2, 3, 4, 4), r"proxy must have shape \[2, 3, 3, 'd'\], found \[2, 3, 4, 4\]"),
    ("gates", (4, 4, 3, 3), r"gates must have shape \[d, 4, 3, G\] with G a divisor of the 8 channels"),
    ("gates", (5, 4, 3, 8), r"gates must have shape \[4, 4, 3, 8\], found \[5, 4, 3, 8\]"),
    ("lam", (4, 4, 1), r"lam must have shape \[4, 4, 8\], found \[4, 4, 1\]"),
    ("merge", (3,), r"merge must have shape \[4\] or \[4, 8\], found \[3\]"),
])  # fmt: skip
def test_wrong_shapes_are_named(name, shape, message):
    arrays = arguments(2, 3, 8, 4) | {name: jnp.zeros(shape, jnp.bfloat16)}
    with pytest.raises(ValueError, match=message):
        propagate_low_rank(**arrays)
