"""Forward mode, and derivatives of derivatives, beside the reverse mode that has programs of its own.

The truth of a tangent is a central difference of the float64 loops; a forward and a reverse mode that agree give
<v, J u> = <J^T v, u>.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import depthwise_conv, depthwise_gpu, line_scan, mosaic_gpu, propagate, propagate_low_rank
from gspn_jax.kernels.derivatives import linear_call
from tests.kernels import numpy_depthwise
from tests.kernels import numpy_scan as truth
from tests.kernels.mosaic import interpreted

STEP = 1e-5


def draw(*shapes, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return tuple(np.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def low_rank_truth(x, proxy, gates, lam, out_gate, merge):
    gates, lam, out_gate = (np.tensordot(proxy, factor, 1) for factor in (gates, lam, out_gate))
    return truth.propagate(x, gates, 1 + lam, 1 + out_gate, merge, chunk=2)


PIXELS, TERMS = (2, 4, 3), (2, 4, 3, 4, 2)
OPERATORS = {
    "line_scan": (
        functools.partial(line_scan, direction="left", chunk=2),
        lambda *arrays: truth.line_scan(*arrays, "left", 2),
        [(*PIXELS, 4), *[(*PIXELS, 2)] * 3],
    ),
    "propagate": (
        functools.partial(propagate, chunk=3),
        functools.partial(truth.propagate, chunk=3),
        [(*PIXELS, 2), (*PIXELS, 4, 3, 2), TERMS, TERMS, (4, 2)],
    ),
    "propagate_low_rank": (
        functools.partial(propagate_low_rank, chunk=2),
        low_rank_truth,
        [(*PIXELS, 2), (*PIXELS, 3), (3, 4, 3, 2), (3, 4, 2), (3, 4, 2), (4,)],
    ),
    "depthwise_conv": (
        functools.partial(depthwise_conv, squared_relu=True),
        lambda x, kernel: numpy_depthwise.squared_relu_loop(x, kernel, 0, np.zeros_like(x))[0],
        [(*PIXELS, 4), (3, 5, 4)],
    ),
}


def difference(function, arrays, dots):
    """The derivative of a float64 function in the direction `dots`."""
    ahead, behind = (
        function(*(a + sign * STEP * dot for a, dot in zip(arrays, dots, strict=True))) for sign in (1, -1)
    )
    return (ahead - behind) / (2 * STEP)


def in_float32(arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def assert_dual(function, arrays, dots, tangent, tolerance=1e-5):
    """<v, J u> = <J^T v, u>, relative to the norms."""
    v = jnp.asarray(np.random.default_rng(2).normal(size=tangent.shape), tangent.dtype)
    pulled = jax.jit(lambda *arrays: jax.vjp(function, *arrays)[1](v))(*arrays)

    def inner(pairs):
        pairs = [[np.asarray(a, np.float64).ravel() for a in pair] for pair in pairs]
        return sum(a @ b for a, b in pairs), sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs)

    forward, scale = inner([(v, tangent)])
    assert abs(forward - inner(zip(pulled, dots, strict=True))[0]) < tolerance * scale


@pytest.mark.parametrize("name", OPERATORS)
def test_tangents_are_central_differences_of_the_float64_loop_and_fit_the_gradients(name):
    function, loop, shapes = OPERATORS[name]
    arrays, dots = draw(*shapes), draw(*shapes, seed=1)
    expected = difference(loop, arrays, dots)
    arrays, dots = in_float32(arrays), in_float32(dots)
    y, tangent = jax.jit(lambda arrays, dots: jax.jvp(function, arrays, dots))(arrays, dots)
    assert truth.relative_error(y, loop(*(np.asarray(a, np.float64) for a in arrays))) < 1e-5
    assert truth.relative_error(tangent, expected) < 1e-5
    assert_dual(function, arrays, dots, tangent)


def test_jacfwd_linearize_and_a_tangent_of_one_argument_agree():
    function, _, shapes = OPERATORS["line_scan"]
    (x, left, center, right), (_, dot, *_) = (in_float32(draw(*shapes, seed=seed)) for seed in (0, 1))

    def of_left(left):
        return function(x, left, center, right).sum((1, 2))

    forward, reverse = jax.jit(jax.jacfwd(of_left))(left), jax.jit(jax.jacrev(of_left))(left)
    assert truth.relative_error(forward, reverse) < 1e-5
    _, linear = jax.linearize(of_left, left)
    _, tangent = jax.jit(lambda left, dot: jax.jvp(of_left, (left,), (dot,)))(left, dot)
    assert truth.relative_error(jax.jit(linear)(dot), tangent) < 1e-6
    assert truth.relative_error(jnp.einsum("bcijkl,ijkl->bc", reverse, dot), tangent) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives_of_derivatives_are_those_of_the_plain_scan(dtype):
    """Reverse over forward (MeanFlow), and forward over reverse (a product with the Hessian)."""
    shapes = OPERATORS["line_scan"][2]
    arrays, dots = (tuple(jnp.asarray(a, dtype) for a in draw(*shapes, seed=seed)) for seed in (0, 1))

    def second(backend):
        function = functools.partial(line_scan, direction="left", chunk=3, backend=backend)

        def loss(arrays):
            y, tangent = jax.jvp(function, arrays, dots)
            return (y * tangent).astype(jnp.float32).sum()

        def gradient(arrays):
            return jax.grad(lambda arrays: jnp.square(function(*arrays).astype(jnp.float32)).sum())(arrays)

        return jax.jit(lambda arrays: (jax.grad(loss)(arrays), jax.jvp(gradient, (arrays,), (dots,))[1]))(arrays)

    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for found, right in zip(*map(jax.tree.leaves, (second("scan"), second("reference"))), strict=True):
        assert truth.relative_error(found, right) < tolerance


def test_vmap_over_tangents_gradients_and_both():
    shapes = OPERATORS["line_scan"][2]
    function = functools.partial(line_scan, direction="up", chunk=3)
    many, dots = (in_float32(draw(*((3, *shape) for shape in shapes), seed=seed)) for seed in (0, 1))

    @jax.jit
    def tangent(arrays, dots):
        return jax.jvp(function, arrays, dots)[1]

    @jax.jit
    def gradient(arrays):
        return jax.grad(lambda arrays: (function(*arrays) ** 2).sum())(arrays)

    one = [tuple(a[n] for a in many) for n in range(3)]
    dot = [tuple(a[n] for a in dots) for n in range(3)]
    together = jax.jit(jax.vmap(tangent))(many, dots)
    same_residuals = jax.jit(jax.vmap(functools.partial(tangent, one[0])))(dots)
    gradients = jax.jit(jax.vmap(gradient))(many)
    for n in range(3):
        assert truth.relative_error(together[n], tangent(one[n], dot[n])) < 1e-5
        assert truth.relative_error(same_residuals[n], tangent(one[0], dot[n])) < 1e-5
        for found, right in zip(gradients, gradient(one[n]), strict=True):
            assert truth.relative_error(found[n], right) < 1e-5


def test_a_linear_call_has_the_transpose_that_it_was_given_also_with_integers_and_known_operands():
    def put(place, operands):
        kept, x = operands
        return kept.at[place].set(x)

    def take(place, cotangent):
        return 10 * cotangent, 10 * cotangent[place]  # not the transpose, to be seen

    def function(kept, x, place=1):
        return linear_call(put, take, place, (kept, x))

    kept, x = jnp.arange(3.0), jnp.float32(7.0)
    np.testing.assert_array_equal(function(kept, x), [0, 7, 2])
    np.testing.assert_array_equal(jax.jvp(function, (kept, x), (kept, x))[1], [0, 7, 2])
    weights = jnp.asarray([1.0, 2.0, 3.0])
    assert jax.grad(lambda x: function(kept, x) @ weights)(x) == 20
    assert jax.jit(jax.grad(lambda x: function(kept, x) @ weights))(x) == 20
    places = jax.vmap(lambda place: function(kept, x, place))(jnp.arange(3))
    np.testing.assert_array_equal(places, [[7, 1, 2], [0, 7, 2], [0, 1, 7]])


# The GPU kernels, interpreted: their tangents are the plain scan's, their gradients their own.


def assert_tangents_are_those_of_the_scan(kernel, right, arrays, tolerance, *, dual=True):
    dots = tuple(
        jnp.asarray(dot, a.dtype) for a, dot in zip(arrays, draw(*(a.shape for a in arrays), seed=1), strict=True)
    )
    expected = jax.jit(lambda a, d: jax.jvp(right, a, d))(arrays, dots)
    with interpreted(detect_races=False):
        found = jax.block_until_ready(jax.jit(lambda a, d: jax.jvp(kernel, a, d))(arrays, dots))
        if dual:
            assert_dual(kernel, arrays, dots, found[1], tolerance)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and truth.relative_error(a, b) < tolerance


@pytest.mark.parametrize("dual", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tangents_of_the_kernel(dual):
    """3 rows are filled up to 4, which has no part in a tangent."""
    pixels, terms = (1, 3, 4), (1, 3, 4, 4, 64)
    arrays = in_float32(draw((*pixels, 64), (*pixels, 4, 3, 64), terms, terms, (4,)))
    on = functools.partial(functools.partial, propagate, chunk=2)
    assert_tangents_are_those_of_the_scan(on(backend="mosaic_gpu"), on(backend="scan"), arrays, 1e-5, dual=dual)


@pytest.mark.slow
def test_tangents_of_the_kernel_of_one_direction():
    arrays = in_float32(draw((1, 4, 4, 64), *[(1, 4, 4, 1)] * 3))
    on = functools.partial(functools.partial, line_scan, direction="left")
    assert_tangents_are_those_of_the_scan(on(backend="mosaic_gpu"), on(backend="scan"), arrays, 1e-5)


LOW_RANK = [(2, 4, 4, 64), (2, 4, 4, 3), (3, 4, 3, 64), (3, 4, 64), (3, 4, 64), (4,)]


@pytest.mark.slow
def test_tangents_of_the_kernel_that_expands_a_proxy():
    arrays = tuple(jnp.asarray(a, jnp.bfloat16) for a in draw(*LOW_RANK))
    on = functools.partial(functools.partial, propagate_low_rank)
    assert_tangents_are_those_of_the_scan(on(backend="mosaic_gpu"), on(backend="scan"), arrays, 3e-2)


@pytest.mark.slow
def test_tangents_of_the_kernel_of_chunk_2():
    shapes = [(1, 16, 16, 16), (1, 16, 16, 3), (3, 4, 3, 16), (3, 4, 16), (3, 4, 16), (4,)]
    arrays = tuple(jnp.asarray(a, jnp.bfloat16) for a in draw(*shapes))
    kernel = lambda *a: mosaic_gpu.propagate_low_rank(*a, None, 2)  # noqa: E731
    scan = functools.partial(propagate_low_rank, chunk=2, backend="scan")
    assert_tangents_are_those_of_the_scan(kernel, scan, arrays, 3e-2)


def test_tangents_of_the_depthwise_kernel():
    arrays = in_float32(draw((1, 4, 4, 128), (3, 3, 128)))
    kernel = functools.partial(depthwise_gpu.correlate, squared_relu=True)
    scan = functools.partial(depthwise_conv, squared_relu=True)
    assert_tangents_are_those_of_the_scan(kernel, scan, arrays, 1e-5)
