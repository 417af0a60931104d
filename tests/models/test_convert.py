"""Weights of the original DiT load, and give the original's function."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gspn_jax.config import ConfigError
from gspn_jax.models.convert import dit_from_repa, dit_from_sit, dit_from_torch, dit_to_torch
from gspn_jax.state_dict import read_state_dict, read_weights
from tests.attacks.foreign import save_safetensors
from tests.models.model_cases import DIT, PAPER, make_config, random_inputs, random_params, relative_error, run
from tests.models.numpy_dit import denoise, random_state_dict

CONFIG = make_config(DIT)
SIZES = {"hidden": 16, "depth": 2, "patch": 2, "channels": 3, "out_channels": 6, "num_classes": 5, "grid": 4}
TOLERANCE = 1e-4  # largest error over the largest output, float32 against float64


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12)])
def test_output_is_that_of_the_original(height, width):
    state_dict = random_state_dict(**SIZES)
    x, t, y = random_inputs(3, height, width)
    found = run(CONFIG, dit_from_torch(state_dict, CONFIG), x, t, y)
    truth = np.stack(
        [
            denoise(state_dict, image.transpose(2, 0, 1), time, label, heads=2, patch=2).transpose(1, 2, 0)
            for image, time, label in zip(x, t, y, strict=True)
        ]
    )
    assert relative_error(found, truth) < TOLERANCE


def test_safetensors_and_back(tmp_path):
    state_dict = random_state_dict(**SIZES)
    save_file(state_dict, tmp_path / "dit.safetensors")
    params = dit_from_torch(read_state_dict(tmp_path / "dit.safetensors"), CONFIG)
    back = dit_to_torch(params, CONFIG)
    assert back.keys() == state_dict.keys()
    for name, value in state_dict.items():
        np.testing.assert_allclose(back[name], value, atol=1e-6 if name == "pos_embed" else 0, err_msg=name)


def test_parameters_survive_the_way_to_torch_and_back():
    params = random_params(CONFIG)
    back = dit_from_torch(dit_to_torch(params, CONFIG), CONFIG)
    np.testing.assert_array_equal(
        params["trunk"]["blocks"]["mixer"]["qkv"]["kernel"], back["trunk"]["blocks"]["mixer"]["qkv"]["kernel"]
    )
    np.testing.assert_array_equal(params["patch_embed"]["proj"]["kernel"], back["patch_embed"]["proj"]["kernel"])


def _without(state_dict, name):
    return {key: value for key, value in state_dict.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: _without(s, "blocks.1.mlp.fc1.bias"),
            r"the state_dict must have 'blocks.1.mlp.fc1.bias', found \d+ other keys",
        ),
        (
            lambda s: s | {"blocks.2.mlp.fc1.bias": s["blocks.1.mlp.fc1.bias"]},
            r"every key of the state_dict must belong to a DiT of depth 2, found 'blocks.2.mlp.fc1.bias'",
        ),
        (
            lambda s: s | {"blocks.0.attn.qkv.weight": s["blocks.0.attn.proj.weight"]},
            r"blocks.0.attn.qkv.weight must have shape \(48, 16\) for this config, found \(16, 16\)",
        ),
        (
            lambda s: s | {"x_embedder.proj.weight": s["x_embedder.proj.weight"][:, :2]},
            r"x_embedder.proj.weight must have shape \(16, 3, 2, 2\) for this config, found \(16, 2, 2, 2\)",
        ),
        (
            lambda s: s | {"y_embedder.embedding_table.weight": s["y_embedder.embedding_table.weight"][:5]},
            r"y_embedder.embedding_table.weight must have shape \(6, 16\) for this config, found \(5, 16\)",
        ),
        (
            lambda s: s | {"final_layer.linear.bias": np.full(24, np.nan, np.float32)},
            r"final_layer.linear.bias must be finite, found NaN or infinity",
        ),
        (
            lambda s: s | {"pos_embed": s["pos_embed"][:, :, ::-1]},
            r"pos_embed must be the fixed sine-cosine table of DiT, found one that is .* off",
        ),
        (
            lambda s: s | {"pos_embed": s["pos_embed"][:, :15]},
            r"pos_embed must have shape \(1, rows \* rows, 16\), found \(1, 15, 16\)",
        ),
    ],
)
def test_a_wrong_state_dict_is_one_sentence_naming_the_key(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dit_from_torch(change(random_state_dict(**SIZES)), CONFIG)


def test_pos_embed_may_be_missing_or_of_another_grid():
    state_dict = random_state_dict(**(SIZES | {"grid": 8}))
    dit_from_torch(state_dict, CONFIG)
    dit_from_torch(_without(state_dict, "pos_embed"), CONFIG)


def test_only_a_dit_with_attention_takes_them():
    with pytest.raises(ConfigError, match=r"model.preset must be a DiT with attention"):
        dit_from_torch(random_state_dict(**SIZES), make_config(PAPER))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a file, found nothing at .*absent.pt"):
        read_state_dict(tmp_path / "absent.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match=r"cut.safetensors must be a safetensors file, it cannot be read"):
        read_state_dict(tmp_path / "cut.safetensors")


def test_a_sit_becomes_a_model_of_our_flow():
    """SiT (arXiv 2401.08740): time from noise, 0, to the clean image, 1, and a velocity to the clean image."""
    state_dict = random_state_dict(**SIZES)
    x, _, y = random_inputs(6, 8, 8)
    t = np.array([0.0, 1e-3, 0.25, 0.5, 0.9, 1.0], np.float32)  # ours: from the clean image to noise
    found = run(CONFIG, dit_from_torch(dit_from_sit(state_dict), CONFIG), x, 1000 * t, y)
    truth = -np.stack(
        [
            denoise(state_dict, image.transpose(2, 0, 1), 1 - time, label, heads=2, patch=2).transpose(1, 2, 0)
            for image, time, label in zip(x, t.astype(np.float64), y, strict=True)
        ]
    )
    assert relative_error(found, truth) < TOLERANCE


def test_a_repa_becomes_a_model_of_our_flow():
    """REPA (arXiv 2410.06940): time and velocity as ours, but the time enters the network from 0 to 1."""
    state_dict = random_state_dict(**SIZES)
    x, _, y = random_inputs(6, 8, 8)
    t = np.array([0.0, 1e-3, 0.25, 0.5, 0.9, 1.0], np.float32)
    found = run(CONFIG, dit_from_torch(dit_from_repa(state_dict), CONFIG), x, 1000 * t, y)
    truth = np.stack(
        [
            denoise(state_dict, image.transpose(2, 0, 1), time, label, heads=2, patch=2).transpose(1, 2, 0)
            for image, time, label in zip(x, t.astype(np.float64), y, strict=True)
        ]
    )
    assert relative_error(found, truth) < TOLERANCE


TYPES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("dtype", TYPES)
def test_positions_are_compared_to_the_rounding_of_their_type(dtype):
    state_dict = random_state_dict(**SIZES)

    def stored(table: np.ndarray) -> dict:
        return state_dict | {"pos_embed": table.astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)}

    table = state_dict["pos_embed"]
    dit_from_torch(stored(table), CONFIG)
    for other in (table[:, ::-1], np.cos(table), np.where(table == 1, 1, table * 1.3)):
        with pytest.raises(ValueError, match="must be the fixed sine-cosine table of DiT"):
            dit_from_torch(stored(other), CONFIG)


@pytest.mark.parametrize(
    ("names", "wrapper"),
    [
        ("{}", None),
        ("module.{}", None),
        ("_orig_mod.{}", None),
        ("module._orig_mod.{}", None),
        ("ema.{}", "ema"),
        ("model.{}", None),
    ],
)
def test_prefixes_of_other_programs_are_taken_off(tmp_path, names, wrapper):
    state_dict = random_state_dict(**SIZES)
    save_file({names.format(name): value for name, value in state_dict.items()}, tmp_path / "dit.safetensors")
    found = read_weights(tmp_path / "dit.safetensors")
    assert found.tensors.keys() == state_dict.keys() and found.wrapper == wrapper and found.types == ("float32",)


@pytest.mark.parametrize("dtype", ["float64", *TYPES])
def test_every_type_of_floating_point_is_read(tmp_path, dtype):
    values = np.linspace(-2, 2, 9).reshape(3, 3).astype(getattr(ml_dtypes, dtype, dtype))
    save_safetensors(tmp_path / "w.safetensors", {"a": values, "b": values[0]}, values.dtype)
    found = read_state_dict(tmp_path / "w.safetensors")
    for name, truth in (("a", values), ("b", values[0])):
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], truth.astype(np.float32))
