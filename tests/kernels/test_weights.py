"""Logits to row-stochastic weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import stochastic_weights
from tests.kernels import numpy_scan as truth


def logits(height=4, width=5, groups=2):
    return np.random.default_rng(0).normal(size=(2, height, width, 3, groups)) * 2


@pytest.mark.parametrize("direction", truth.DIRECTIONS)
def test_sigmoids_divided_by_the_sum_over_the_neighbours_that_exist(direction):
    gates = logits()
    expected, jacobian = truth.stochastic_weights(gates, direction)
    cotangents = np.random.default_rng(1).normal(size=expected.shape)
    found, pull = jax.vjp(lambda g: stochastic_weights(g, direction=direction), jnp.asarray(gates, jnp.float32))
    assert truth.relative_error(jnp.stack(found), expected) < 1e-6
    assert truth.relative_error(sum(found), np.ones(expected.shape[1:])) < 1e-6
    (by_gates,) = pull(tuple(jnp.asarray(cotangents, jnp.float32)))
    assert truth.relative_error(by_gates, np.einsum("j...g,ji...g->...ig", cotangents, jacobian)) < 1e-5


def test_no_weight_points_outside_the_map():
    left, _, right = stochastic_weights(jnp.asarray(logits(), jnp.float32), direction="down")
    assert not left[:, :, 0].any() and not right[:, :, -1].any() and left[:, :, 1:].all() and right[:, :, :-1].all()
    left, _, right = stochastic_weights(jnp.asarray(logits(), jnp.float32), direction="left")
    assert not left[:, 0].any() and not right[:, -1].any() and left[:, 1:].all() and right[:, :-1].all()


def test_a_line_of_one_pixel_has_only_its_center():
    left, center, right = stochastic_weights(jnp.asarray(logits(width=1), jnp.float32), direction="down")
    assert not left.any() and not right.any()
    np.testing.assert_allclose(center, 1.0, rtol=1e-6)


@pytest.mark.parametrize("value", [-1e4, -100.0, 1e4])
def test_enormous_logits_stay_row_stochastic_with_finite_gradients(value):
    gates = jnp.full((1, 3, 3, 3, 1), value)
    weights, pull = jax.vjp(lambda g: stochastic_weights(g, direction="right"), gates)
    np.testing.assert_allclose(sum(weights), 1.0, rtol=1e-6)
    assert np.isfinite(pull(weights)[0]).all()


def test_bfloat16_logits_give_bfloat16_weights():
    gates = jnp.asarray(logits(), jnp.bfloat16)
    weights = stochastic_weights(gates, direction="up")
    exact = truth.stochastic_weights(np.asarray(gates, np.float64), "up")[0]
    assert all(weight.dtype == jnp.bfloat16 for weight in weights)
    assert truth.relative_error(jnp.stack(weights), exact) < 2**-8


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("shape", "direction", "sentence"),
    [
        ((2, 4, 4, 3), "down", r"gates must have shape \[B, H, W, 3, G\], found \[2, 4, 4, 3\]\."),
        ((2, 4, 4, 4, 3), "down", r"gates must have shape \[B, H, W, 3, G\], found \[2, 4, 4, 4, 3\]\."),
        ((2, 4, 4, 3, 1), "south", r"direction must be one of 'down', 'up', 'right', 'left', found 'south'\."),
    ],
)
def test_wrong_arguments_get_one_sentence(shape, direction, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        stochastic_weights(jnp.zeros(shape), direction=direction)
