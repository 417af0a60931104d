import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax import models
from gspn_jax.config import ModelConfig
from gspn_jax.models import resolve
from tests.models import numpy_gspn
from tests.models.model_cases import (
    BFLOAT16,
    DIT,
    DIT_GSPN,
    PAPER,
    make_config,
    random_inputs,
    random_params,
    relative_error,
    run,
)

# Where the chunk pattern does not matter, two local blocks: the quickest to compile.
QUICK_PAPER, QUICK_DIT_GSPN = dataclasses.replace(PAPER, depth=2, chunk=2), dataclasses.replace(DIT_GSPN, chunk=2)
IDS = ["paper", "dit", "dit_gspn"]
MODELS = pytest.mark.parametrize("model", [QUICK_PAPER, DIT, QUICK_DIT_GSPN], ids=IDS)
# The gradient of the scans compiles slowly, and the third model joins parts that the other two test.
SLOW_MODELS = pytest.mark.parametrize(
    "model", [QUICK_PAPER, DIT, pytest.param(QUICK_DIT_GSPN, marks=pytest.mark.slow)], ids=IDS
)


def numpy_paper(config, params, inputs):
    arch = resolve(config.model)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    return np.stack(
        [
            numpy_gspn.denoise(params, *sample, patch=arch.patch, chunks=arch.chunks)
            for sample in zip(*inputs, strict=True)
        ]
    )


# The tolerance is 1e-5 of the largest output, float32 against float64. The sizes are those of the training images, then
# ones that were never trained on: the weights of one size run at every other.
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (4, 10)])
def test_paper_layout_is_that_of_plain_loops_at_any_size(height, width):
    config = make_config(PAPER)
    params, inputs = random_params(config), random_inputs(2, height, width)
    assert relative_error(run(config, params, *inputs), numpy_paper(config, params, inputs)) < 1e-5


@pytest.mark.parametrize(
    "change", [{"groups": 4, "skip": True, "chunk": (3, 1, None)}, {"groups": 1, "patch": 1, "chunk": 2}]
)
def test_groups_skip_patch_and_chunks_are_those_of_plain_loops(change):
    config = make_config(dataclasses.replace(PAPER, depth=2, **change), objective="flow")
    params, inputs = random_params(config), random_inputs(2, 8, 8)
    assert relative_error(run(config, params, *inputs), numpy_paper(config, params, inputs)) < 1e-5


@pytest.mark.parametrize(
    ("objective", "learn_sigma", "channels"),
    [("ddpm", None, 6), ("flow", None, 3), ("ddpm", False, 3), ("flow", True, 6)],
)
def test_output_channels_follow_the_objective_unless_set(objective, learn_sigma, channels):
    config = make_config(dataclasses.replace(PAPER, learn_sigma=learn_sigma), objective=objective)
    graphdef, params = models.abstract(config)
    output = jax.eval_shape(lambda p, *args: models.apply(graphdef, p, *args), params, *random_inputs(2, 8, 8))
    assert output.shape == (2, 8, 8, channels)


@MODELS
def test_a_new_denoiser_predicts_zero_and_its_parameters_rebuild_it(model):
    config = make_config(model, precision=BFLOAT16)
    params = jax.jit(models.init, static_argnums=0)(config, 0)
    graphdef, shapes = models.abstract(config)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert all(type(node) is dict for node in (params, params["trunk"], params["final"]["modulation"]["linear"]))
    output = run(config, params, *random_inputs(2, 8, 8))
    assert output.dtype == np.float32
    assert not output.any()
    rebuilt_graphdef, rebuilt = models.split(nnx.merge(graphdef, params))
    assert rebuilt_graphdef == graphdef
    jax.tree.map(np.testing.assert_array_equal, rebuilt, params)


