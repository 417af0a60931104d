"""One direction with ready weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import line_scan, stochastic_weights
from tests.kernels import numpy_scan as truth

DIRECTIONS = truth.DIRECTIONS
TOLERANCE = 1e-5  # relative, float32


def inputs(height, width, channels, groups, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(-0.5, 0.8, (3, batch, height, width, groups))
    return rng.normal(size=(batch, height, width, channels)), *weights


def in_float32(arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def weigh(height, width, direction, groups=1, batch=1, seed=1):
    """Row-stochastic weights from random logits."""
    gates = np.random.default_rng(seed).normal(size=(batch, height, width, 3, groups)) * 3
    return stochastic_weights(jnp.asarray(gates, jnp.float32), direction=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("height", "width", "channels", "groups", "chunk"),
    [(4, 5, 4, 4, None), (5, 3, 4, 2, 2), (1, 4, 3, 1, None), (4, 1, 2, 1, 3)],
)
def test_values_and_gradients_are_those_of_the_float64_loop(direction, height, width, channels, groups, chunk):
    arrays = inputs(height, width, channels, groups)
    cotangent = np.random.default_rng(5).normal(size=arrays[0].shape)

    def run(*arrays):
        h, pull = jax.vjp(lambda *a: line_scan(*a, direction=direction, chunk=chunk), *arrays)
        return h, pull(jnp.asarray(cotangent, jnp.float32))

    h, gradients = jax.jit(run)(*in_float32(arrays))
    assert truth.relative_error(h, truth.line_scan(*arrays, direction, chunk)) < TOLERANCE
    for found, expected in zip(gradients, truth.line_scan_gradients(*arrays, direction, chunk, cotangent), strict=True):
        assert truth.relative_error(found, expected) < TOLERANCE


def test_a_scan_is_one_lower_triangular_matrix_product():
    lines, length = 5, 4
    x, left, center, right = inputs(lines, length, 1, 1, batch=1)
    matrix = np.zeros((lines * length,) * 2)
    blocks = matrix.reshape(lines, length, lines, length).swapaxes(1, 2)  # a view: [line out, line in, i out, i in]
    for t in range(lines):
        blocks[t, t] = np.eye(length)
        tridiagonal = np.diag(center[0, t, :, 0]) + np.diag(left[0, t, 1:, 0], -1) + np.diag(right[0, t, :-1, 0], 1)
        for earlier in range(t):
            blocks[t, earlier] = tridiagonal @ blocks[t - 1, earlier]
    assert np.array_equal(matrix, np.tril(matrix))

    h, pull = jax.vjp(lambda x: line_scan(x, *in_float32((left, center, right)), direction="down"), *in_float32((x,)))
    assert truth.relative_error(h.ravel(), matrix @ x.ravel()) < TOLERANCE
    assert truth.relative_error(pull(jnp.asarray(x, jnp.float32))[0].ravel(), matrix.T @ x.ravel()) < TOLERANCE


@pytest.mark.parametrize(
    ("direction", "turn"),
    [
        ("up", lambda a: a[:, ::-1]),
        ("right", lambda a: a.swapaxes(1, 2)),
        ("left", lambda a: a[:, ::-1].swapaxes(1, 2)),
    ],
)
def test_turning_the_map_turns_the_direction(direction, turn):
    arrays = in_float32(inputs(5, 3, 2, 2))
    down = line_scan(*arrays, direction="down")
    turned = line_scan(*map(turn, arrays), direction=direction)
    assert truth.relative_error(turned, turn(down)) < 1e-6


def test_mirroring_a_line_swaps_left_and_right():
    x, left, center, right = in_float32(inputs(5, 4, 2, 1))
    mirrored = line_scan(*(a[:, :, ::-1] for a in (x, right, center, left)), direction="down")
    assert truth.relative_error(mirrored, line_scan(x, left, center, right, direction="down")[:, :, ::-1]) < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_line_of_ones_stays_one_under_row_stochastic_weights(direction):
    height, width = 40, 40
    row, column = (
        np.asarray(a) for a in zip(*(truth.pixel(direction, 0, i, height, width) for i in range(40)), strict=True)
    )
    x = jnp.zeros((1, height, width, 1)).at[:, row, column].set(1.0)
    h = line_scan(x, *weigh(height, width, direction), direction=direction)
    assert np.abs(np.asarray(h) - 1.0).max() < 1e-5


def test_4096_lines_stay_bounded_and_keep_their_mean():
    first = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 7, 2)), jnp.float32)
    x = jnp.zeros((1, 4096, 7, 2)).at[:, :1].set(first)
    weights = weigh(4096, 7, "down", groups=2)
    h, pull = jax.vjp(lambda x: line_scan(x, *weights, direction="down"), x)
    assert np.abs(h).max() <= np.abs(first).max() * (1 + 1e-3)
    assert np.abs(h[:, -1]).max() > 1e-2  # it has not forgotten either
    (by_x,) = pull(jnp.zeros_like(x).at[:, -1].set(1.0))
    assert np.abs(by_x.sum(2) - 7.0).max() < 7e-3  # a column-wise sum of stochastic products: the mass of a line


def test_weights_that_point_outside_the_map_have_no_effect():
    x, left, center, right = in_float32(inputs(4, 5, 2, 2))
    outside = left.at[:, :, 0].set(1e6), center, right.at[:, :, -1].set(-1e6)
    expected, pull = jax.vjp(lambda *w: line_scan(x, *w, direction="up"), left, center, right)
    found, pull_outside = jax.vjp(lambda *w: line_scan(x, *w, direction="up"), *outside)
    np.testing.assert_array_equal(found, expected)
    for a, b in zip(pull(expected), pull_outside(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not pull_outside(expected)[0][:, :, 0].any() and not pull_outside(expected)[2][:, :, -1].any()


@pytest.mark.parametrize("direction", ["down", "up"])
def test_chunks_are_scans_of_their_own_counted_from_where_the_scan_starts(direction):
    arrays = in_float32(inputs(7, 3, 2, 1))
    pieces = [(0, 3), (3, 6), (6, 7)] if direction == "down" else [(0, 1), (1, 4), (4, 7)]
    separate = [line_scan(*(a[:, start:stop] for a in arrays), direction=direction) for start, stop in pieces]
    found = line_scan(*arrays, direction=direction, chunk=3)
    assert truth.relative_error(found, np.concatenate(separate, axis=1)) < 1e-6


def test_a_chunk_of_all_lines_is_global():
    arrays = in_float32(inputs(4, 3, 2, 2))
    for chunk in (4, 9):
        np.testing.assert_array_equal(
            line_scan(*arrays, direction="down", chunk=chunk), line_scan(*arrays, direction="down")
        )


def test_groups_share_the_weights_of_consecutive_channels():
    x, *weights = in_float32(inputs(4, 4, 6, 2))
    per_channel = [jnp.repeat(weight, 3, axis=-1) for weight in weights]
    np.testing.assert_allclose(
        line_scan(x, *weights, direction="left"), line_scan(x, *per_channel, direction="left"), rtol=1e-6, atol=1e-6
    )


def test_bfloat16_keeps_a_float32_state():
    x = jnp.ones((1, 512, 1, 1), jnp.bfloat16)
    h = line_scan(x, 0 * x, x, 0 * x, direction="down")
    assert h.dtype == jnp.bfloat16
    assert h[0, -1, 0, 0] == 512  # a bfloat16 sum of ones stops at 256


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": (2, 4, 4)}, r"x must have shape \[B, H, W, C\] with no empty axis, found \[2, 4, 4\]\."),
        ({"x": (2, 0, 4, 6)}, r"x must have shape .* found \[2, 0, 4, 6\]\."),
        ({"left": (2, 4, 4, 3)}, r"left must have shape \[2, 4, 4, 2\], found \[2, 4, 4, 3\]\."),
        ({"center": (2, 4, 4)}, r"center must have shape \[B, H, W, G\], found \[2, 4, 4\]\."),
        ({"center": (2, 4, 4, 4)}, r"The group count of center must divide the 6 channels of x, found 4\."),
        ({"right": (1, 4, 4, 2)}, r"right must have shape \[2, 4, 4, 2\], found \[1, 4, 4, 2\]\."),
        ({"direction": "north"}, r"direction must be one of 'down', 'up', 'right', 'left', found 'north'\."),
        ({"chunk": 0}, r"chunk must be None or a whole number of lines from 1, found 0\."),
        ({"chunk": 2.0}, r"chunk must be None or a whole number of lines from 1, found 2\.0\."),
        ({"backend": "cuda"}, r"backend must be None or one of 'mosaic_gpu', 'scan', 'reference', found 'cuda'\."),
        ({"dtype": jnp.int32}, r"x must be float64, float32, bfloat16 or float16, found int32\."),
    ],
)
def test_wrong_arguments_get_one_sentence(change, sentence):
    shapes = {"x": (2, 4, 4, 6), "left": (2, 4, 4, 2), "center": (2, 4, 4, 2), "right": (2, 4, 4, 2)}
    arrays = {
        name: jnp.zeros(change.get(name, shape), change.get("dtype", jnp.float32)) for name, shape in shapes.items()
    }
    options = {"direction": "down", **{k: v for k, v in change.items() if k in ("direction", "chunk", "backend")}}
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        line_scan(**arrays, **options)
