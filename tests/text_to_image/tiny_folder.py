"""Folders of Stable Diffusion as diffusers writes them, of tiny networks with random weights."""

import dataclasses
import json
import pathlib

from safetensors.numpy import save_file

from gspn_jax.autoencoder import AutoencoderConfig
from gspn_jax.text import TextConfig
from tests.autoencoder import numpy_vae
from tests.text import numpy_clip
from tests.text.plain_bpe import small_vocabulary
from tests.unet import numpy_unet, unet_cases

WORDS = len(small_vocabulary()[0])
VAE = AutoencoderConfig(channels=(32, 32), layers=1)
FIRST = TextConfig(width=12, layers=2, heads=2, hidden=24, vocabulary=WORDS)
SECOND = TextConfig(width=8, layers=2, heads=2, hidden=16, vocabulary=WORDS, activation="gelu", projection=10)
ONE = (numpy_unet.CONVOLUTIONS, (FIRST,))
"""U-Net and text towers as in Stable Diffusion 1."""
TWO = (
    dataclasses.replace(numpy_unet.CONVOLUTIONS, linear_projection=True, heads=(1, 2, 2)),
    (dataclasses.replace(FIRST, activation="gelu"),),
)
"""As in Stable Diffusion 2: a linear around transformers, heads of one width, another activation of the text."""
XL = (dataclasses.replace(numpy_unet.LINEAR, in_channels=4, out_channels=4), (FIRST, SECOND))
"""And as in SDXL."""


def write_json(path: pathlib.Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_folder(folder: pathlib.Path, unet, texts) -> pathlib.Path:
    """Float32, one file a network."""
    write_json(
        folder / "model_index.json",
        {"_class_name": "StableDiffusionXLPipeline" if len(texts) == 2 else "StableDiffusionPipeline"},
    )
    write_json(folder / "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"})
    write_json(folder / "vae/config.json", {"scaling_factor": 0.13025, "norm_num_groups": 32})
    save_file(numpy_vae.random_state_dict(VAE), folder / "vae/diffusion_pytorch_model.safetensors")
    write_json(folder / "unet/config.json", unet_cases.as_json(unet))
    save_file(numpy_unet.random_state_dict(unet), folder / "unet/diffusion_pytorch_model.safetensors")
    words, merges = small_vocabulary()
    for end, config in zip(("", "_2"), texts, strict=False):
        write_json(folder / f"text_encoder{end}/config.json", numpy_clip.config_json(config))
        save_file(numpy_clip.random_state_dict(config), folder / f"text_encoder{end}/model.safetensors")
        write_json(folder / f"tokenizer{end}/vocab.json", words)
        lines = "".join(f"{left} {right}\n" for left, right in merges)
        (folder / f"tokenizer{end}/merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
        write_json(folder / f"tokenizer{end}/tokenizer_config.json", {"pad_token": "!"} if end else {})
    return folder
