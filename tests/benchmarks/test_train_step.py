"""The benchmark of whole models: a model that fails costs no other, and a config file is the model it trains."""

import json
import sys

import pytest

from gspn_jax.config import ConfigError
from tests.benchmarks import scripts

train_step = scripts.load("train_step")


def run(monkeypatch, out, *arguments):
    shape = ["--batch-size", "8", "--image-size", "4", "--channels", "1", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *shape, *arguments])
    monkeypatch.syspath_prepend(scripts.FOLDER)  # the processes that it starts have the same
    with pytest.raises(SystemExit) as stopped:
        train_step.main()
    return int(stopped.value.code), json.loads(out.read_text())["results"]


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
