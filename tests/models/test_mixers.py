"""The mixers of the table beside float64 loops: values, forward and reverse mode, parameters, options, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax import models
from gspn_jax.config import ConfigError, MeshConfig, ModelConfig
from gspn_jax.models.recurrence import PIECE, gated_products, in_four_orders, of_four_orders
from gspn_jax.tables import MIXERS
from tests.models import numpy_mixers
from tests.models.mesh_gradients import gradient_on
from tests.models.model_cases import BFLOAT16, DIT, make_config, random_inputs, random_params, relative_error, run
from tests.models.traced import traced_products

WIDTH = 16
STEP = 1e-5


def model(mixer: str, *options: str, **fields) -> ModelConfig:
    return dataclasses.replace(DIT, mixer=mixer, mixer_options=options, proxy_ratio=4, **{"heads": 4} | fields)


CASES = {
    "convolution": (model("convolution", "kernel=5"), numpy_mixers.convolution),
    "linear attention": (model("linear_attention"), functools.partial(numpy_mixers.linear_attention, heads=4)),
    "gated linear attention": (
        model("gated_linear_attention"),
        functools.partial(numpy_mixers.gated_linear_attention, heads=4),
    ),
    "compressed": (model("compressed_gspn"), functools.partial(numpy_mixers.compressed_gspn, chunk=None)),
    "compressed, shared weights, skip, local": (
        model("compressed_gspn", "compression=2", groups=1, skip=True),
        functools.partial(numpy_mixers.compressed_gspn, chunk=2),
    ),
    "wider": (model("gspn", "expansion=1.5", groups=3), functools.partial(numpy_mixers.gspn, chunk=2)),
}


def built(case: str):
    """(function of parameters and a batch, parameters, the same of one map in float64)."""
    settings, truth = CASES[case]
    options = MIXERS[settings.mixer].of(settings)
    graphdef, state = nnx.split(options.build(WIDTH, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(leaf):
        inputs = np.prod(leaf.shape[:-1]) if leaf.ndim < 4 else leaf.shape[0]
        return (0.3 + (inputs**-0.5 if leaf.ndim > 1 else 0.3) * rng.standard_normal(leaf.shape)).astype(np.float32)

    params = jax.tree.map(draw, nnx.to_pure_dict(state))
    chunk = truth.keywords.get("chunk") if isinstance(truth, functools.partial) else None
    return (lambda params, x: nnx.merge(graphdef, params)(x, chunk=chunk)), params, truth


@pytest.mark.parametrize("case", CASES)
def test_values_and_both_modes_are_those_of_float64_loops(case):
    """To 1e-5 of the largest value, on a map that is not square and has more tokens than a piece of the recurrence; the
    tangent is the loops' central difference to 1e-4, and reverse mode agrees with it."""
    function, params, truth = built(case)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 6, 11, WIDTH)).astype(np.float32)
    assert x[0, ..., 0].size > PIECE
    dots = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), (params, x))

    def loops(sign):
        moved, moved_x = jax.tree.map(lambda a, dot: np.float64(a) + sign * STEP * dot, (params, x), dots)
        return truth(moved, moved_x[0])[None]

    @jax.jit
    def both(params, x, dots, v):
        y, tangent = jax.jvp(function, (params, x), dots)
        return y, tangent, jax.vjp(function, params, x)[1](v)

    v = rng.standard_normal(x.shape).astype(np.float32)
    y, tangent, pulled = both(params, x, dots, v)
    assert relative_error(y, loops(0)) < 1e-5
    assert relative_error(tangent, (loops(1) - loops(-1)) / (2 * STEP)) < 1e-4
    forward = np.vdot(v, np.asarray(tangent, np.float64))
    backward = sum(
        np.vdot(a, np.asarray(b, np.float64)) for a, b in zip(*map(jax.tree.leaves, (dots, pulled)), strict=True)
    )
    assert forward == pytest.approx(backward, rel=1e-4)


def test_states_fade_for_ever_and_nothing_overflows():
    """Decays of e^-40 a token over two pieces: each token is left with its own product; and none where all stay."""
    q, k, v = (jnp.ones((1, PIECE + 3, 1, 2)) for _ in range(3))
    found = jax.jit(gated_products)(q, k, v, jnp.full((1, PIECE + 3, 1), -40.0))
    np.testing.assert_allclose(found, np.full(found.shape, 2.0), rtol=1e-6)
    summed = jax.jit(gated_products)(q, k, v, jnp.zeros((1, PIECE + 3, 1)))
    np.testing.assert_allclose(summed[0, :, 0, 0], 2.0 * np.arange(1, PIECE + 4), rtol=1e-6)


