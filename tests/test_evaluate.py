"""python -m gspn_jax.evaluate as a user calls it: an .npz, a folder, a run on latents, a sweep, and wrong requests."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import scipy.special
from PIL import Image
from safetensors.numpy import save_file

from gspn_jax.config import DataConfig
from gspn_jax.data.latents import write_synthetic
from gspn_jax.evaluate import main
from gspn_jax.files import sha256_of
from gspn_jax.metrics import inception
from gspn_jax.training.loop import train
from tests.autoencoder import numpy_vae
from tests.training import tiny

COUNT = 8
"""Samples and reference images: one batch of the eight devices."""


def images(seed: int, side: int = 8) -> np.ndarray:
    smooth = np.random.default_rng(seed).integers(0, 256, (COUNT, 2, 2, 3), np.uint8)
    return smooth.repeat(side // 2, axis=1).repeat(side // 2, axis=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """inception.safetensors; ref.npz with images; run/ on latents of 4x4x4 with vae.safetensors that doubles them to
    8x8x3."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_file(inception.random_state_dict(0), folder / "inception.safetensors")
    np.savez(folder / "ref.npz", arr_0=images(1))
    write_synthetic(folder / "set", records=16, latent_shape=(4, 4, 4), num_classes=10)
    data = DataConfig(source="latents", path=str(folder / "set"), image_size=4, channels=4, num_classes=10, flip=True)
    train(dataclasses.replace(tiny.config(folder / "run", steps=2, save_every=2), data=data))
    save_file(numpy_vae.random_state_dict(), folder / "vae.safetensors")
    return folder


def features_of(images: np.ndarray) -> inception.Features:
    """On one device, as float64."""
    found = jax.jit(inception.apply)(inception.random_params(0), images)
    return inception.Features(*(np.asarray(values, np.float64) for values in found))


def inception_score(images: np.ndarray) -> float:
    p = scipy.special.softmax(features_of(images).logits, axis=1)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """tr (C1 C2)^(1/2) from the factors C = A'A of few images: the singular values of A B'."""
    first, second = ((features - features.mean(0)) / np.sqrt(COUNT - 1) for features in (x, y))
    cross = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (first**2).sum() + (second**2).sum() - 2 * cross


def evaluate(folder, *flags: str) -> None:
    main([*flags, "--inception", str(folder / "inception.safetensors"), "--batch-size", "8"])


def test_an_npz_gets_the_metrics_of_its_images(folder, tmp_path, capsys):
    np.savez(tmp_path / "s.npz", arr_0=images(2), arr_1=np.arange(COUNT), settings=json.dumps({"seed": 7}))
    evaluate(folder, "--samples", str(tmp_path / "s.npz"), "--reference", str(folder / "ref.npz"))
    result = json.loads((tmp_path / "s.json").read_text())
    assert list(result["metrics"]) == ["fid", "sfid", "is", "kid", "precision", "recall"]

    x, y = features_of(images(2)), features_of(images(1))
    np.testing.assert_allclose(result["metrics"]["fid"], frechet(x.pool, y.pool), rtol=1e-4)
    np.testing.assert_allclose(result["metrics"]["sfid"], frechet(x.spatial, y.spatial), rtol=1e-4)
    np.testing.assert_allclose(result["metrics"]["is"], inception_score(images(2)), rtol=1e-5)

    samples = result["samples"]
    assert samples["count"] == COUNT and samples["image_size"] == [8, 8] and samples["seed"] == 7
    assert samples["sha256"] == sha256_of(tmp_path / "s.npz")
    assert result["reference"]["sha256"] == sha256_of(folder / "ref.npz")
    assert result["inception"]["sha256"] == sha256_of(folder / "inception.safetensors")
    assert result["environment"]["devices"] == "8 x cpu" and result["environment"]["versions"]["jax"] == jax.__version__
    shown = capsys.readouterr().out
    assert f"FID              {result['metrics']['fid']:.6g}" in shown and "8 of 8x8 from" in shown
    assert "warning: 8 samples, where published numbers are of 50,000" in shown


