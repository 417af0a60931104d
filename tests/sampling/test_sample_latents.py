"""Samples of a run on latents: decoded to images with the weights of the autoencoder, shown as latents without."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import sample
from gspn_jax import models
from gspn_jax.autoencoder import LATENT_SCALE
from gspn_jax.config import DataConfig
from gspn_jax.data.latents import write_synthetic
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.sampling.decoding import load_autoencoder
from gspn_jax.sampling.sampler import LATENT_RANGE, Sampler
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import create_state
from gspn_jax.training.train import train
from tests.autoencoder import numpy_vae
from tests.models import numpy_gspn
from tests.training import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """run/ holds a run of two steps on latents of 4x4x4, vae.safetensors weights that double them to 8x8x3."""
    folder = tmp_path_factory.mktemp("latents")
    write_synthetic(folder / "set", records=16, latent_shape=(4, 4, 4), num_classes=10)
    data = DataConfig(source="latents", path=str(folder / "set"), image_size=4, channels=4, num_classes=10, flip=True)
    train(dataclasses.replace(tiny.config(folder / "run", steps=2, save_every=2), data=data))
    save_file(numpy_vae.random_state_dict(), folder / "vae.safetensors")
    return folder


def draw(folder, decode=None) -> np.ndarray:
    step, config = checkpoints.read_config(folder / "run")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    params = checkpoints.restore_params(folder / "run", step, config, mesh)
    return Sampler(config, mesh, decode=decode)(params, np.arange(4), np.arange(4))


def test_samples_are_decoded_at_the_scale_of_the_autoencoder(folder, tmp_path):
    sample.main(
        [
            "--run",
            str(folder / "run"),
            "--num-samples",
            "4",
            "--labels",
            "balanced",
            "--output",
            str(tmp_path / "s.npz"),
            "--vae",
            str(folder / "vae.safetensors"),
        ]
    )
    latents, weights = draw(folder, decode=lambda latents: latents), numpy_vae.random_state_dict()
    assert latents.shape == (4, 4, 4, 4) and latents.dtype == np.float32
    truth = np.stack(
        [
            numpy_vae.decode(weights, numpy_vae.TINY, z.transpose(2, 0, 1) / LATENT_SCALE).transpose(1, 2, 0)
            for z in latents.astype(np.float64)
        ]
    )
    with np.load(tmp_path / "s.npz") as samples:
        assert samples["arr_0"].shape == (4, 8, 8, 3) and samples["arr_0"].dtype == np.uint8
        # truncated to levels, after float32: up to one level below, and a rounding error above
        assert np.abs(samples["arr_0"] - np.clip(127.5 * truth + 128, 0, 255)).max() < 1.01


def test_without_weights_a_grid_shows_three_channels_of_the_latents(folder, tmp_path):
    latents = draw(folder, decode=lambda latents: latents)
    shown = draw(folder)
    assert shown.shape == (4, 4, 4, 3)
    assert np.abs(shown - np.clip(127.5 * latents[..., :3] / LATENT_RANGE + 128, 0, 255)).max() < 1.01
    path = tmp_path / "grid.png"
    sample.main(["--run", str(folder / "run"), "--classes", "1", "--per-class", "2", "--output", str(path)])
    with Image.open(path) as image:
        assert image.mode == "RGB"


@pytest.fixture(scope="module")
def gspn(folder):
    """(run, config, parameters) of a GSPN on latents of 4x4x4 whose every parameter counts."""
    data = checkpoints.read_config(folder / "run")[1].data
    config = dataclasses.replace(tiny.config(folder / "gspn", gspn=True), data=data)
    state = create_state(DiffusionTask(config), sharding.make_mesh(config.mesh, jax.devices()[:1]))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), state.params)
    with Checkpoints(config, "", [str(i) for i in range(10)]) as saver:
        saver.save(1, dataclasses.replace(state, params=params))
    return folder / "gspn", config, params


def test_a_gspn_draws_sizes_that_it_was_not_trained_on_and_they_are_decoded(folder, gspn, tmp_path):
    """Against float64: the network as plain loops, Euler's steps, and the autoencoder, from the same noise."""
    run, config, params = gspn
    height, width, steps, seed = 6, 10, 2, 5
    sample.main(
        [
            "--run",
            str(run),
            "--ema",
            "0",
            "--num-samples",
            "2",
            "--labels",
            "balanced",
            "--output",
            str(tmp_path / "s.npz"),
            "--vae",
            str(folder / "vae.safetensors"),
            "--image-size",
            str(height),
            str(width),
            "--sampler.name",
            "euler",
            "--sampler.steps",
            str(steps),
            "--seed",
            str(seed),
        ]
    )
    arch = models.resolve(config.model)
    with np.load(tmp_path / "s.npz") as samples:
        found = samples["arr_0"]
    assert found.shape == (2, 2 * height, 2 * width, 3) and found.std() > 20
    for label, image in enumerate(found):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), label), 0)
        x = np.asarray(jax.random.normal(key, (height, width, 4)), np.float64)
        for step in range(steps):
            time = 1000 * (1 - step / steps)
            x = x - numpy_gspn.denoise(params, x, time, label, patch=arch.patch, chunks=arch.chunks) / steps
        truth = numpy_vae.decode(numpy_vae.random_state_dict(), numpy_vae.TINY, x.transpose(2, 0, 1) / LATENT_SCALE)
        # truncated to levels, after float32: up to one level below, and a rounding error above
        assert np.abs(image - np.clip(127.5 * truth.transpose(1, 2, 0) + 128, 0, 255)).max() < 1.05


def test_large_images_are_decoded_fewer_at_a_time(folder):
    config = checkpoints.read_config(folder / "run")[1]
    path = str(folder / "vae.safetensors")  # doubles
    sizes = {side: load_autoencoder(path, config, (side, side)).batch_size for side in (4, 128, 256)}
    devices = jax.local_device_count()
    assert sizes == {4: 16, 128: 16, 256: max(4, devices)}


def test_attention_is_not_sampled_at_sizes_it_was_not_trained_on(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--run", str(folder / "run"), "--image-size", "4", "6"])
    assert stopped.value.code == 2
    assert (
        "--image-size must be the one that a model with positions was trained on, 4 4, whose positions it knows, "
        "found 4 6"
    ) in capsys.readouterr().err


def test_mistakes_get_a_sentence(folder, tmp_path, capsys):
    def said(*flags: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            sample.main(["--run", str(folder / "run"), *flags])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "--num-samples of a run on latents needs --vae to decode them" in said("--num-samples", "4")
    assert "the weights must be a file, found nothing at /absent.bin" in said("--vae", "/absent.bin")
    sizes = dataclasses.replace(numpy_vae.TINY, latent_channels=3)
    save_file(numpy_vae.random_state_dict(sizes), tmp_path / "other.safetensors")
    assert "--vae must be of 4 latent channels, as the run is, found 3" in said(
        "--vae", str(tmp_path / "other.safetensors")
    )