def test_four_orders_are_undone():
    a = np.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4)
    orders = np.asarray(in_four_orders(a))
    np.testing.assert_array_equal(orders[0, :4, 2], a[0, [0, 1, 2, 0], [0, 0, 0, 1], 2])  # down a column
    np.testing.assert_array_equal(of_four_orders(orders, 3, 5), a)


ADDED = ("convolution", "linear_attention", "gated_linear_attention", "compressed_gspn")


@pytest.mark.parametrize("preset", ["DiT-B/2", "DiT-XL/2"])
def test_as_they_are_set_they_have_the_parameters_of_attention(preset):
    """Within 2 %."""

    def count(mixer):
        return models.count_parameters(make_config(ModelConfig(preset=preset, mixer=mixer), channels=4, image_size=32))

    wanted = count("attention")
    for mixer in ADDED:
        assert count(mixer) == pytest.approx(wanted, rel=0.02), mixer


@pytest.mark.parametrize("mixer", ADDED)
def test_products_are_those_of_the_traced_program(mixer):
    """Exactly, once convolutions and scans, which are not products, are taken off by hand."""
    config = make_config(model(mixer))
    arch = models.resolve(config.model)
    graphdef, params = models.abstract(config)
    jaxpr = jax.make_jaxpr(lambda p, *args: models.apply(graphdef, p, *args))(params, *random_inputs(1, 8, 12)).jaxpr
    # 16 and 24 channels are 1.25 and 1.3 times 16, in eights
    pointwise = {"convolution": 2 * 9 * 16, "compressed_gspn": 2 * 49 * 24 + 4 * 10 * 8}.get(mixer, 0)
    counted = models.forward_flops(arch, 3, 8, 12) - arch.blocks * 4 * 6 * pointwise
    assert counted == pytest.approx(traced_products(jaxpr), rel=1e-9)


@pytest.mark.parametrize("mixer", ADDED)
def test_bfloat16_stays_close_to_float32(mixer):
    settings, inputs = model(mixer), random_inputs(2, 8, 8)
    config, low = make_config(settings), make_config(settings, precision=BFLOAT16)
    params = random_params(config)
    found, wanted = run(low, params, *inputs), run(config, params, *inputs)
    assert 0 < np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["flow", "mean_flow"])
@pytest.mark.parametrize("mixer", ADDED)
def test_over_a_mesh_gradients_are_those_of_one_device(mixer, objective):
    """Mean flow takes forward mode and reverse mode through blocks whose weights are gathered."""
    config = make_config(model(mixer, hidden=40), channels=1, objective=objective)
    params = random_params(config)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8), "label": np.arange(8) % 5}
    batch["label"] = batch["label"].astype(np.int32)
    loss, gradients = gradient_on(MeshConfig(1, 1, 1), config, params, batch)
    found, others = gradient_on(MeshConfig(1, 4, 2), config, params, batch)
    assert found == pytest.approx(loss, rel=1e-5)

    def near(found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())

    jax.tree.map(near, others, gradients)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (model("convolution", "kernel=4"), r"mixer_options must be such that kernel is an odd number from 1, found 4"),
        (model("convolution", "size=3"), r"must be some of kernel=INT, expansion=FLOAT with model.mixer='convolution'"),
        (model("convolution", "expansion=nan"), r"such that expansion is a number to 16 that leaves .*, found nan"),
        (model("convolution", groups=2), r"model.groups must be None with model.mixer='convolution', found 2"),
        (model("linear_attention", "heads=2"), r"mixer_options must be empty with model.mixer='linear_attention', fo"),
        (model("linear_attention", heads=3), r"model.heads must be a divisor of model.hidden \(16\), found 3"),
        (model("gated_linear_attention", heads=2), r"model.heads must be a multiple of 4, .*, found 2"),
        (model("gated_linear_attention", heads=16), r"model.heads must be a multiple of 4, .*, found 16"),
        (model("compressed_gspn", "compression=0"), r"such that compression is 1 or more, found 0"),
        (model("compressed_gspn", "compression=100"), r"such that expansion is a number to 16 that leaves channels"),
        (model("compressed_gspn", groups=3), r"model.groups must be a divisor of the 8 channels that are scanned, f"),
        (model("compressed_gspn", "groups=1"), r"must be some of expansion=FLOAT, compression=INT with model.mixer='"),
        (model("convolution", chunk=2), r"model.chunk must be 'preset' with model.mixer='convolution', found 2"),
        (model("gspn", "expansion=2", layout="paper"), r"mixer_options must be empty with model.mixer='gspn', found"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        models.resolve(settings)
