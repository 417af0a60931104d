"""The text towers are the published ones: their function, sizes and files; and errors that name the tensor or field."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gspn_jax.config import ConfigError
from gspn_jax.state_dict import WeightsError
from gspn_jax.text import (
    CLIP_L,
    OPENCLIP_BIGG,
    OPENCLIP_H,
    TextConfig,
    encode,
    expected_shapes,
    from_state_dict,
    load_tower,
)
from tests.text import numpy_clip
from tests.text.numpy_clip import PROJECTED, QUICK, random_ids, random_state_dict

TOLERANCE = 1e-5  # largest error over the largest output, float32 against float64


def relative_error(found, truth) -> float:
    return np.abs(np.asarray(found, np.float64) - truth).max() / np.abs(truth).max()


def write_folder(folder, config, weights):
    (folder / "config.json").write_text(json.dumps(numpy_clip.config_json(config)))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("config", [QUICK, PROJECTED], ids=["quick GELU", "GELU and projection"])
def test_states_are_the_published_ones(config):
    weights, ids = random_state_dict(config), random_ids(config, (0, 5, 8))
    found = jax.jit(encode, static_argnums=1)(from_state_dict(weights, config), config, ids)
    assert found.last.shape == found.penultimate.shape == (3, 9, config.width)
    assert found.pooled.shape == (3, config.projection or config.width)
    for i, row in enumerate(ids):
        for ours, truth in zip(found, numpy_clip.encode(weights, config, row), strict=True):
            assert relative_error(ours[i], truth) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "count"),
    [(CLIP_L, 123_060_480), (OPENCLIP_H, 340_387_840), (OPENCLIP_BIGG, 694_659_840)],
    ids=["L/14", "H", "bigG"],
)
def test_full_sizes_are_those_of_the_published_towers(config, count):
    shapes = expected_shapes(config)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
    params = {
        name: jax.ShapeDtypeStruct(shape if "embedding" in name else shape[::-1], jnp.bfloat16)
        for name, shape in shapes.items()
    }
    states = jax.eval_shape(
        lambda params, ids: encode(params, config, ids), params, jax.ShapeDtypeStruct((2, 77), jnp.int32)
    )
    assert states.last.shape == (2, 77, config.width) and {state.dtype for state in states} == {jnp.dtype("bfloat16")}


def test_files_of_every_dialect_load_in_the_type_they_have(tmp_path):
    weights = random_state_dict(PROJECTED)
    truth = from_state_dict(weights, PROJECTED)
    old = weights | {"text_model.embeddings.position_ids": np.arange(11)[None]}
    new = {name.removeprefix("text_model."): value for name, value in weights.items()}
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()}
    for name, tensors in (("old", old), ("new", new), ("bfloat16", half)):
        folder = tmp_path / name
        folder.mkdir()
        params, config = load_tower(write_folder(folder, PROJECTED, tensors))
        assert config == PROJECTED and params.keys() == truth.keys()
        for key, value in params.items():
            expected = truth[key] if name != "bfloat16" else truth[key].astype(ml_dtypes.bfloat16)
            assert value.dtype == expected.dtype
            np.testing.assert_array_equal(value, expected, err_msg=key)
    states = encode(params, PROJECTED, random_ids(PROJECTED, (4,)))
    assert states.last.dtype == jnp.bfloat16
    assert load_tower(folder, jnp.float32)[0]["final_layer_norm.bias"].dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if not k.endswith("layers.1.mlp.fc1.bias")},
            r"the weights of the text tower must have 'encoder\.layers\.1\.mlp\.fc1\.bias', found \d+ other tensors",
        ),
        (
            lambda w: w | {"extra": np.ones(3, np.float32)},
            r"must belong to the text tower of this config, found 'extra'",
        ),
        (
            lambda w: w | {"text_model.final_layer_norm.bias": np.ones(3, np.float32)},
            r"'text_model\.final_layer_norm\.bias' must have shape \(24,\), found \(3,\)",
        ),
        (lambda w: w | {"text_model.final_layer_norm.bias": np.full(24, np.inf, np.float32)}, r"must be finite"),
        (
            lambda w: w | {"text_model.final_layer_norm.bias": np.ones(24, np.int8)},
            r"must be one of float32, float16, bfloat16, found I8",
        ),
    ],
)
def test_other_weights_get_a_sentence(tmp_path, change, message):
    with pytest.raises(WeightsError, match=message):
        load_tower(write_folder(tmp_path, QUICK, change(random_state_dict(QUICK))))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "relu", r"hidden_act must be one of quick_gelu, gelu, found 'relu'"),
        ("hidden_size", None, r"hidden_size must be an integer, found None"),
        ("num_attention_heads", 5, r"width must be a multiple of its heads, found 24 and 5"),
        ("eos_token_id", 7, r"eos_token_id must be its last id 49, found 7"),
        ("architectures", ["BertModel"], r"must be a CLIPTextModel or a CLIPTextModelWithProjection, found BertModel"),
    ],
)
def test_other_configs_get_a_sentence(field, value, message):
    with pytest.raises(ConfigError, match=message):
        TextConfig.from_json(numpy_clip.config_json(QUICK) | {field: value})


def test_too_many_tokens_get_a_sentence():
    params = from_state_dict(random_state_dict(QUICK), QUICK)
    with pytest.raises(ValueError, match=r"ids must be \[B, N\] with N from 1 to 11, found \[1, 12\]"):
        encode(params, QUICK, jnp.zeros((1, 12), jnp.int32))
    assert TextConfig.from_json(numpy_clip.config_json(QUICK)) == QUICK
