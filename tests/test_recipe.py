"""The road to ImageNet by the commands of the README, on 250 of its photographs: networks small, weights random."""

import json
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gspn_jax.autoencoder import AutoencoderConfig
from gspn_jax.metrics import inception
from tests.autoencoder import numpy_vae
from tests.quick_compile import QUICK_COMPILE
from tests.real_images import archive

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
PHOTOGRAPHS = 250
VAE = AutoencoderConfig(channels=(32, 32, 32, 32), layers=1)
SMALL = {
    "gspn": "--model.preset GSPN-S/2 --model.hidden 32 --model.depth 4",
    "dit": "--model.preset DiT-S/2 --model.hidden 32 --model.depth 2 --model.heads 2",
}


def call(folder: pathlib.Path, command: str) -> str:
    """Runs `python COMMAND` in `folder`; returns what it said."""
    words = [
        str(ROOT / word) if word.split("/")[0] in ("train_dit.py", "sample.py", "configs") else word
        for word in command.split()
    ]
    # 500 views through the encoder are worth compiling for, the rest is not
    level = "" if "latents" in words else QUICK_COMPILE
    env = os.environ | {"XLA_FLAGS": level, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=env,
        timeout=900,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    return done.stdout


def train(folder: pathlib.Path, name: str, latents: str, classes: int, steps: int) -> None:
    call(
        folder,
        f"train_dit.py --config configs/{name}.py --data.path {latents} {SMALL[name.split('_')[0]]} "
        f"--data.num-classes {classes} --train.steps {steps} --train.batch-size 8 --train.log-every 1 "
        f"--optimizer.warmup-steps 1 --sampler.steps 3 --run-dir runs/{name}",
    )
    lines = [json.loads(line) for line in (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """IMAGENET/, FEW/ with eight of its classes, VAE.safetensors and INCEPTION.safetensors."""
    folder = tmp_path_factory.mktemp("recipe")
    with tarfile.open(archive("imagenet_250.tar")) as tar:
        tar.extractall(folder / "IMAGENET", filter="data")
    (folder / "FEW").mkdir()
    for path in sorted(path for path in (folder / "IMAGENET").iterdir() if path.is_dir())[:8]:
        (folder / "FEW" / path.name).symlink_to(path)
    save_file(numpy_vae.random_state_dict(VAE), folder / "VAE.safetensors")
    save_file(inception.random_state_dict(0), folder / "INCEPTION.safetensors")
    return folder


def test_256_pixels_from_photographs_to_fid(folder):
    said = call(
        folder, "-m gspn_jax.prepare latents --images IMAGENET --vae VAE.safetensors --batch-size 8 --output LATENTS"
    )
    assert f"{PHOTOGRAPHS} latents of {PHOTOGRAPHS} classes" in said
    for name in ("gspn_xl_2", "gspn_l_2", "gspn_b_2", "dit_xl_2"):
        train(folder, name, "LATENTS", PHOTOGRAPHS, steps=4 if name == "gspn_xl_2" else 1)

    drawn = "--num-samples 8 --batch-size 4 --sampler.steps 3"
    call(folder, f"sample.py --run runs/gspn_xl_2 --vae VAE.safetensors {drawn} --output samples.npz")
    with np.load(folder / "samples.npz") as samples:
        assert samples["arr_0"].shape == (8, 256, 256, 3) and samples["arr_0"].std() > 10
    said = call(
        folder,
        "-m gspn_jax.prepare stats --images IMAGENET --image-size 256 --keep 50 --output REF.npz "
        "--inception INCEPTION.safetensors",
    )
    assert f"statistics of {PHOTOGRAPHS} images of 256x256" in said

    against = "--reference REF.npz --inception INCEPTION.safetensors"
    call(folder, f"-m gspn_jax.evaluate --samples samples.npz {against}")
    call(folder, f"-m gspn_jax.evaluate --run runs/gspn_xl_2 --vae VAE.safetensors {drawn} {against}")
    (result,) = (folder / "runs/gspn_xl_2/evaluation").glob("*.json")
    of_run, of_file = (json.loads(path.read_text())["metrics"] for path in (result, folder / "samples.json"))
    assert of_run == pytest.approx(of_file, rel=1e-5)  # the same images, in batches of other sizes
    assert of_run.keys() == {"fid", "sfid", "is", "kid", "precision", "recall"} and of_run["fid"] > 0

    call(folder, "-m gspn_jax.convert export --run runs/gspn_xl_2 --output release")
    assert f"FID {of_run['fid']:.5g}" in (folder / "release/README.md").read_text()
    call(folder, "-m gspn_jax.convert import --weights release/model.safetensors --output runs/back")
    call(folder, f"sample.py --run runs/back --vae VAE.safetensors {drawn} --output again.npz")
    with np.load(folder / "samples.npz") as samples, np.load(folder / "again.npz") as again:
        np.testing.assert_array_equal(samples["arr_0"], again["arr_0"])
    call(folder, f"-m gspn_jax.evaluate --run runs/back --vae VAE.safetensors {drawn} {against}")
    (result,) = (folder / "runs/back/evaluation").glob("*.json")
    assert json.loads(result.read_text())["metrics"] == of_run


def test_512_pixels_and_sizes_never_trained_on(folder):
    call(
        folder,
        "-m gspn_jax.prepare latents --images FEW --vae VAE.safetensors --image-size 512 --batch-size 4 "
        "--output LATENTS_512",
    )
    for name in ("gspn_xl_2_512", "gspn_l_2_512", "dit_xl_2_512"):
        train(folder, name, "LATENTS_512", 8, steps=1)
    call(
        folder,
        "sample.py --run runs/gspn_xl_2_512 --vae VAE.safetensors --classes 0 --per-class 1 --sampler.steps 2 "
        "--image-size 64 96 --output wide.png",
    )
    with Image.open(folder / "wide.png") as image:
        assert image.width >= 768 and image.height >= 512
