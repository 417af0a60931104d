"""Four directions from logits, merged."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import api, available_backends, line_scan, propagate, stochastic_weights
from tests.kernels import numpy_scan as truth

TOLERANCE = 1e-5  # relative, float32
NAMES = ("x", "gates", "lam", "out_gate", "merge", "skip")


def inputs(height, width, channels, groups, merge=(4,), batch=2, seed=0):
    rng = np.random.default_rng(seed)
    pixels = (batch, height, width)
    shapes = ((channels,), (4, 3, groups), (4, channels), (4, channels))
    arrays = [rng.normal(size=pixels + shape) for shape in shapes]
    return *arrays, rng.normal(size=merge), rng.normal(size=(*pixels, 4, channels))


def cast(arrays, dtype=jnp.float32):
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def value_and_gradients(arrays, cotangent, *, chunk=None):
    def run(arrays):
        skip = arrays[5] if len(arrays) > 5 else None
        y, pull = jax.vjp(lambda *a: propagate(*a[:5], skip=a[5] if skip is not None else None, chunk=chunk), *arrays)
        return y, pull(jnp.asarray(cotangent, y.dtype))

    return jax.jit(run)(arrays)


def assert_matches_the_loop(arrays, found_value, found_gradients, cotangent, chunk, tolerance):
    skip = arrays[5] if len(arrays) > 5 else None
    assert truth.relative_error(found_value, truth.propagate(*arrays[:5], skip, chunk)) < tolerance
    expected = truth.propagate_gradients(*arrays[:5], skip, chunk, cotangent)
    for name, a, b in zip(NAMES[: len(arrays)], found_gradients, expected, strict=False):
        assert truth.relative_error(a, b) < tolerance, name


CASES = [
    # height, width, channels, groups, merge, skip, chunk
    (4, 4, 4, 4, (4,), False, None),
    (5, 3, 4, 2, (4, 4), True, None),
    (4, 6, 4, 1, (4,), False, 2),
    (5, 5, 3, 3, (4, 3), False, 2),
    (1, 5, 2, 2, (4,), True, None),
    (5, 1, 2, 1, (4,), False, 3),
    (1, 1, 2, 2, (4,), True, None),
]


@pytest.mark.parametrize(("height", "width", "channels", "groups", "merge", "skip", "chunk"), CASES)
def test_values_and_gradients_are_those_of_the_float64_loop(height, width, channels, groups, merge, skip, chunk):
    arrays = inputs(height, width, channels, groups, merge)[: 6 if skip else 5]
    cotangent = np.random.default_rng(9).normal(size=arrays[0].shape)
    y, gradients = value_and_gradients(cast(arrays), cotangent, chunk=chunk)
    assert_matches_the_loop(arrays, y, gradients, cotangent, chunk, TOLERANCE)


def test_the_gradients_of_the_float64_loop_are_its_finite_differences():
    arrays = list(inputs(3, 2, 2, 1, (4, 2), batch=1))
    cotangent = np.random.default_rng(9).normal(size=arrays[0].shape)
    gradients = truth.propagate_gradients(*arrays, 2, cotangent)
    rng, step = np.random.default_rng(3), 1e-5
    for n, gradient in enumerate(gradients):
        toward = rng.normal(size=arrays[n].shape)
        ends = [truth.propagate(*arrays[:n], arrays[n] + sign * step * toward, *arrays[n + 1 :], 2) for sign in (1, -1)]
        difference = ((ends[0] - ends[1]) * cotangent).sum() / (2 * step)
        assert abs(difference - (gradient * toward).sum()) < 1e-8 * (1 + abs(difference))


def test_chunks_side_by_side_give_the_same(monkeypatch):
    """What accelerators run: the chunks that divide the lines advance together."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    arrays = inputs(6, 4, 4, 2)
    cotangent = np.random.default_rng(9).normal(size=arrays[0].shape)
    y, gradients = value_and_gradients(cast(arrays), cotangent, chunk=2)
    assert_matches_the_loop(arrays, y, gradients, cotangent, 2, TOLERANCE)


@pytest.mark.parametrize("groups", [4, 1])
def test_bfloat16_inputs_round_once_at_the_end(groups):
    arrays = cast(inputs(6, 5, 4, groups), jnp.bfloat16)
    exact = [np.asarray(array, np.float64) for array in arrays]
    cotangent = np.asarray(jnp.asarray(np.random.default_rng(9).normal(size=exact[0].shape), jnp.bfloat16), np.float64)
    y, gradients = value_and_gradients(arrays, cotangent)
    assert [g.dtype for g in (y, *gradients)] == [jnp.bfloat16] * 7
    assert_matches_the_loop(exact, y, gradients, cotangent, None, 2**-8)


def test_it_is_four_line_scans_merged():
    x, gates, lam, out_gate, merge, _ = cast(inputs(4, 5, 4, 2))
    expected = jnp.zeros_like(x)
    for k, direction in enumerate(truth.DIRECTIONS):
        weights = stochastic_weights(gates[..., k, :, :], direction=direction)
        expected += merge[k] * out_gate[..., k, :] * line_scan(lam[..., k, :] * x, *weights, direction=direction)
    assert truth.relative_error(propagate(x, gates, lam, out_gate, merge), expected) < 2e-6


