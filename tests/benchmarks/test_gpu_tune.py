"""The script that tunes the kernel for the GPU at hand: what it times, and what it may propose."""

import json
import sys

import jax.numpy as jnp
import pytest

from gspn_jax.kernels import devices
from tests.benchmarks import scripts

gpu_tune = scripts.load("gpu_tune")
PRESENT = devices.DEVICES["9.0"]


def rows(value, ratios, **others):
    return [{"case": str(n), "value": value, "ratio": ratio, "right": True} | others for n, ratio in enumerate(ratios)]


def test_the_fastest_that_is_right_in_every_case_is_proposed():
    standing = rows("1024", (1.0, 1.0))
    assert gpu_tune.proposed(standing) is None
    assert gpu_tune.proposed([*standing, *rows("512", (1.0, 1.03))]) is None  # 1.015 by the geometric mean
    assert gpu_tune.proposed([*standing, *rows("512", (1.0, 1.21))]) == ("512", pytest.approx(1.1))
    wrong = rows("256", (4.0, 4.0))
    wrong[1]["right"] = False
    failed = [*rows("2048", (4.0,)), {"case": "1", "value": "2048", "error": "no room"}]
    assert gpu_tune.proposed([*standing, *wrong, *failed, *rows("512", (1.0, 1.21))])[0] == "512"
    assert gpu_tune.proposed([]) is None


@pytest.mark.parametrize("knob", gpu_tune.KNOBS, ids=lambda knob: knob.field)
def test_a_knob_turns_one_field_of_a_device(knob):
    for value in knob.others:
        changed = knob.replaced(PRESENT, value)
        assert knob.of(changed) == value
        assert knob.replaced(changed, knob.of(PRESENT)) == PRESENT
    for device in devices.DEVICES.values():
        standing, *others = knob.values(device)
        assert standing == knob.of(device) and others and standing not in others
    assert {knob.of(device) for device in devices.DEVICES.values()} <= {*knob.others, knob.of(PRESENT)}


def test_no_more_shared_memory_is_tried_than_there_is():
    (knob,) = (knob for knob in gpu_tune.KNOBS if knob.field == "scan_bytes")
    small = devices.DEVICES["8.9"]
    assert knob.values(small) == [small.scan_bytes, 64 * devices.KIB]
    assert len(knob.values(PRESENT)) == len(knob.others)


def compare(monkeypatch, function, values):
    arrays = (jnp.arange(1.0, 5.0),)
    monkeypatch.setattr(gpu_tune, "build", lambda case: (function, arrays, None))
    times = {"1024": 3.0, "256": 1.0, "512": 1.5}
    monkeypatch.setattr(
        gpu_tune,
        "best_seconds",
        lambda runs, repeats, sizes: {key: times[key[0]] for key in runs if runs[key]() is not None},
    )
    case = gpu_tune.SMALL[0].cases[0]
    found = gpu_tune.compare(gpu_tune.Knob("joint_tile", values, (case,)), case, PRESENT, 1, gpu_tune.TINY)
    return {row["value"]: row for row in found}


def test_what_makes_no_other_program_is_not_timed_and_what_is_wrong_or_fails_is_said(monkeypatch):
    def function(x):
        tile = devices.current().joint_tile
        if tile == 7:
            raise ValueError("has no room")
        return {1024: x, 512: jnp.sin(x), 256: 2 * x / 2}.get(tile, x)

    found = compare(monkeypatch, function, (256, 512, 1024, 2048, 7))
    assert list(found) == ["1024", "256", "512", "2048", "7"]
    assert found["256"]["right"] and found["256"]["ratio"] == 3.0
    assert not found["512"]["right"]
    assert found["2048"]["same_program_as"] == "1024" and found["2048"]["ratio"] == 1.0
    assert found["7"]["error"] == "ValueError: has no room" and "ratio" not in found["7"]
    assert gpu_tune.proposed([*found.values()]) == ("256", pytest.approx(3.0))


def test_a_gradient_that_is_no_number_is_wrong(monkeypatch):
    def function(x):
        return x + 0 * jnp.sqrt(x - x) if devices.current().joint_tile == 256 else 1 * x

    found = compare(monkeypatch, function, (256,))
    assert not found["256"]["right"] and found["1024"]["right"]


def test_lines_that_the_device_has_no_room_for_are_left_out():
    for capability, longest in (("9.0", 2048), ("8.9", 1024)):
        with devices.for_device(capability):
            assert gpu_tune.refusal(gpu_tune.propagate(1, longest, longest, 8)) is None
            reason = gpu_tune.refusal(gpu_tune.propagate(1, 1, 2 * longest, 8))
            assert reason == f"has no room on chip for lines of {2 * longest} positions"


@pytest.mark.slow
def test_a_rehearsal_writes_every_row(tmp_path, monkeypatch, capsys):
    out = tmp_path / "tuning.json"
    monkeypatch.setattr(gpu_tune, "WORTH", 1e6)
    assert scripts.rehearse(monkeypatch, gpu_tune, "--fields", "depthwise.segment", "--out", str(out)) == 0
    record = json.loads(out.read_text())
    first, second, same = record["fields"]["depthwise.segment"]
    assert (first["value"], second["value"], same["value"]) == ("16", "2", "64")
    assert first["ratio"] == 1.0 and second["right"] and second["both_ms"] > 0
    assert same["same_program_as"] == "16"
    assert record["compute_capability"] == "9.0" and record["multiprocessors"] == 132
    assert "nothing is 1000000.0 times as fast as what stands in kernels/devices.py" in capsys.readouterr().out


def test_what_no_time_was_left_for_is_named(tmp_path, monkeypatch, capsys):
    out = tmp_path / "tuning.json"
    assert scripts.rehearse(monkeypatch, gpu_tune, "--limit", "-1", "--out", str(out)) == 0
    left_out = [f"{knob.field}, {case}: no time was left" for knob in gpu_tune.SMALL for case in knob.cases]
    assert json.loads(out.read_text())["left_out"] == left_out
    assert f"left out: {'; '.join(left_out)}" in capsys.readouterr().out


def test_an_error_of_the_program_as_it_is_fails_and_the_others_are_tried(tmp_path, monkeypatch, capsys):
    def compare(knob, case, *_):
        if knob.field == "depthwise.segment":
            raise RuntimeError("out of memory")
        return rows("1024", (1.0,)) + rows("256", (2.0,))

    monkeypatch.setattr(gpu_tune, "compare", compare)
    out = tmp_path / "tuning.json"
    assert "depthwise.segment, depthwise_conv 1x2x4x128" in scripts.rehearse(monkeypatch, gpu_tune, "--out", str(out))
    proposed = {"value": "256", "ratio": 2.0, "cases": "1 of 1"}
    assert json.loads(out.read_text())["proposed"] == {"joint_tile": proposed}
    said = "joint_tile: 256 is 2.000 times as fast as what stands in kernels/devices.py, over 1 of 1 cases"
    assert said in capsys.readouterr().out


def test_another_device_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_tune.py"])
    with pytest.raises(SystemExit, match=r"needs an NVIDIA GPU of compute capability 8.0 or newer, found 'cpu'"):
        gpu_tune.main()


@pytest.mark.slow
def test_a_rehearsal_tries_a_scan_too(tmp_path, monkeypatch):
    out = tmp_path / "tuning.json"
    assert scripts.rehearse(monkeypatch, gpu_tune, "--fields", "joint_tile", "--out", str(out)) == 0
    assert all(row["right"] for row in json.loads(out.read_text())["fields"]["joint_tile"])
