"""Commands of docs/text_to_image.md from captions to scores, run as they are written, with a tiny model and overrides
of sizes alone."""

import json
import pathlib
import re
import runpy
import shlex
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gspn_jax.metrics import inception
from tests.text.tiny_clip import write_folder as write_clip
from tests.text_to_image import distilling
from tests.text_to_image.tiny_folder import write_folder

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
SMALLER = {
    "distill": "--train.steps=2 --train.batch-size=8 --train.save-every=1 --train.log-every=1 "
    "--model.gspn.proxy-ratio=4 --train.precision params=float32,compute=float32",
    "--prompt": "--size 16 16 --steps 2 --sampler ddim --images 5",
}


def commands(section: str) -> list[str]:
    """Those of a section of the page, one a line."""
    text = (ROOT / "docs/text_to_image.md").read_text()
    part = text.split(f"## {section}\n")[1].split("\n## ")[0]
    block = re.search(r"```\n(.*?)```", part, re.DOTALL)[1]
    return block.replace("\\\n", " ").strip().splitlines()


def test_every_command_of_the_page_works_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(pathlib.Path("FOLDER"), *distilling.TINY)
    distilling.write_images(pathlib.Path("IMAGES"))
    write_clip(pathlib.Path("CLIP"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    pathlib.Path("COCO").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 31, 3), np.uint8)).save(f"COCO/{i}.png")
    names = [f"dog_{i}.png" for i in range(5)]
    pathlib.Path("COCO.json").write_text(json.dumps(dict.fromkeys(names, "a dog")))
    save_file(inception.random_state_dict(0), "INCEPTION.safetensors")

    for command in commands("GSPN layers by distillation") + commands("Scores"):
        words = shlex.split(command.replace(" 512", " 16").replace("INCEPTION", "INCEPTION.safetensors"))
        assert words[:2] == ["python", "-m"], command
        if words[2].endswith("evaluate") and not pathlib.Path("DRAWN").exists():
            pathlib.Path("DRAWN").mkdir()
            for name in names:
                pathlib.Path(name).rename(f"DRAWN/{name}")
        more = [word for part, flags in SMALLER.items() if part in words for word in shlex.split(flags)]
        if words[2].endswith("prepare") and words[3] == "captions":
            more = ["--batch-size", "8"]
        monkeypatch.setattr(sys, "argv", ["-m", *words[3:], *more])
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes types
            runpy.run_module(words[2], run_name="__main__")
    scores = [json.loads(pathlib.Path(name).read_text())["metrics"] for name in ("clip.json", "coco.json")]
    assert all(0 <= one["clip"] <= 100 for one in scores) and scores[0] != scores[1]
    assert "FID" in capsys.readouterr().out
