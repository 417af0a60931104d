"""The plain scan is the float64 loop, and the fast one is the plain scan: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import line_scan, propagate, propagate_low_rank
from tests.kernels import numpy_scan as truth


def draw(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def propagate_arrays(height, width, channels, groups, merge=(4,), dtype=np.float32):
    pixels = 2, height, width
    terms = (*pixels, 4, channels)
    return draw((*pixels, channels), (*pixels, 4, 3, groups), terms, terms, merge, terms, dtype=dtype)


def by(backend, operator=propagate, **options):
    """operator(arrays) on a backend, the last array as `skip`."""
    return lambda *arrays: operator(*arrays[:-1], skip=arrays[-1], backend=backend, **options)


def value_and_gradients(function, arrays):
    cotangent = np.random.default_rng(1).normal(size=arrays[0].shape).astype(arrays[0].dtype)

    def run(*arrays):
        y, pull = jax.vjp(function, *arrays)
        return y, *pull(cotangent)

    return jax.jit(run)(*arrays), cotangent


def test_in_float64_it_is_the_loop_to_all_digits():
    arrays = propagate_arrays(4, 3, 4, 2, merge=(4, 4), dtype=np.float64)
    with jax.enable_x64(True):
        (y, *gradients), cotangent = value_and_gradients(by(None, chunk=2), arrays)  # the one that takes float64
    assert y.dtype == np.float64
    x, gates, *others = arrays
    spread = truth.spread(gates, 4)
    assert truth.relative_error(y, truth.propagate(x, spread, *others, chunk=2)) < 1e-14
    expected = list(truth.propagate_gradients(x, spread, *others, 2, cotangent))
    expected[1] = expected[1].reshape(*gates.shape, -1).sum(-1)
    for found, right in zip(gradients, expected, strict=True):
        assert truth.relative_error(found, right) < 1e-13


def test_float64_is_refused_by_the_scan_in_one_sentence():
    arrays = propagate_arrays(3, 3, 4, 4, dtype=np.float64)
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match=r"found 'scan', which computes in float32, not in float64; 'reference' runs"),
    ):
        propagate(*arrays[:5], backend="scan")


@pytest.mark.parametrize(
    ("direction", "groups", "chunk"), [("down", 4, None), ("up", 2, 2), ("right", 1, 3), ("left", 4, 2)]
)
def test_the_fast_scan_of_a_direction_is_the_plain_one(direction, groups, chunk):
    x, *weights = draw((2, 5, 4, 4), *[(2, 5, 4, groups)] * 3)
    arrays = x, *(0.4 * weight for weight in weights)

    def on(backend):
        return lambda *a: line_scan(*a, direction=direction, chunk=chunk, backend=backend)

    for found, right in zip(
        value_and_gradients(on("scan"), arrays)[0], value_and_gradients(on("reference"), arrays)[0], strict=True
    ):
        assert truth.relative_error(found, right) < 1e-6


@pytest.mark.parametrize(("groups", "chunk", "merge"), [(4, None, (4,)), (2, 3, (4, 4))])
def test_the_fast_propagation_is_the_plain_one(groups, chunk, merge):
    arrays = propagate_arrays(5, 4, 4, groups, merge)
    found, right = (value_and_gradients(by(backend, chunk=chunk), arrays)[0] for backend in ("scan", "reference"))
    for a, b in zip(found, right, strict=True):
        assert truth.relative_error(a, b) < 1e-6


def test_terms_of_low_rank_are_those_of_the_plain_one():
    factor = 3, 4, 4
    arrays = draw((2, 4, 4, 4), (2, 4, 4, 3), (3, 4, 3, 4), factor, factor, (4,), factor)
    options = {"operator": propagate_low_rank, "chunk": 2}
    found, right = (value_and_gradients(by(backend, **options), arrays)[0] for backend in ("scan", "reference"))
    for a, b in zip(found, right, strict=True):
        assert truth.relative_error(a, b) < 2e-6


def test_bfloat16_has_a_float32_state_in_both():
    x = jnp.ones((1, 512, 1, 1), jnp.bfloat16)
    for backend in ("scan", "reference"):
        h = line_scan(x, 0 * x, x, 0 * x, direction="down", backend=backend)
        assert h.dtype == jnp.bfloat16 and h[0, -1, 0, 0] == 512
