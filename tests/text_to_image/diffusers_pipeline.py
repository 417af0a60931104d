"""Pipelines of diffusers made of the parts of a tiny folder."""

import pathlib

import pytest

from tests.text.plain_bpe import small_vocabulary


def pipeline(folder: pathlib.Path, scheduler=None, filler: str = "<|endoftext|>"):
    """Of the parts in `folder`, but for the autoencoder, which has random weights of its own; `filler` fills up
    prompts."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    words, merges = small_vocabulary()
    two = (folder / "text_encoder_2").is_dir()
    parts = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "scheduler": scheduler or diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 32),
            layers_per_block=1,
            latent_channels=4,
            scaling_factor=0.13025,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
    }
    for end, kind, pad in (
        ("", transformers.CLIPTextModel, filler),
        ("_2", transformers.CLIPTextModelWithProjection, "!"),
    )[: 1 + two]:
        parts[f"text_encoder{end}"] = kind.from_pretrained(folder / f"text_encoder{end}").eval()
        parts[f"tokenizer{end}"] = transformers.CLIPTokenizer(words, merges, pad_token=pad, model_max_length=77)
    if two:
        return diffusers.StableDiffusionXLPipeline(**parts)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