def test_a_folder_of_images_is_scored_and_warned_about(folder, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(images(2, side=16)):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{number}.png")
    evaluate(folder, "--samples", str(tmp_path / "pictures"), "--reference", str(folder / "ref.npz"),
             "--metrics", "is", "--image-size", "16")
    result = json.loads((tmp_path / "pictures.json").read_text())
    np.testing.assert_allclose(result["metrics"]["is"], inception_score(images(2, side=16)), rtol=1e-5)
    said = capsys.readouterr().out
    assert "warning: the images were scaled and cropped to 16x16 here" in said
    assert "warning: the samples are 16x16 and the images of the reference 8x8" in said


def test_a_run_on_latents_is_drawn_decoded_and_scored_without_files(folder, tmp_path, capsys):
    command = ["--run", str(folder / "run"), "--vae", str(folder / "vae.safetensors"), "--num-samples", str(COUNT),
               "--metrics", "is", "--labels", "balanced", "--seed", "3", "--ema", "0.99"]
    evaluate(folder, *command, "--guidance-scales", "1", "2")
    written = sorted(path.name for path in (folder / "run" / "evaluation").iterdir())
    assert written == ["guidance_step_0000002.png", "step_0000002_heun3_guidance_1_8.json",
                       "step_0000002_heun3_guidance_2_8.json"]
    one, two = (json.loads((folder / "run" / "evaluation" / name).read_text()) for name in written[1:])
    samples = one["samples"]
    assert samples["sampler"]["guidance_scale"] == 1 and two["samples"]["sampler"]["guidance_scale"] == 2
    assert (samples["step"], samples["ema_decay"], samples["seed"], samples["labels"]) == (2, 0.99, 3, "balanced")
    assert samples["sampler"]["name"] == "heun" and samples["sampler"]["steps"] == 3
    assert samples["images_seen"] == 2 * 16 and samples["image_size"] == [8, 8]
    assert samples["vae_sha256"] == sha256_of(folder / "vae.safetensors") and len(samples["parameters_sha256"]) == 64
    assert "warning: 8 balanced labels of 10 classes give 8 of them one image more" in capsys.readouterr().out

    evaluate(folder, *command, "--sampler.guidance-scale", "2")  # is there already
    assert "guidance_2_8.json, which has it already" in capsys.readouterr().out

    with open(folder / "run" / "metrics.jsonl", "a") as log:  # as an evaluation in training writes it
        log.write('{"step": 2, "time": 0.0, "eval/fid": 300.0, "eval/seconds": 1.0}\n')
    main(["--plot", str(folder / "run"), "--output", str(tmp_path / "fid.svg")])
    assert "3 results drawn in" in capsys.readouterr().out
    assert "in training, EMA 0.9, heun 3 steps" in (tmp_path / "fid.svg").read_text()

    kept = tmp_path / "kept.npz"
    evaluate(folder, *command, "--save-samples", str(kept), "--output", str(tmp_path / "kept.json"))
    with np.load(kept) as drawn:
        assert drawn["arr_0"].shape == (COUNT, 8, 8, 3)
        np.testing.assert_allclose(one["metrics"]["is"], inception_score(drawn["arr_0"]), rtol=1e-5)
        assert json.loads(str(drawn["settings"]))["parameters_sha256"] == samples["parameters_sha256"]
    assert json.loads((tmp_path / "kept.json").read_text())["metrics"] == pytest.approx(one["metrics"], rel=1e-6)


def test_greyscale_samples_are_scored_as_three_equal_channels(folder, tmp_path):
    np.savez(tmp_path / "grey.npz", arr_0=images(3)[..., :1])
    evaluate(folder, "--samples", str(tmp_path / "grey.npz"), "--metrics", "is")
    result = json.loads((tmp_path / "grey.json").read_text())
    truth = inception_score(images(3)[..., :1].repeat(3, axis=3))
    np.testing.assert_allclose(result["metrics"]["is"], truth, rtol=1e-5)
