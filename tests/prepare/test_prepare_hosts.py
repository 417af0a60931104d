"""Two and three real processes of one job prepare what one does, to the byte; none waits for one that is gone."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gspn_jax.cli import USAGE_ERROR
from gspn_jax.metrics import inception
from tests.autoencoder import numpy_vae
from tests.quick_compile import QUICK_COMPILE

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
COUNT = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """images/ in two classes, vae.safetensors and inception.safetensors of random weights."""
    folder = tmp_path_factory.mktemp("hosts")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(path)
    save_file(numpy_vae.random_state_dict(), folder / "vae.safetensors")
    save_file(inception.random_state_dict(0), folder / "inception.safetensors")
    return folder


def prepare(kind: str, processes: int, cwd: pathlib.Path, *flags: str) -> tuple[list[int], list[str]]:
    """Exit codes, and what was said, of the processes of one job."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = ["--coordinator", f"localhost:{port}", "--num-processes", str(processes), "--process-id"]
    env = os.environ | {"XLA_FLAGS": QUICK_COMPILE, "PYTHONPATH": str(ROOT), "GSPN_HEARTBEAT_SECONDS": "10"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "gspn_jax.prepare", kind, *flags, *([*place, str(i)] if processes > 1 else [])],
            env=env,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        said = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


def latents(folder, images="images") -> list[str]:
    return [
        "--images",
        str(folder / images),
        "--vae",
        str(folder / "vae.safetensors"),
        "--image-size",
        "8",
        "--shard-size",
        "3",
        "--batch-size",
        "2",
        "--threads",
        "2",
        "--output",
        "out",
    ]


def stats(folder) -> list[str]:
    return [
        "--images",
        str(folder / "images"),
        "--inception",
        str(folder / "inception.safetensors"),
        "--image-size",
        "10",
        "--save-every",
        "5",
        "--keep",
        "6",
        "--keep-images",
        "--batch-size",
        "4",
        "--output",
        "ref.npz",
    ]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("kind", "flags"), [("latents", latents), ("stats", stats)])
def test_two_and_three_processes_write_the_bytes_of_one(folder, tmp_path, kind, flags):
    results = []
    for processes in (1, 2, 3):
        cwd = tmp_path / str(processes)
        cwd.mkdir()
        codes, said = prepare(kind, processes, cwd, *flags(folder))
        assert codes == [0] * processes, said
        results.append(contents(cwd))
    assert results[0] and all(result == results[0] for result in results)


def test_a_process_that_finds_a_bad_image_says_so_and_the_other_does_not_wait_for_ever(folder, tmp_path):
    shutil.copytree(folder / "images", tmp_path / "images")
    shutil.copy(folder / "vae.safetensors", tmp_path)
    (tmp_path / "images/a/06.png").write_bytes(b"no image")  # the fourth of its class: in the second shard
    codes, said = prepare("latents", 2, tmp_path, *latents(tmp_path))
    assert codes[1] == USAGE_ERROR and "06.png is not a usable image" in said[1]
    assert codes[0] == USAGE_ERROR, said[0]
    assert "error: host 1 says: " in said[0] and "06.png is not a usable image" in said[0]
    codes, said = prepare("latents", 2, tmp_path, *latents(tmp_path), "--bad-images", "skip")
    assert codes == [USAGE_ERROR] * 2 and "was begun with other settings (bad_images)" in said[0]
