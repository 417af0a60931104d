"""Two processes that are one job train and evaluate as one process with their devices does."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from gspn_jax.runs import checkpoints
from tests.classify import tiny
from tests.training.processes import end, start, start_hosts

SCRIPT = """
import sys
from gspn_jax.classify import main
from tests.classify import tiny

class Patch:
    setattr = staticmethod(setattr)

tiny.use(Patch)
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_validation_image_that_one_host_cannot_read_ends_both_with_its_name(tmp_path, command):
    """The second host has copies of its own, of the same names and sizes, none of which is an image."""
    images, validation = (tiny.make_images(tmp_path / name, each, each) for name, each in (("train", 5), ("val", 7)))
    broken = shutil.copytree(validation, tmp_path / "copies")
    for path in broken.rglob("*.png"):
        path.write_bytes(bytes(path.stat().st_size))
    config, run = tmp_path / "config.py", tmp_path / "run"
    text = f"from tests.classify import tiny\nconfig = tiny.config({str(run)!r}, {images!r}, {validation!r})\n"
    config.write_text(text)
    if command == "train":
        arguments = [["train", "--config", str(config), "--eval.path", str(path)] for path in (validation, broken)]
    else:
        ((code, errors),) = end(start(["-c", SCRIPT, "train", "--config", str(config)], devices=2))
        assert code == 0, errors
        flags = ("--run", str(run), "--batch-size", "8", "--output", str(tmp_path / "scores.json"))
        arguments = [["evaluate", "--images", str(path), *flags] for path in (validation, broken)]
    ended = end(*start_hosts([["-c", SCRIPT, *one] for one in arguments], 2), timeout=120)
    for says, (code, errors) in zip(("error: host 1 says: ", "error: "), ended, strict=True):
        assert code == 2 and "Traceback" not in errors, errors
        assert f"{says}{broken}" in errors and "is not a usable image" in errors, errors
    assert not pathlib.Path(tmp_path / "scores.json").exists()
    assert checkpoints.steps(run)[:1] == [2]  # saved before it was evaluated


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    """To the bit for training, and the same counts: 21 images in batches of 8 over two hosts leave a ragged end."""
    images, validation = (tiny.make_images(tmp_path / name, each, each) for name, each in (("train", 5), ("val", 7)))
    config = tmp_path / "config.py"
    config.write_text(f"from tests.classify import tiny\nconfig = tiny.config('unused', {images!r}, {validation!r})\n")
    for command in ("train", "evaluate"):
        arguments = [
            ["-c", SCRIPT, "train", "--config", str(config), "--run-dir", run]
            if command == "train"
            else [
                "-c",
                SCRIPT,
                "evaluate",
                "--run",
                run,
                "--images",
                validation,
                "--batch-size",
                "8",
                "--output",
                f"{run}.json",
            ]
            for run in (str(tmp_path / "one"), str(tmp_path / "two"))
        ]
        ended = end(start(arguments[0], devices=2), *start_hosts(arguments[1], 2))
        assert [code for code, _ in ended] == [0, 0, 0], ended
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    kept = ("loss", "eval/top1", "eval/top1_ema_0.9", "eval/loss")
    one, two = ([{name: line[name] for name in kept if name in line} for line in log] for log in logs)
    assert one == two and any("eval/top1" in line for line in one)
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert results[1]["machine"]["hosts"] == 2
    for alone, both in zip(*(result["scores"] for result in results), strict=True):
        assert (alone["top1"], alone["parameters_sha256"]) == (both["top1"], both["parameters_sha256"])
        np.testing.assert_allclose(alone["loss"], both["loss"], rtol=1e-6)
