"""A folder of Stable Diffusion is read whole in every form people have it, or one sentence says what is wrong."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gspn_jax.config import ConfigError
from gspn_jax.state_dict import WeightsError
from gspn_jax.text_to_image.conditions import encode_prompts
from gspn_jax.text_to_image.folder import load_folder
from tests.text import numpy_clip
from tests.text_to_image.tiny_folder import ONE, VAE, WORDS, XL, write_folder, write_json

UNET = "unet/diffusion_pytorch_model.safetensors"
TOLERANCE = 1e-4  # largest error over the largest output, float32 against float64


def same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize(("unet", "texts"), [ONE, XL], ids=["1", "XL"])
def test_every_part_is_read(unet, texts, tmp_path):
    model = load_folder(write_folder(tmp_path, unet, texts))
    assert model.unet_config == unet and tuple(part.config for part in model.texts) == texts
    scaled = dataclasses.replace(VAE, scaling_factor=0.13025)
    assert model.autoencoder_config == scaled and model.latent_scale == 0.13025
    assert model.prediction == "v_prediction" and model.scheduler == {"prediction_type": "v_prediction"}
    assert model.empty_is_zero == (len(texts) == 2)
    half = load_folder(tmp_path, jnp.bfloat16)
    same(half.unet, {name: value.astype(ml_dtypes.bfloat16) for name, value in model.unet.items()})
    same(half.autoencoder, model.autoencoder)  # float32 whatever is asked for


def test_shards_and_variants_are_the_same_weights_in_their_own_types(tmp_path):
    folder = write_folder(tmp_path, *ONE)
    whole = load_folder(folder)
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()

    names = sorted(tensors)
    files = {name: f"diffusion_pytorch_model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / "unet" / file)
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    write_json(index, {"metadata": {}, "weight_map": files})
    same(load_folder(folder).unet, whole.unet)

    (folder / "unet/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names the shard diffusion_pytorch_model-00002-of-00003\.safetensors"):
        load_folder(folder)
    write_json(index, {"weight_map": {"a": "../elsewhere.safetensors"}})
    with pytest.raises(WeightsError, match=r"must name safetensors files beside it, found 'elsewhere\.safetensors'"):
        load_folder(folder)

    index.unlink()
    half = {name: value.astype(np.float16) for name, value in tensors.items()}
    save_file(half, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    same(load_folder(folder).unet, {name: value.astype(np.float16) for name, value in whole.unet.items()})


@pytest.mark.parametrize(("unet", "texts"), [ONE, XL], ids=["1", "XL"])
def test_prompts_become_what_the_network_is_told(unet, texts, tmp_path):
    model = load_folder(write_folder(tmp_path, unet, texts))
    prompts = ["A photo of a dog", "", "hello, world " * 40 + "the end!!"]
    found = encode_prompts(model.texts, prompts)
    assert found.context.shape == (3, 77, unet.context_width) and found.cut[:2] == ("", "")
    assert found.cut[2].endswith("the end!!") and prompts[2].endswith(found.cut[2])
    for i in range(3):
        states = [
            numpy_clip.encode(numpy_clip.random_state_dict(config), config, part.tokenizer(prompts).ids[i])
            for config, part in zip(texts, model.texts, strict=True)
        ]
        truth = states[0][0] if len(texts) == 1 else np.concatenate([state[1] for state in states], axis=1)
        assert np.abs(found.context[i] - truth).max() < TOLERANCE * np.abs(truth).max()
        if len(texts) == 2:
            assert np.abs(found.pooled[i] - states[1][2]).max() < TOLERANCE * np.abs(states[1][2]).max()
    assert (found.pooled is None) == (len(texts) == 1)


def edit(name: str, **fields):
    def change(folder):
        write_json(folder / name, json.loads((folder / name).read_text()) | fields)

    return change


def only_pickles(folder):
    (folder / UNET).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")


def swap_unet(folder):
    shutil.rmtree(folder / "unet")
    write_folder(folder / "other", *ONE)
    (folder / "other/unet").rename(folder / "unet")


def one_twice(folder):
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    for file in ("a", "b"):
        save_file(tensors, folder / f"unet/{file}.safetensors")
    write_json(
        folder / "unet/diffusion_pytorch_model.safetensors.index.json",
        {"weight_map": {"conv_in.bias": "a.safetensors", "conv_in.weight": "b.safetensors"}},
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), FileNotFoundError, r"model_index\.json must exist"),
        (
            edit("model_index.json", _class_name="FluxPipeline"),
            ConfigError,
            r"must be that of a StableDiffusionPipeline or a StableDiffusionXLPipeline, found 'FluxPipeline'",
        ),
        (
            lambda folder: [shutil.rmtree(folder / part) for part in ("vae", "tokenizer_2")],
            FileNotFoundError,
            r"must hold the folders unet, vae, .*; vae, tokenizer_2 not found",
        ),
        (
            only_pickles,
            FileNotFoundError,
            r"pickled \.bin files are not read; found config\.json, diffusion_pytorch_model",
        ),
        (lambda folder: (folder / UNET).write_bytes(b"\x80\x02"), WeightsError, r"must be a safetensors file, it"),
        (one_twice, WeightsError, r"must stand in one file, found it in .*a\.safetensors and .*b\.safetensors"),
        (
            edit("scheduler/scheduler_config.json", prediction_type="sample"),
            ConfigError,
            r"prediction_type must be one of epsilon, v_prediction, found 'sample'",
        ),
        (edit("vae/config.json", shift_factor=0.1), ConfigError, r"/vae: the autoencoder's shift_factor must be None"),
        (edit("vae/config.json", scaling_factor="big"), ConfigError, r"scaling_factor must be a number greater than 0"),
        (edit("unet/config.json", act_fn="gelu"), ConfigError, r"/unet: the U-Net's act_fn must be 'silu'"),
        (
            edit("text_encoder/config.json", hidden_act="relu"),
            ConfigError,
            r"/text_encoder: the text tower's hidden_act",
        ),
        (swap_unet, ConfigError, r"must take text states as wide as the text towers give, 20, found 12"),
        (
            edit("tokenizer/vocab.json", more=WORDS),
            ConfigError,
            r"a tokenizer must fit its text tower of \d+ words, found \d+",
        ),
    ],
)
def test_a_folder_that_is_wrong_gets_a_sentence(change, error, message, tmp_path):
    change(write_folder(tmp_path, *XL))
    with pytest.raises(error, match=message):
        load_folder(tmp_path)


def test_half_precision_that_overflows_gets_a_sentence(tmp_path):
    folder = write_folder(tmp_path, *ONE)
    tensors = load_file(folder / UNET)
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"] + 1e5}, folder / UNET)
    with pytest.raises(WeightsError, match=r"/unet: 'conv_in\.bias' does not fit into float16"):
        load_folder(folder, jnp.float16)