@pytest.mark.parametrize(
    ("turn", "directions", "mirrored"),
    [
        (lambda a: a[:, ::-1], (1, 0, 2, 3), (2, 3)),
        (lambda a: a[:, :, ::-1], (0, 1, 3, 2), (0, 1)),
        (lambda a: a.swapaxes(1, 2), (2, 3, 0, 1), ()),
    ],
)
def test_turning_the_image_permutes_the_directions(turn, directions, mirrored):
    """`mirrored`: directions whose lines are reversed, so that left and right change places."""
    x, gates, lam, out_gate, merge, _ = cast(inputs(4, 3, 2, 2))
    y = propagate(x, gates, lam, out_gate, merge)
    for k in mirrored:
        gates = gates.at[..., k, :, :].set(gates[..., k, ::-1, :])
    order = np.asarray(directions)
    turned = propagate(
        turn(x), turn(gates)[..., order, :, :], turn(lam)[..., order, :], turn(out_gate)[..., order, :], merge[order]
    )
    assert truth.relative_error(turned, turn(y)) < 1e-6


def test_every_output_pixel_depends_on_every_input_pixel():
    height, width = 5, 4
    pixels = height * width
    x = jnp.eye(pixels).reshape(pixels, height, width, 1)  # image n is lit at pixel n
    ones = jnp.ones((pixels, height, width, 4, 1))
    y = propagate(x, jnp.zeros((pixels, height, width, 4, 3, 1)), ones, ones, jnp.ones(4))
    assert (np.asarray(y) > 1e-4).all()
    down_only = propagate(x, jnp.zeros((pixels, height, width, 4, 3, 1)), ones, ones, jnp.eye(4)[0])
    assert not (np.asarray(down_only) > 0).all()


def test_enormous_logits_give_finite_values_and_gradients():
    arrays = list(cast(inputs(3, 3, 2, 2)))
    arrays[1] = jnp.sign(arrays[1]) * 1e4
    y, gradients = value_and_gradients(tuple(arrays[:5]), np.ones((2, 3, 3, 2)))
    assert all(np.isfinite(array).all() for array in (y, *gradients))


def test_it_compiles_to_one_loop_without_turned_copies():
    arrays = cast(inputs(6, 6, 4, 4)[:5])
    hlo = jax.jit(propagate).lower(*arrays).compile().as_text()
    assert len(re.findall(r" while\(", hlo)) == 1
    assert not re.findall(r" (reverse|transpose)\(", hlo)


def test_bfloat16_gates_are_never_widened_as_a_whole():
    arrays = cast(inputs(6, 5, 8, 8)[:5], jnp.bfloat16)

    def loss(*arrays):
        return propagate(*arrays).astype(jnp.float32).sum()

    for function in (propagate, jax.grad(loss, argnums=(0, 1, 2, 3, 4))):
        hlo = jax.jit(function).lower(*arrays).compile().as_text()
        assert "bf16[2,6,5,4,3,8]" in hlo
        assert "f32[2,6,5,4,3,8]" not in hlo.replace("bf16", "half")


def test_the_best_backend_is_picked_and_logged_once(caplog):
    arrays = cast(inputs(2, 2, 2, 1))
    api._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="gspn_jax.kernels.api"):
        propagate(*arrays[:5])
        propagate(*arrays[:5])
    assert [record.getMessage() for record in caplog.records] == [
        f"Line scans run on the {available_backends()[0]!r} backend. The 'mosaic_gpu' backend needs an NVIDIA GPU, "
        f"and this machine's device is 'cpu'."
    ]
    np.testing.assert_array_equal(propagate(*arrays[:5], backend="scan"), propagate(*arrays[:5]))


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": (4, 4, 6)}, r"x must have shape \[B, H, W, C\] with no empty axis, found \[4, 4, 6\]\."),
        ({"gates": (2, 4, 4, 12, 6)}, r"gates must have shape \[B, H, W, 4, 3, G\], found \[2, 4, 4, 12, 6\]\."),
        ({"gates": (2, 4, 4, 3, 4, 6)}, r"gates must have shape \[2, 4, 4, 4, 3, 6\], found \[2, 4, 4, 3, 4, 6\]\."),
        ({"gates": (2, 4, 4, 4, 3, 5)}, r"The group count of gates must divide the 6 channels of x, found 5\."),
        ({"lam": (2, 4, 4, 6)}, r"lam must have shape \[2, 4, 4, 4, 6\], found \[2, 4, 4, 6\]\."),
        ({"out_gate": (2, 4, 5, 4, 6)}, r"out_gate must have shape \[2, 4, 4, 4, 6\], found \[2, 4, 5, 4, 6\]\."),
        ({"skip": (2, 4, 4, 4, 1)}, r"skip must have shape \[2, 4, 4, 4, 6\], found \[2, 4, 4, 4, 1\]\."),
        ({"merge": (6,)}, r"merge must have shape \[4\] or \[4, 6\], found \[6\]\."),
        ({"chunk": -1}, r"chunk must be None or a whole number of lines from 1, found -1\."),
        ({"backend": "mosaic"}, r"backend must be None or one of 'mosaic_gpu', 'scan', 'reference', found 'mosaic'\."),
    ],
)
def test_wrong_arguments_get_one_sentence(change, sentence):
    shapes = {
        "x": (2, 4, 4, 6),
        "gates": (2, 4, 4, 4, 3, 6),
        "lam": (2, 4, 4, 4, 6),
        "out_gate": (2, 4, 4, 4, 6),
        "merge": (4,),
        "skip": (2, 4, 4, 4, 6),
    }
    arrays = {name: jnp.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    options = {k: v for k, v in change.items() if k in ("chunk", "backend")}
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        propagate(**arrays, **options)
