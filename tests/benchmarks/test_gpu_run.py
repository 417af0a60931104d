"""The run that a GPU makes with the time that is left: stopped by the clock, its checkpoint is sampled and judged."""

import dataclasses
import json
import sys
import tarfile

import pytest
from PIL import Image

from gspn_jax.config import ConfigError
from tests.benchmarks import scripts

gpu_run, image_loader = scripts.load("gpu_run"), scripts.load("image_loader")


@pytest.mark.slow
def test_a_run_that_the_clock_stops_is_sampled_and_judged(tmp_path, monkeypatch):
    for part, count in (("train", 60), ("test", 30)):
        image_loader.make_images(tmp_path / "cifar" / part, 32, count)
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "cifar", "cifar")
    make_config = gpu_run.make_config

    def endless(*arguments):
        config = make_config(*arguments)
        return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1_000_000))

    monkeypatch.setattr(gpu_run, "make_config", endless)
    monkeypatch.setattr(gpu_run, "SHORTEST", 5.0)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "gpu_run.py",
            "--rehearse",
            "--images",
            str(tmp_path / "cifar.tar.gz"),
            "--seconds",
            "0",
            "--samples",
            "20",
            "--grid",
            str(tmp_path / "samples.png"),
            "--out",
            str(tmp_path / "run.json"),
            "--run-dir",
            str(tmp_path / "run"),
        ],
    )
    gpu_run.main()
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["steps"] >= 1 and f"stopped by SIGTERM and saved at step {found['steps']}" in found["ended"]
    assert found["images_seen"] == 8 * found["steps"] and found["judge"]["num_samples"] == 20
    assert [line["step"] for line in found["curve"]][-1:] == [found["steps"]]
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width > 2 * 64  # two of each class, side by side


def test_a_folder_without_test_images_gets_a_sentence(tmp_path):
    (tmp_path / "train").mkdir()
    with (
        pytest.raises(ConfigError, match=r"must hold the folders train and test, found no test in "),
        gpu_run.unpacked(tmp_path),
    ):
        pass


def test_the_curve_is_thinned_out_and_ends_with_the_last_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, 1001)))
    steps = [line["step"] for line in gpu_run.curve(tmp_path)]
    assert steps[-1] == 1000 and len(steps) == 200 and steps == sorted(set(steps))


def test_rates_are_those_of_what_was_logged_after_the_start():
    config = gpu_run.make_config(scripts.FOLDER, "unused", 10, True)
    lines = [{"step": n, "loss": 1 / n, "images_per_second": rate} for n, rate in ((1, 0.1), (2, 30.0), (3, 10.0))]
    found = gpu_run.summary(config, lines)
    assert (found["steps"], found["images_seen"], found["last_loss"]) == (3, 24, 1 / 3)
    assert found["images_per_second"] == 20.0 and "mfu" not in found
