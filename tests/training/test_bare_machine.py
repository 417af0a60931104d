"""A machine that has JAX and little else trains from memory, evaluates, saves and goes on: to the bits of any other."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from gspn_jax.config import DataConfig
from gspn_jax.training.train import train
from tests.training import tiny
from tests.training.bare import BARE
from tests.training.processes import ROOT, everything

SCRIPT = (
    BARE
    + """
import dataclasses, json

import jax, numpy as np

from gspn_jax import cli
from gspn_jax.config import EvalConfig, from_dict
from gspn_jax.metrics import extractor, inception
from gspn_jax.metrics.inception import Features
from gspn_jax.training import evaluation
from gspn_jax.training.train import train

class Small(extractor.Extractor):  # in place of Inception, whose compilation takes longest
    def __init__(self, params, **settings):
        super().__init__({}, **settings)
        self._resize = lambda images: images
        self._network = jax.jit(lambda params, images: Features(*(
            images.reshape(len(images), -1)[:, :size] / 255.0 for size in (12, 6, 8))))

evaluation.Extractor = Small
inception.require = lambda path, flag: path
inception.read = inception.from_state_dict = lambda *_: {}
cli.setup()
config = from_dict(json.loads(sys.argv[1]))
config = dataclasses.replace(config, eval=EvalConfig(every=3, num_samples=11, metrics=("is",), batch_size=8, steps=2))
train(config)
"""
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(40):
        path = root / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)
    return root


@pytest.mark.slow
def test_a_bare_machine_goes_on_from_memory_with_the_run_that_grain_fed(images, tmp_path):
    data = DataConfig(source="folder", path=str(images), image_size=8, channels=3, num_classes=2, flip=True)
    whole = tiny.config(tmp_path / "whole", steps=6, save_every=3, log_every=1)
    # a constant learning rate, so that a run of three steps is the beginning of one of six
    steady = dataclasses.replace(whole.optimizer, warmup_steps=0, final_learning_rate=whole.optimizer.learning_rate)
    whole = dataclasses.replace(whole, data=data, optimizer=steady)
    part = dataclasses.replace(whole, run_dir=str(tmp_path / "part"))
    train(whole)
    train(dataclasses.replace(part, train=dataclasses.replace(part.train, steps=3)))
    bare = dataclasses.replace(part, data=dataclasses.replace(data, in_memory=True))
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(dataclasses.asdict(bare))],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert "going on from step 3" in process.stdout + process.stderr
    assert "no TensorBoard events are written: tensorboardX is not installed" in process.stderr
    logs = {
        run: [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "part")
    }
    losses = {run: [line["loss"] for line in lines if "loss" in line] for run, lines in logs.items()}
    assert losses["part"] == losses["whole"] and len(losses["whole"]) == 6
    assert [line["step"] for line in logs["part"] if "eval/is" in line] == [3, 6]  # the first one had been missed
    jax.tree.map(np.testing.assert_array_equal, everything(tmp_path / "whole"), everything(tmp_path / "part"))
