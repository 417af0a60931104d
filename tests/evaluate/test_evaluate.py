"""python -m gspn_jax.evaluate as a user calls it: an .npz, a folder, a run on latents, a sweep, and wrong requests."""

import dataclasses
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

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
from gspn_jax.training.train import train
from tests.autoencoder import numpy_vae
from tests.quick_compile import QUICK_COMPILE
from tests.training import tiny

ROOT = pathlib.Path(__file__).parents[2]
COUNT = 5
"""Samples and reference images: a part of one batch of the eight devices."""


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


@functools.cache
def jitted():
    return jax.jit(inception.network)


def features_of(images: np.ndarray) -> inception.Features:
    """On one device, one image after the other, as float64."""
    params = inception.random_params(0)
    found = [jitted()(params, inception.resize(image[None])) for image in images]
    return inception.Features(*(np.concatenate(parts).astype(np.float64) for parts in zip(*found, strict=True)))


def inception_score(logits: np.ndarray) -> float:
    p = scipy.special.softmax(logits, axis=1)
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
    evaluate(
        folder,
        "--samples",
        str(tmp_path / "s.npz"),
        "--reference",
        str(folder / "ref.npz"),
        "--metrics",
        "fid",
        "is",
        "precision",
        "recall",
    )
    result = json.loads((tmp_path / "s.json").read_text())
    assert list(result["metrics"]) == ["fid", "is", "precision", "recall"]

    x, y = features_of(images(2)), features_of(images(1))
    np.testing.assert_allclose(result["metrics"]["fid"], frechet(x.pool, y.pool), rtol=1e-4)
    np.testing.assert_allclose(result["metrics"]["is"], inception_score(x.logits), rtol=1e-5)

    samples = result["samples"]
    assert samples["count"] == COUNT and samples["image_size"] == [8, 8] and samples["seed"] == 7
    assert samples["sha256"] == sha256_of(tmp_path / "s.npz")
    assert result["reference"]["sha256"] == sha256_of(folder / "ref.npz")
    assert result["inception"]["sha256"] == sha256_of(folder / "inception.safetensors")
    assert result["environment"]["devices"] == "8 x cpu" and result["environment"]["versions"]["jax"] == jax.__version__
    shown = capsys.readouterr().out
    assert f"FID              {result['metrics']['fid']:.6g}" in shown and "5 of 8x8 from" in shown
    assert "warning: 5 samples, where published numbers are of 50,000" in shown


def test_a_folder_of_images_is_scored_as_the_npz_of_them(folder, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(images(2)):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{number}.png")
    evaluate(folder, "--samples", str(tmp_path / "pictures"), "--metrics", "is", "--image-size", "8")
    found = json.loads((tmp_path / "pictures.json").read_text())["metrics"]
    assert found == {"is": pytest.approx(inception_score(features_of(images(2)).logits), rel=1e-5)}
    assert "warning: the images were scaled and cropped to 8x8 here, by ADM's filter" in capsys.readouterr().out


def command(folder, *flags: str) -> None:
    evaluate(
        folder,
        "--run",
        str(folder / "run"),
        "--vae",
        str(folder / "vae.safetensors"),
        "--metrics",
        "is",
        "--num-samples",
        str(COUNT),
        "--labels",
        "balanced",
        "--seed",
        "3",
        "--ema",
        "0.99",
        *flags,
    )


def test_a_run_on_latents_is_drawn_decoded_and_scored_without_files(folder, tmp_path, capsys):
    command(folder)
    (path,) = (folder / "run" / "evaluation").iterdir()
    assert path.name == "step_0000002_heun3_guidance_1_5.json"
    result = json.loads(path.read_text())
    samples = result["samples"]
    assert (samples["step"], samples["ema_decay"], samples["seed"], samples["labels"]) == (2, 0.99, 3, "balanced")
    assert samples["sampler"]["name"] == "heun" and samples["sampler"]["steps"] == 3
    assert samples["images_seen"] == 2 * 16 and samples["image_size"] == [8, 8]
    assert samples["vae_sha256"] == sha256_of(folder / "vae.safetensors") and len(samples["parameters_sha256"]) == 64
    assert "warning: 5 balanced labels of 10 classes give 5 of them one image more" in capsys.readouterr().out

    command(folder)
    assert "guidance_1_5.json, which has it already" in capsys.readouterr().out

    kept = tmp_path / "kept.npz"
    command(folder, "--save-samples", str(kept), "--output", str(tmp_path / "kept.json"))
    with np.load(kept) as drawn:
        assert drawn["arr_0"].shape == (COUNT, 8, 8, 3)
        truth = inception_score(features_of(drawn["arr_0"]).logits)
        assert json.loads(str(drawn["settings"]))["parameters_sha256"] == samples["parameters_sha256"]
    for metrics in (result["metrics"], json.loads((tmp_path / "kept.json").read_text())["metrics"]):
        assert metrics == {"is": pytest.approx(truth, rel=1e-5)}

    with open(folder / "run" / "metrics.jsonl", "a") as log:  # as an evaluation in training writes it
        log.write('{"step": 2, "time": 0.0, "eval/fid": 300.0, "eval/seconds": 1.0}\n')
    main(["--plot", str(folder / "run"), "--output", str(tmp_path / "fid.svg")])
    assert "2 results drawn in" in capsys.readouterr().out
    assert "in training, EMA 0.9, heun 3 steps" in (tmp_path / "fid.svg").read_text()


@pytest.mark.slow
def test_a_sweep_evaluates_each_guidance_scale_once_and_draws_them(folder, capsys):
    command(folder, "--guidance-scales", "2", "3", "--seed", "9")
    results = folder / "run" / "evaluation"
    for scale in (2, 3):
        samples = json.loads((results / f"step_0000002_heun3_guidance_{scale}_5.json").read_text())["samples"]
        assert samples["sampler"]["guidance_scale"] == scale and samples["seed"] == 9
    assert (results / "guidance_step_0000002.png").exists()
    capsys.readouterr()
    command(folder, "--guidance-scales", "2", "2.5", "--seed", "9")
    said = capsys.readouterr().out
    assert said.count("which has it already") == 1 and said.count("written to") == 1


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    call = [
        sys.executable,
        "-m",
        "gspn_jax.evaluate",
        "--run",
        str(folder / "run"),
        "--inception",
        str(folder / "inception.safetensors"),
        "--vae",
        str(folder / "vae.safetensors"),
        "--reference",
        str(folder / "ref.npz"),
        "--metrics",
        "is",
        "kid",
        "precision",
        "--num-samples",
        "6",
        "--batch-size",
        "4",
    ]
    env = os.environ | {"XLA_FLAGS": QUICK_COMPILE, "PYTHONPATH": str(ROOT)}
    results = []
    for count in (1, 2):
        output = tmp_path / f"{count}.json"
        place = [
            ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", str(i)] if count == 2 else []
            for i in range(count)
        ]
        processes = [
            subprocess.Popen(
                [*call, "--output", str(output), *flags],
                env=env,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for flags in place
        ]
        try:
            said = [process.communicate(timeout=400)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * count, said
        assert [f"written to {output}" in text for text in said] == [True] + [False] * (count - 1)
        results.append(json.loads(output.read_text()))
    one, two = results
    assert one["samples"] == two["samples"] and two["environment"]["hosts"] == 2
    assert two["metrics"] == {name: pytest.approx(value, rel=1e-5) for name, value in one["metrics"].items()}
