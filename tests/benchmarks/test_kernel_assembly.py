"""The table of assembled kernels says what spills, what has too much shared memory, and what is refused."""

import importlib.util
import pathlib
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "kernel_assembly.py"


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("kernel_assembly", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernel_assembly", module)  # its dataclass looks for it
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.json")
    return module


def kernel(case, **numbers):
    return {
        "case": str(case),
        "kernel": "k",
        "registers": 100,
        "spilled_bytes": 0,
        "shared_bytes": 2**16,
        "shared_bytes_there_are": 2**17,
    } | numbers


def test_the_table_replaces_the_one_before_and_says_what_is_wrong(script, tmp_path):
    first, second, low_rank = script.CASES[0], script.CASES[1], script.CASES[7]
    script.record("9.0", [kernel(first, registers=1)])
    script.record("9.0", [kernel(first), kernel(first, registers=90, shared_bytes=2**15)])  # the case once more
    script.record("9.0", [kernel(second, spilled_bytes=8)])
    script.record("8.0", [{"case": str(first), "refused": "has no room: 'scan' runs"}])
    script.record("8.0", [{"case": str(second), "failed": "ToolchainError: no"}])
    script.record("8.0", [{"case": str(low_rank), "refused": "needs more: XLA expands"}, kernel(low_rank)])
    path = tmp_path / "doc.md"
    path.write_text(f"before\n{script.MARKS[0]}\nold\n{script.MARKS[1]}\nafter\n")
    script.write_table(path)
    script.write_table(path)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert f"| {first} | [1] | 100, 90; 64 KiB |" in text
    assert f"| {second} | does not assemble | 100; 64 KiB; **8 bytes spilled** |" in text
    assert f"| {low_rank} | 100; 64 KiB [2] |  |" in text
    assert "1. The kernel has no room: 'scan' runs.\n2. The kernel needs more: XLA expands." in text


@pytest.mark.parametrize(
    ("change", "wrong"), [({}, False), ({"spilled_bytes": 4}, True), ({"shared_bytes": 2**17 + 1}, True)]
)
def test_a_kernel_that_spills_or_does_not_fit_is_wrong(script, change, wrong):
    assert script.wrong(kernel(script.CASES[0], **change)) == wrong
