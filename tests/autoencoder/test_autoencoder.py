"""The autoencoder is the published one: its function, its files in both dialects, and errors that name the tensor."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gspn_jax.autoencoder import (
    LATENT_SCALE,
    Autoencoder,
    AutoencoderConfig,
    Scale,
    decode,
    encode,
    expected_shapes,
    from_state_dict,
    load,
)
from gspn_jax.config import Config, ConfigError, DataConfig
from gspn_jax.data.latents import LatentMetadata, write_synthetic
from gspn_jax.sampling.decoding import load_weights
from gspn_jax.state_dict import WeightsError
from tests.autoencoder import numpy_vae
from tests.autoencoder.numpy_vae import TINY, random_state_dict

TOLERANCE = 1e-4  # largest error over the largest output, float32 against float64
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def relative_error(found, truth) -> float:
    return np.abs(np.asarray(found, np.float64) - truth).max() / np.abs(truth).max()


def channels_last(function, arrays):
    return np.stack([function(array.transpose(2, 0, 1).astype(np.float64)).transpose(1, 2, 0) for array in arrays])


def test_encoder_and_decoder_are_the_published_ones():
    weights = random_state_dict()
    params = from_state_dict(weights, TINY)
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 4, 6, 4), np.float32)
    moments = jax.jit(encode, static_argnums=1)(params, TINY, images)
    assert moments.shape == (2, 4, 6, 8) and moments.dtype == np.float32
    truth = channels_last(lambda x: numpy_vae.encode(weights, TINY, x), images)
    assert relative_error(moments, truth) < TOLERANCE
    decoded = jax.jit(decode, static_argnums=1)(params, TINY, latents)
    truth = channels_last(lambda x: numpy_vae.decode(weights, TINY, x), latents)
    assert decoded.shape == (2, 8, 12, 3) and relative_error(decoded, truth) < TOLERANCE


def test_the_default_is_the_size_of_stable_diffusions():
    shapes = expected_shapes(AutoencoderConfig())
    assert len(shapes) == 248 and sum(int(np.prod(shape)) for shape in shapes.values()) == 83_653_863
    assert AutoencoderConfig().factor == 8


def rename_attention(weights, *, convolutions: bool):
    renamed = {}
    for name, value in weights.items():
        if ".attentions." in name and "group_norm" not in name:
            for new, old in OLD_NAMES.items():
                name = name.replace(f".{new}.", f".{old}.")
            if convolutions and name.endswith("weight"):
                value = value[..., None, None]
        renamed[name] = value
    return renamed


@pytest.mark.parametrize(
    "dialect",
    [lambda w: w, lambda w: rename_attention(w, convolutions=False), lambda w: rename_attention(w, convolutions=True)],
    ids=["new", "old", "old convolutions"],
)
def test_files_of_every_dialect_load(tmp_path, dialect):
    weights = random_state_dict()
    save_file(dialect(weights), tmp_path / "vae.safetensors")
    params, config = load(tmp_path / "vae.safetensors")
    assert config == TINY
    expected = from_state_dict(weights, TINY)
    assert params.keys() == expected.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != "decoder.up_blocks.0.resnets.1.conv2.bias"},
            r"vae\.safetensors: the weights of the autoencoder must have "
            r"'decoder\.up_blocks\.0\.resnets\.1\.conv2\.bias', found \d+ other tensors",
        ),
        (
            lambda w: w | {"decoder.extra.weight": np.ones(3, np.float32)},
            r"every tensor must belong to an autoencoder of channels \(32, 64\), found 'decoder\.extra\.weight'",
        ),
        (
            lambda w: w | {"encoder.conv_norm_out.weight": np.ones(3, np.float32)},
            r"'encoder\.conv_norm_out\.weight' must have shape \(64,\), found \(3,\)",
        ),
        (
            lambda w: w | {"quant_conv.bias": np.full(8, np.nan, np.float32)},
            r"'quant_conv\.bias' must be finite, found NaN",
        ),
        (
            lambda w: {"conv.weight": np.ones(3, np.float32)},
            r"must be those of an AutoencoderKL .*, found 1 tensors named conv\.weight",
        ),
    ],
)
def test_other_weights_get_a_sentence(tmp_path, change, message):
    save_file(change(random_state_dict()), tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError, match=message):
        load(tmp_path / "vae.safetensors")


def test_images_come_in_any_number_and_one_batch_size_is_compiled():
    weights = random_state_dict()
    params = from_state_dict(weights, TINY)
    vae = Autoencoder(params, TINY, batch_size=3, devices=jax.devices()[:2])
    assert vae.batch_size == 4  # a multiple of the devices
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (5, 4, 4, 3), np.uint8)
    moments = vae.encode(images)
    truth = channels_last(lambda x: numpy_vae.encode(weights, TINY, x), images / 127.5 - 1)
    assert moments.shape == (5, 2, 2, 8) and relative_error(moments, truth) < TOLERANCE
    latents = rng.standard_normal((5, 2, 2, 4), np.float32)
    decoded = vae.decode(latents)
    truth = channels_last(lambda x: numpy_vae.decode(weights, TINY, x), latents / LATENT_SCALE)
    assert decoded.dtype == np.uint8 and decoded.shape == (5, 4, 4, 3)
    # truncated as DiT does; a value within rounding of a step may fall on either side
    assert np.abs(decoded - np.clip(127.5 * truth + 128, 0, 255)).max() < 1.01
    assert (decoded == np.clip(127.5 * truth + 128, 0, 255).astype(np.uint8)).mean() > 0.98


def test_a_wrong_shape_gets_a_sentence():
    params = from_state_dict(random_state_dict(), TINY)
    with pytest.raises(ValueError, match=r"images must be \[B, H, W, 3\] with H and W multiples of 2, found \[1, 5"):
        encode(params, TINY, np.zeros((1, 5, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"latents must be \[B, H, W, 4\]"):
        decode(params, TINY, np.zeros((1, 4, 4, 3), np.float32))


def test_latents_are_decoded_at_the_autoencoders_own_scale_and_shift():
    weights, rng = random_state_dict(), np.random.default_rng(3)
    config = dataclasses.replace(TINY, scaling_factor=0.3611, shift_factor=0.1159)
    latents = rng.standard_normal((2, 2, 2, 4), np.float32)
    found = Autoencoder(from_state_dict(weights, TINY), config, batch_size=2, devices=jax.devices()[:1]).decode(latents)
    truth = channels_last(lambda x: numpy_vae.decode(weights, TINY, x), latents / 0.3611 + 0.1159)
    assert np.abs(found - np.clip(127.5 * truth + 128, 0, 255)).max() < 1.01


def test_scale_and_shift_are_those_of_the_config_beside_the_weights(tmp_path, caplog):
    caplog.set_level("INFO")
    for folder in (tmp_path / "model" / "vae", tmp_path / "alone"):
        folder.mkdir(parents=True)
        save_file(random_state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model/vae/config.json").write_text('{"scaling_factor": 0.13025, "shift_factor": null}')
    for path in ("model", "model/vae", "model/vae/diffusion_pytorch_model.safetensors"):
        config = load(tmp_path / path)[1]
        assert (config.scaling_factor, config.shift_factor) == (0.13025, 0)
    assert not caplog.records
    config = load(tmp_path / "alone")[1]
    assert (config.scaling_factor, config.shift_factor) == (LATENT_SCALE, 0) and "does not tell" in caplog.text
    assert load(tmp_path / "alone", Scale(0.5, 0.25))[1].shift_factor == 0.25
    with pytest.raises(ConfigError, match=r"scaling_factor 0\.13025 .* found 0\.18215 and 0 asked for"):
        load(tmp_path / "model", Scale(0.18215, 0.0))


def test_a_run_on_latents_is_decoded_at_the_scale_it_was_trained_at(tmp_path):
    save_file(random_state_dict(), tmp_path / "vae.safetensors")
    write_synthetic(tmp_path / "set", records=2, latent_shape=(2, 2, 4), num_classes=2)
    metadata = LatentMetadata.read(tmp_path / "set")
    dataclasses.replace(metadata, scaling_factor=0.3611, shift_factor=0.1159).write(tmp_path / "set")
    data = DataConfig(source="latents", path=str(tmp_path / "set"), image_size=2, channels=4, num_classes=2)
    sizes = load_weights(str(tmp_path / "vae.safetensors"), "--vae", Config("run", data=data))[1]
    assert (sizes.scaling_factor, sizes.shift_factor) == (0.3611, 0.1159)
    (tmp_path / "config.json").write_text('{"scaling_factor": 0.13025}')
    with pytest.raises(ConfigError, match=r"tells of latents of scaling_factor 0\.13025"):
        load_weights(str(tmp_path / "vae.safetensors"), "--vae", Config("run", data=data))
