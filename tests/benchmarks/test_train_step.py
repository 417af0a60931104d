"""The benchmark of whole models: what fails costs no other, files are what they train, which ratios are refused."""

import argparse
import dataclasses
import json
import sys

import pytest

from gspn_jax.config import ConfigError, ModelConfig
from gspn_jax.models import attention
from tests.benchmarks import scripts

train_step = scripts.load("train_step")
ARGUMENTS = argparse.Namespace(batch_size=8, image_size=32)
DIT, GSPN = ModelConfig(preset="DiT-S/2"), ModelConfig(preset="GSPN-S/2")


@dataclasses.dataclass(frozen=True)
class Device:
    device_kind: str = "Tesla T4"
    compute_capability: str = "7.5"
    platform: str = "gpu"


def run(monkeypatch, out, *arguments):
    shape = ["--batch-size", "8", "--image-size", "4", "--channels", "1", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *shape, *arguments])
    monkeypatch.syspath_prepend(scripts.FOLDER)  # the processes that it starts have the same
    with pytest.raises(SystemExit) as stopped:
        train_step.main()
    return int(stopped.value.code), json.loads(out.read_text())["results"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--together"]], ids=["one by one", "together"])
def test_a_model_that_fails_costs_no_other(tmp_path, monkeypatch, flags, capsys):
    good = "GSPN-S/2:hidden=64,depth=2"
    code, rows = run(monkeypatch, tmp_path / "out.json", "--models", "Nonsense/2", good, "--measure", "forward", *flags)
    assert code == 1 and "ConfigError: model.preset must be one of" in rows["Nonsense/2"]["error"]
    assert rows[good]["forward_ms"] > 0 and rows[good]["parameters"] > 0
    assert "forward ms" in capsys.readouterr().out


def test_a_model_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    code, rows = run(monkeypatch, tmp_path / "out.json", "--models", "GSPN-S/2", "--limit", "0.2")
    assert code == 1 and rows == {"GSPN-S/2": {"error": "out of time"}}


def test_a_config_file_is_the_model_that_it_trains():
    file = str(scripts.FOLDER.parent / "configs/gspn_xl_2.py")
    model = train_step.parse_model(file, None)
    assert model.preset == "GSPN-XL/2" and model.drop_path == 0.1
    assert train_step.parse_model(file, "dots").remat == "dots"
    small = train_step.parse_model("DiT-S/2:mixer=gspn,hidden=192,heads=4", None)
    assert (small.mixer, small.hidden, small.heads, small.remat, small.drop_path) == ("gspn", 192, 4, "none", 0.0)
    with pytest.raises(ConfigError, match="--config must be a config file"):
        train_step.parse_model("configs/nothing.py", None)


def test_on_a_gpu_there_is_no_ratio_to_attention_that_is_not_flash_attention():
    with attention.traced_for(Device()):
        dit, gspn = (
            {"images_per_second": rate, **train_step.attention_of(model, ARGUMENTS, "bfloat16")}
            for model, rate in ((DIT, 50.0), (GSPN, 100.0))
        )
    assert dit["attention"] == "xla" and "found Tesla T4" in dit["no_ratio"]
    assert train_step.ratio(gspn, dit, "images_per_second") is None  # neither to it
    assert train_step.ratio(dit, gspn, "images_per_second") is None  # nor of it
    assert train_step.ratio(gspn, gspn, "images_per_second") == 1


def test_on_a_cpu_attention_has_nothing_better_and_is_compared_with():
    dit, gspn = (
        {"images_per_second": rate, **train_step.attention_of(model, ARGUMENTS, "float32")}
        for model, rate in ((DIT, 50.0), (GSPN, 100.0))
    )
    assert (dit["attention"], gspn["attention"]) == ("xla", None)
    assert train_step.ratio(gspn, dit, "images_per_second") == 2