def test_init_follows_the_seed_and_gives_every_block_its_own_weights():
    config = make_config(DIT)
    init = jax.jit(models.init, static_argnums=0)
    first, again, other = init(config, 0), init(config, jax.random.key(0)), init(config, 1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    qkv = [np.asarray(p["trunk"]["blocks"]["mixer"]["qkv"]["kernel"]) for p in (first, other)]
    assert np.abs(qkv[0] - qkv[1]).max() > 0.1
    assert np.abs(qkv[0][0] - qkv[0][1]).max() > 0.1
    bound = np.sqrt(6 / (16 + 3 * 16))  # Xavier uniform of the whole [hidden, 3 * hidden] matrix
    assert 0.95 * bound < np.abs(qkv[0]).max() <= bound


def test_gspn_mixer_starts_with_open_gates():
    params = jax.jit(models.init, static_argnums=0)(make_config(DIT_GSPN), 0)
    np.testing.assert_array_equal(params["trunk"]["blocks"]["mixer"]["merge"], np.full((2, 4), 0.25))


# Largest difference over the largest output; bfloat16 has 8 bits, so 0.4 % a rounding.
@SLOW_MODELS
def test_bfloat16_stays_close_to_float32(model):
    config, low = make_config(model), make_config(model, precision=BFLOAT16)
    params, inputs = random_params(config), random_inputs(4, 8, 8)
    assert 0 < relative_error(run(low, params, *inputs), run(config, params, *inputs)) < 0.03


@SLOW_MODELS
def test_gradients_reach_every_parameter(model):
    config = make_config(model)
    params, inputs = random_params(config), random_inputs(6, 8, 8)
    graphdef, _ = models.abstract(config)
    target = random_inputs(6, 8, 8, channels=6, seed=2)[0]
    gradients = jax.jit(jax.grad(lambda p: jnp.square(models.apply(graphdef, p, *inputs) - target).mean()))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for layer in gradient if name.startswith("trunk") else [gradient]:
            assert np.isfinite(layer).all(), name
            assert np.abs(layer).max() > 1e-8, name


@pytest.mark.parametrize("model", [DIT, pytest.param(PAPER, marks=pytest.mark.slow)], ids=["dit", "paper"])
def test_remat_changes_no_gradient(model):
    inputs = random_inputs(2, 8, 8)

    def gradients(remat):
        config = make_config(dataclasses.replace(model, depth=2, remat=remat))
        graphdef, _ = models.abstract(config)
        loss = jax.jit(jax.grad(lambda p: jnp.square(models.apply(graphdef, p, *inputs)).mean()))
        return jax.tree.leaves(loss(random_params(config)))

    plain = gradients("none")
    for remat in ("dots", "names", "full"):
        for found, expected in zip(gradients(remat), plain, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=remat)


@MODELS
def test_a_size_that_the_patch_does_not_divide_is_one_sentence(model):
    config = make_config(model)
    graphdef, _ = models.abstract(config)
    message = "^the image's height and width must be multiples of the patch size 2, found 8x7$"
    with pytest.raises(ValueError, match=message):
        models.apply(graphdef, random_params(config), *random_inputs(1, 8, 7))


@pytest.mark.parametrize("model", [QUICK_PAPER, DIT], ids=IDS[:2])
def test_drop_path_needs_a_key_and_a_rate(model):
    config = make_config(dataclasses.replace(model, drop_path=0.5))
    params, inputs = random_params(config), random_inputs(8, 4, 4)
    graphdef, _ = models.abstract(config)
    apply = jax.jit(lambda key: models.apply(graphdef, params, *inputs, drop_path_key=key))
    plain = apply(None)
    first, again, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - plain).max() > 1e-3

    graphdef, _ = models.abstract(make_config(dataclasses.replace(model, drop_path=0.0)))
    traced = [
        jax.make_jaxpr(lambda p, key=key: models.apply(graphdef, p, *inputs, drop_path_key=key))(params)
        for key in (None, jax.random.key(0))
    ]
    assert str(traced[0]) == str(traced[1])


def _lines(config, transform=lambda f: f):
    """Lines of the lowered program, from shapes alone."""
    graphdef, params = models.abstract(config)
    function = transform(lambda p, *args: models.apply(graphdef, p, *args, drop_path_key=jax.random.key(0)).sum())
    side = config.data.image_size
    lowered = jax.jit(function).lower(params, *random_inputs(2, side, side, config.data.channels))
    return len(lowered.as_text().splitlines())


@pytest.mark.parametrize("model", [PAPER, DIT, DIT_GSPN], ids=IDS)
def test_program_size_does_not_depend_on_depth(model):
    # From 10 blocks on: in fewer, the paper layout has two local blocks as it has two global ones, and shares code.
    short, long = (make_config(dataclasses.replace(model, depth=depth)) for depth in (10, 20))
    assert _lines(short, jax.grad) == _lines(long, jax.grad)


@pytest.mark.parametrize("preset", ["GSPN-XL/2", "DiT-XL/2"])
def test_xl_traces_to_a_program_as_small_as_a_shallow_one(preset):
    xl = ModelConfig(preset=preset, remat="dots")
    sizes = {"channels": 4, "num_classes": 1000, "image_size": 32}
    shallow = make_config(dataclasses.replace(xl, depth=10), **sizes)
    assert _lines(make_config(xl, **sizes)) == _lines(shallow)
