"""Depthwise convolution: both implementations against a float64 loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import depthwise_conv
from tests.kernels.numpy_depthwise import inputs, loop, squared_relu_loop
from tests.kernels.numpy_scan import relative_error


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """The CPU can run both: what it runs, and what other devices run."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)


@pytest.mark.parametrize(
    ("size", "kernel"),
    [((2, 5, 4, 3), (3, 3, 3)), ((1, 8, 9, 2), (7, 7, 2)), ((2, 2, 3, 1), (5, 7, 1)), ((1, 1, 1, 2), (1, 3, 2))],
)
@pytest.mark.usefixtures("platform")
def test_values_and_gradients_are_those_of_the_float64_loop(size, kernel):
    x, kernel, bias, cotangent = inputs(size, kernel)
    y, pull = jax.vjp(depthwise_conv, *(jnp.asarray(a, jnp.float32) for a in (x, kernel, bias)))
    found = y, *pull(jnp.asarray(cotangent, jnp.float32))
    for a, b in zip(found, loop(x, kernel, bias, cotangent), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.usefixtures("platform")
def test_squared_relu_comes_after_the_bias():
    arrays = inputs((2, 5, 4, 3), (3, 3, 3))
    x, kernel, bias, cotangent = (jnp.asarray(a, jnp.float32) for a in arrays)
    y, pull = jax.vjp(lambda *a: depthwise_conv(*a, squared_relu=True), x, kernel, bias)
    for a, b in zip((y, *pull(cotangent)), squared_relu_loop(*arrays), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.usefixtures("platform")
def test_bfloat16_sums_in_float32():
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in inputs((2, 8, 8, 2), (7, 7, 2))]
    expected = loop(*(np.asarray(a, np.float64) for a in arrays))
    y, pull = jax.vjp(depthwise_conv, *arrays[:3])
    for a, b in zip((y, *pull(arrays[3])), expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative_error(a, b) < 2**-8


def test_no_bias_is_a_bias_of_zero():
    x, kernel, bias, _ = (jnp.asarray(a, jnp.float32) for a in inputs((1, 4, 4, 2), (3, 3, 2)))
    np.testing.assert_array_equal(depthwise_conv(x, kernel), depthwise_conv(x, kernel, jnp.zeros_like(bias)))


def test_a_cpu_does_not_run_xlas_grouped_convolution():
    x, kernel, bias, _ = (jnp.asarray(a, jnp.float32) for a in inputs((1, 4, 4, 2), (3, 3, 2)))
    gradient = jax.grad(lambda *a: depthwise_conv(*a).sum(), argnums=(0, 1, 2))
    assert "convolution(" not in jax.jit(gradient).lower(x, kernel, bias).compile().as_text()


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (((4, 4, 2), (3, 3, 2), (2,)), r"x must have shape \[B, H, W, C\], found \[4, 4, 2\]\."),
        (
            ((1, 4, 4, 2), (3, 3, 1), (2,)),
            r"kernel must have shape \[kh, kw, 2\] with odd kh and kw, found \[3, 3, 1\]\.",
        ),
        (
            ((1, 4, 4, 2), (4, 3, 2), (2,)),
            r"kernel must have shape \[kh, kw, 2\] with odd kh and kw, found \[4, 3, 2\]\.",
        ),
        (((1, 4, 4, 2), (3, 3, 2), (1,)), r"bias must have shape \[2\], found \[1\]\."),
    ],
)
def test_wrong_arguments_get_one_sentence(shapes, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        depthwise_conv(*map(jnp.zeros, shapes))
