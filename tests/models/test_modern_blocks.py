"""SwiGLU, RMS norm, norms of queries and keys, rotary positions, narrow patch embedding: options of any DiT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax import models
from gspn_jax.config import ConfigError, MeshConfig, ModelConfig
from gspn_jax.models.convert import dit_from_torch
from gspn_jax.models.rotary import rotate
from tests.models import numpy_dit, numpy_modern
from tests.models.mesh_gradients import gradient_on
from tests.models.model_cases import (
    BFLOAT16,
    DIT,
    DIT_GSPN,
    MODERN,
    make_config,
    random_inputs,
    random_params,
    relative_error,
    run,
)

OPTIONS = [{"mlp": "swiglu"}, {"norm": "rms"}, {"qk_norm": True}, {"rope": True}, {"bottleneck": 3}]
MODELS = {next(iter(one)): dataclasses.replace(DIT, **one) for one in OPTIONS} | {"all": MODERN}


def in_float64(config, params, inputs):
    arch = models.resolve(config.model)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    settings = {"heads": arch.options.heads, "rope": arch.options.rope, "swiglu": arch.mlp == "swiglu"}
    samples = zip(*inputs, strict=True)
    return np.stack([numpy_modern.denoise(params, *sample, patch=arch.patch, **settings) for sample in samples])


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_each_option_and_all_of_them_are_those_of_float64(model):
    """To 1e-5 of the largest output, on a grid that is not square."""
    config = make_config(model)
    params, inputs = random_params(config), random_inputs(2, 8, 12)
    assert relative_error(run(config, params, *inputs), in_float64(config, params, inputs)) < 1e-5


def test_line_scans_take_the_positions_that_attention_had():
    """Blocks hand tokens on as they are at first: what positions add is the original's table, in float64."""
    tokens = []
    for positions in (True, None):
        config = make_config(dataclasses.replace(DIT_GSPN, positions=positions))
        params, inputs = models.init(config, jax.random.key(0)), random_inputs(2, 8, 12)
        tokens.append(models.apply(models.abstract(config)[0], params, *inputs, features=(0,))[1][0])
    rows, columns, hidden = tokens[0].shape[1:]
    table = numpy_dit.positions(rows, columns, hidden).reshape(rows, columns, hidden)
    np.testing.assert_allclose(tokens[0] - tokens[1], np.broadcast_to(table, tokens[0].shape), atol=1e-5)


def test_products_of_turned_queries_and_keys_depend_on_the_distance_only():
    q, k = (jnp.tile(jax.random.normal(jax.random.key(n), (1, 1, 2, 8)), (1, 20, 1, 1)) for n in range(2))
    q, k = rotate(q, 4, 5), rotate(k, 4, 5)
    scores = np.einsum("bnhd,bmhd->hnm", q, k).reshape(2, 4, 5, 4, 5)
    for rows, columns in ((1, 0), (0, 2), (2, 1)):
        pairs = [scores[:, r, c, r + rows, c + columns] for r in range(4 - rows) for c in range(5 - columns)]
        np.testing.assert_allclose(pairs, [pairs[0]] * len(pairs), rtol=1e-5, atol=1e-6)
    assert np.abs(scores[:, 0, 0, 1, 0] - scores[:, 0, 0, 0, 1]).min() > 1e-3  # rows are not columns


def test_parameters_of_a_plain_dit_have_the_names_that_they_had():
    """Checkpoints hold them by name; an option adds its own and takes none away but the MLP's shapes."""

    def names(model):
        leaves = jax.tree_util.tree_leaves_with_path(models.abstract(make_config(model))[1])
        return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}

    plain, modern = names(DIT), names(MODERN)
    block = {"modulation/linear", "mixer/qkv", "mixer/proj", "mlp/fc1", "mlp/fc2"}
    outside = {"patch_embed/proj", "time_embed/fc1", "time_embed/fc2", "final/modulation/linear", "final/linear"}
    both = {f"trunk/blocks/{name}" for name in block} | outside
    assert plain == {f"{name}/{leaf}" for name in both for leaf in ("kernel", "bias")} | {"label_embed/embedding"}
    scales = (
        "trunk/blocks/norm1",
        "trunk/blocks/norm2",
        "trunk/blocks/mixer/q_norm",
        "trunk/blocks/mixer/k_norm",
        "final/norm",
    )
    assert modern - plain == {f"{name}/scale" for name in scales} | {"patch_embed/narrow/kernel"} and plain < modern


