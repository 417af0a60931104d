"""A distillation small enough to compile and train in seconds: a tiny model, its captions, and the config of a run."""

import dataclasses
import pathlib

import numpy as np
from PIL import Image

from gspn_jax.config import OptimizerConfig, TrainConfig
from gspn_jax.prepare.captions import Captions, prepare_captions
from gspn_jax.text_to_image.config import CaptionsConfig, LayersConfig, StudentConfig
from gspn_jax.text_to_image.gspn_layers import LayerOptions
from tests.text_to_image.tiny_folder import FIRST, write_folder
from tests.unet import numpy_unet

SMALL = dataclasses.replace(numpy_unet.CONVOLUTIONS, channels=(8,), layers=1, depths=(0,), heads=(2,), middle_depth=2)
"""A U-Net of Stable Diffusion 1's kind with two self-attentions, in its middle."""
TINY = (SMALL, (FIRST,))
NUMBERS = ("one", "two", "three", "four", "five", "six")
LAYERS = LayerOptions(form="pure", proxy_ratio=4, chunks=(2,))


def write_images(root: pathlib.Path, count: int = 6) -> pathlib.Path:
    """Noisy images with a caption beside each."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (18, 17 + i, 3), np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a photo of {NUMBERS[i]} dogs")
    return root


def write_set(root: pathlib.Path, kind=TINY, change=lambda folder: None) -> tuple[pathlib.Path, pathlib.Path]:
    """(folder of a model, its set of captions); `change` is called with the folder before they are made."""
    model = write_folder(root / "model", *kind)
    change(model)
    images, output = write_images(root / "images"), root / "captions"
    prepare_captions(
        Captions(model=str(model), images=str(images), output=str(output), image_size=16, batch_size=8, threads=1)
    )
    return model, output


def config(run_dir, model, captions, *, gspn: LayerOptions = LAYERS, **train) -> LayersConfig:
    settings = {
        "steps": 4,
        "batch_size": 2,
        "precision": "params=float32,compute=float32",
        "ema_decays": (0.0,),
        "log_every": 1,
        "save_every": 2,
    }
    return LayersConfig(
        run_dir=str(run_dir),
        model=StudentConfig(folder=str(model), gspn=gspn),
        data=CaptionsConfig(str(captions)),
        optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-3),
        train=TrainConfig(**settings | train),
    )
