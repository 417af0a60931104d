"""Latents are trained on as they are, without the conversion of pixels."""

import dataclasses
import json

import jax
import numpy as np
from PIL import Image

from gspn_jax.config import DataConfig
from gspn_jax.data.latents import write_synthetic
from gspn_jax.diffusion import objectives
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.train import train
from tests.training import tiny


def config(tmp_path, **settings):
    folder = tmp_path / "latents"
    if not folder.exists():
        write_synthetic(folder, records=24, shards=2, latent_shape=(8, 8, 4), num_classes=10)
    data = DataConfig(source="latents", path=str(folder), image_size=8, channels=4, num_classes=10, flip=True)
    return dataclasses.replace(tiny.config(tmp_path / "run", **settings), data=data)


def test_the_loss_sees_the_latents_unchanged(tmp_path, monkeypatch):
    seen = []

    def loss(config, denoise, x0, y, key):
        seen.append(x0)
        return x0.mean((1, 2, 3)), {}

    monkeypatch.setattr(objectives, "loss", loss)
    settings = config(tmp_path)
    batch = {
        "image": 3 * np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32),
        "label": np.zeros(2, np.int32),
    }
    DiffusionTask(settings).loss({}, batch, jax.random.key(0))
    np.testing.assert_array_equal(seen[0], batch["image"])


def test_a_run_on_latents_trains(tmp_path):
    train(config(tmp_path, steps=2, log_every=1, save_every=2, sample_every=2))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(np.isfinite(json.loads(line)["loss"]) for line in lines)
    with Image.open(tmp_path / "run/samples/step_0000002.png") as image:
        assert image.mode == "RGB"  # three channels of the latents
