"""The ratios that the training benchmark prints, and those it refuses to."""

import argparse
import dataclasses
import importlib.util
import pathlib

import pytest

from gspn_jax.config import ModelConfig
from gspn_jax.models import attention

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "train_step.py"
ARGUMENTS = argparse.Namespace(batch_size=8, image_size=32)
DIT, GSPN = ModelConfig(preset="DiT-S/2"), ModelConfig(preset="GSPN-S/2")


@dataclasses.dataclass(frozen=True)
class Device:
    device_kind: str = "Tesla T4"
    compute_capability: str = "7.5"
    platform: str = "gpu"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_on_a_gpu_there_is_no_ratio_to_attention_that_is_not_flash_attention(script):
    with attention.traced_for(Device()):
        dit, gspn = ({"images_per_second": rate, **script.attention_of(model, ARGUMENTS, "bfloat16")}
                     for model, rate in ((DIT, 50.0), (GSPN, 100.0)))
    assert dit["attention"] == "xla" and "found Tesla T4" in dit["no_ratio"]
    assert script.ratio(gspn, dit, "images_per_second") is None  # neither to it
    assert script.ratio(dit, gspn, "images_per_second") is None  # nor of it
    assert script.ratio(gspn, gspn, "images_per_second") == 1


def test_on_a_cpu_attention_has_nothing_better_and_is_compared_with(script):
    dit, gspn = ({"images_per_second": rate, **script.attention_of(model, ARGUMENTS, "float32")}
                 for model, rate in ((DIT, 50.0), (GSPN, 100.0)))
    assert (dit["attention"], gspn["attention"]) == ("xla", None)
    assert script.ratio(gspn, dit, "images_per_second") == 2
