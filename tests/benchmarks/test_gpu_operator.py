"""The script that waits for a GPU runs to its end: interpreted, at sizes that take seconds."""

import dataclasses
import importlib.util
import json
import pathlib
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from kernels import compat, devices, tiles

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu_operator.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("gpu_operator", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(tiles, "ROWS", 8)
    resolve, small = module.models.resolve, {"hidden": 64, "groups": 64, "proxy": 16}
    models = SimpleNamespace(resolve=lambda config: dataclasses.replace(resolve(config), **small))
    for name, value in {
        "CORRECT": [(1, 4, 4, 64, 64, True, 2)], "CORRECT_LOW_RANK": [(2, 4, 64, 16)], "COPIED_VALUES": 2**10,
        "CALLS": 1, "BANDWIDTH": [(1, 4, 4, 64, 4, None)], "TOKENS": [(1, 2), (1, 4)],
        "WIDTH": 64, "HEADS": 1, "CONVOLUTIONS": [(1, 4, 4, 8, 3)], "LOW_RANK": [(2, 4, 64, 16)],
        "BLOCKS": [("GSPN-S/2", 2, 4)], "models": models,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    with devices.for_device(dataclasses.replace(devices.DEVICES["9.0"], expanding=devices.Expanding(warpgroups=2))):
        yield module


@pytest.mark.slow
def test_every_table_is_filled(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_operator.py", "--repeats", "1", "--out", str(tmp_path / "results.json")])
    with compat.interpreted(detect_races=False):
        script.main()
    record = json.loads((tmp_path / "results.json").read_text())
    assert len(record["correctness"]) == 3 and all(row["correct"] for row in record["correctness"])
    rows = {name: record[name] for name in ("operator", "attention", "low_rank", "blocks", "convolutions")}
    assert {name: len(table) for name, table in rows.items()} == {
        "operator": 2, "attention": 4, "low_rank": 2, "blocks": 2, "convolutions": 2}
    assert all(value > 0 for table in rows.values() for row in table for name, value in row.items()
               if name.endswith("_ms") or name in ("ratio", "share_of_copy"))


@pytest.mark.slow
def test_nothing_is_timed_where_the_kernel_is_wrong(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_operator.py"])
    monkeypatch.setattr(script, "propagate", lambda x, *others, **options: 1.1 * x)
    with compat.interpreted(detect_races=False), pytest.raises(SystemExit, match="nothing was timed"):
        script.main()


def test_bytes_are_those_of_each_input_once_and_each_output_once(script):
    arrays = script.random_inputs(1, 16, 16, 64, 64, False, jnp.bfloat16)
    values = 16 * 16 * 64
    # x, y and their cotangents 2 bytes each, gates 24, lam and out_gate 8 each, and so theirs; merge is four float32
    assert script.needed_bytes(arrays) == {"forward": 44 * values + 16, "backward": 86 * values + 32}


def test_where_the_lines_cross(script):
    rows = [{"tokens": tokens, "ratio": ratio} for tokens, ratio in ((256, 0.25), (1024, 0.5), (4096, 2.0))]
    assert script.crossing(rows) == pytest.approx(2048)  # as far below 1 before as above it after
    assert script.crossing(rows[1:] + rows[:1]) == pytest.approx(2048)
    assert script.crossing(rows[2:]) == 4096
    assert script.crossing(rows[:2]) is None
