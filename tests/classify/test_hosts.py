"""Two processes that are one job train and evaluate as one process with their devices does."""

import json

import numpy as np
import pytest

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