GSPN = dataclasses.replace(DIT_GSPN, mlp="swiglu", norm="rms", chunk=2)


@pytest.mark.parametrize("model", [MODERN, pytest.param(GSPN, marks=pytest.mark.slow)], ids=["attention", "gspn"])
def test_bfloat16_stays_close_to_float32(model):
    config, low, inputs = make_config(model), make_config(model, precision=BFLOAT16), random_inputs(2, 8, 8)
    params = random_params(config)
    assert 0 < relative_error(run(low, params, *inputs), run(config, params, *inputs)) < 0.03


BOTH, FSDP, TENSOR = MeshConfig(1, 4, 2), MeshConfig(1, 4, 1), MeshConfig(1, 1, 2)


@pytest.mark.parametrize(
    ("model", "objective", "mesh"),
    [
        pytest.param(MODERN, "flow", BOTH, id="fsdp 4, tensor 2", marks=pytest.mark.slow),
        pytest.param(MODERN, "flow", FSDP, id="fsdp 4", marks=pytest.mark.slow),
        pytest.param(MODERN, "flow", TENSOR, id="tensor 2", marks=pytest.mark.slow),
        pytest.param(MODERN, "mean_flow", BOTH, id="mean flow", marks=pytest.mark.slow),
        pytest.param(GSPN, "mean_flow", BOTH, id="mean flow of a GSPN", marks=pytest.mark.slow),
    ],
)
def test_over_a_mesh_gradients_are_those_of_one_device(model, objective, mesh):
    """Of a width at which scales and SwiGLU are split, and padded where they are; mean flow takes forward mode and
    reverse mode through blocks whose weights are gathered."""
    config = make_config(dataclasses.replace(model, hidden=40), channels=1, objective=objective)
    params = random_params(config)
    batch = {"image": np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8), "label": np.arange(8) % 5}
    batch["label"] = batch["label"].astype(np.int32)
    loss, gradients = gradient_on(MeshConfig(1, 1, 1), config, params, batch)
    found, others = gradient_on(mesh, config, params, batch)
    assert found == pytest.approx(loss, rel=1e-5)

    def near(found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())

    jax.tree.map(near, others, gradients)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            ModelConfig(preset="GSPN-S/2", mlp="swiglu"),
            r"model.mlp must be None with model.layout='paper', which has no",
        ),
        (
            ModelConfig(preset="GSPN-S/2", positions=True),
            r"model.positions must be None or False with model.layout='pap",
        ),
        (ModelConfig(preset="DiT-S/2", positions=False), r"model.positions must be True or None with model.mixer='att"),
        (ModelConfig(preset="GSPN-S/2", norm="rms"), r"model.norm must be 'layer' or None with model.layout='paper', "),
        (
            dataclasses.replace(DIT_GSPN, rope=True),
            r"model.rope must be None or False with model.mixer='gspn', found Tr",
        ),
        (
            ModelConfig(preset="DiT-S/2", hidden=12, heads=2, rope=True),
            r"model.heads must be such that model.rope has ",
        ),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(model, message):
    with pytest.raises(ConfigError, match=message):
        models.resolve(model)


def test_weights_of_elsewhere_do_not_fit_a_narrow_patch_embedding():
    with pytest.raises(ConfigError, match=r"model.bottleneck must be 0 to take the weights of the original, found 5"):
        dit_from_torch({}, make_config(MODERN))


def test_a_modern_preset_with_another_mixer_keeps_what_it_can():
    arch = models.resolve(ModelConfig(preset="JiT-B/16", mixer="gspn"))
    assert (arch.mixer, arch.mlp, arch.norm, arch.bottleneck) == ("gspn", "swiglu", "rms", 128)
    plain = models.resolve(
        ModelConfig(preset="JiT-B/16", mlp="gelu", norm="layer", qk_norm=False, rope=False, bottleneck=0)
    )
    assert plain == dataclasses.replace(models.resolve(ModelConfig(preset="DiT-B/2")), patch=16)
