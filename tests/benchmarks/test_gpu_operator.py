"""The scripts that wait for a GPU run to their end: interpreted, at sizes that take seconds."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import devices, tiles
from gspn_jax.models import attention
from tests.benchmarks import scripts

gpu_operator, gpu_values = scripts.load("gpu_operator"), scripts.load("gpu_values")


def values_file(path, *, correct):
    path.write_text(json.dumps({"cases": [{"case": str(i), "correct": right} for i, right in enumerate(correct)]}))
    return str(path)


@pytest.mark.slow
def test_every_table_is_filled(tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    right = values_file(tmp_path / "values.json", correct=[True, True])
    assert scripts.rehearse(monkeypatch, gpu_operator, "--values", right, "--out", str(out)) == 0
    record = json.loads(out.read_text())
    assert record["values"] == "all right"
    assert {name: len(record[name]) for name in gpu_operator.TABLES} == {
        "copy": 1,
        "products": 2,
        "convolutions": 5,
        "operator": 2,
        "low_rank": 2,
        "attention": 4,
        "blocks": 2,
    }
    assert all(
        value > 0
        for name in gpu_operator.TABLES
        for row in record[name]
        for key, value in row.items()
        if key.endswith("ms") or key in ("ratio", "share_of_copy")
    )


def test_nothing_is_timed_where_the_kernel_is_wrong(tmp_path, monkeypatch):
    wrong = values_file(tmp_path / "values.json", correct=[True, None, False])
    out = tmp_path / "results.json"
    assert "found 1 of 3 right: nothing was timed" in scripts.rehearse(
        monkeypatch, gpu_operator, "--values", wrong, "--out", str(out)
    )
    assert not out.exists()
    assert (
        scripts.rehearse(
            monkeypatch, gpu_operator, "--values", wrong, "--anyway", "--tables", "products", "--out", str(out)
        )
        == 0
    )
    assert json.loads(out.read_text())["values"] == "1 of 3 right"


def test_a_table_that_fails_does_not_stop_the_next(tmp_path, monkeypatch):
    def fails(sizes, repeats):
        yield {"ms": 1.0}
        raise RuntimeError("out of memory")

    monkeypatch.setitem(gpu_operator.TABLES, "copy", fails)
    right, out = values_file(tmp_path / "values.json", correct=[True]), tmp_path / "results.json"
    code = scripts.rehearse(
        monkeypatch, gpu_operator, "--values", right, "--tables", "copy", "products", "--out", str(out)
    )
    assert code == "these tables have an error: copy"
    record = json.loads(out.read_text())
    assert record["copy"] == [{"ms": 1.0}] and len(record["products"]) == 2
    assert record["copy_error"].strip().endswith("RuntimeError: out of memory")


SMALL = [
    case
    for case in gpu_values.cases()
    if not case.by_threads  # the same truth
    and max(case.shape[1:3]) <= 20
    and case.shape[3] <= 128
    and (case.operator != "propagate" or case.dtype == "float32")
]


@pytest.mark.parametrize("case", [
    case if n % 3 == 0 else pytest.param(case, marks=pytest.mark.slow) for n, case in enumerate(SMALL)
], ids=str)  # fmt: skip
def test_the_truth_of_every_operator_is_that_of_the_scan(case, monkeypatch):
    """The scan stands in for the kernel, so that no kernel is interpreted."""
    for name in ("propagate", "propagate_low_rank", "line_scan"):
        operator = getattr(gpu_values, name)
        monkeypatch.setattr(
            gpu_values, name, lambda *a, operator=operator, **options: operator(*a, **options | {"backend": "scan"})
        )
    found = gpu_values.check(case)
    assert found["correct"] and set(found["errors"]) == {"forward", "saving", "backward"}


def test_wrong_values_are_found(monkeypatch):
    case = gpu_values.small_cases()[0]
    monkeypatch.setattr(gpu_values, "propagate", lambda x, *others, **options: 1.1 * x + 0 * sum(map(jnp.sum, others)))
    assert not gpu_values.check(case)["correct"]
    monkeypatch.setattr(gpu_values, "propagate", lambda x, *others, **options: x / 0)
    number, found = gpu_values.check_apart(3, case, small=False)
    assert number == 3 and not found["correct"] and "Error" in found["error"]


def test_every_variant_of_the_kernel_is_among_the_cases():
    cases = gpu_values.cases()
    propagate = [case for case in cases if case.operator == "propagate"]
    assert {case.dtype for case in propagate} == {"float32", "bfloat16"}
    assert {case.skip for case in propagate} == {True, False} == {case.chunk is None for case in propagate}
    assert {case.direction for case in cases if case.operator == "line_scan"} == {"down", "up", "right", "left"}
    joint = {(max(case.shape[1:3]) > 32, case.groups == 1) for case in propagate}
    assert joint == set(itertools.product((True, False), repeat=2))
    low_rank = [case for case in cases if case.operator == "low_rank"]
    assert {case.shape[1] for case in low_rank if case.groups > tiles.DEPTH} == {15, 16, 32, 64, 128}
    assert {case.shape[1] for case in low_rank if case.groups <= tiles.DEPTH} == {14, 28}
    assert len({str(case) for case in cases}) == len(cases)


@pytest.mark.parametrize("case", [case for case in gpu_values.cases() if case.by_threads], ids=str)
def test_an_h100_is_asked_for_what_other_gpus_run(case):
    with devices.for_device("9.0"), gpu_values.tuned(case):
        assert devices.current().local == devices.DEVICES["8.9"].local
        _, arrays, _ = gpu_values.build(case)
        if jax.__version_info__ >= (0, 11, 2):
            assert gpu_values.mosaic_gpu.refuses_low_rank(*arrays[:2], 5 + case.skip, case.chunk) is None


def test_both_ways_to_convolve_agree():
    x, g = (jax.random.normal(jax.random.key(n), (2, 6, 5, 8)) for n in range(2))
    kernel = jax.random.normal(jax.random.key(2), (3, 3, 8))
    y, pull = jax.vjp(lambda kernel: gpu_operator.grouped(x, kernel, jnp.float32), kernel)
    np.testing.assert_allclose(gpu_operator.shifted(x, kernel, jnp.float32), y, rtol=1e-4, atol=1e-5)
    by_kernel = gpu_operator.shifted_by_kernel(x, kernel, g).reshape(kernel.shape)
    np.testing.assert_allclose(by_kernel, pull(g)[0], rtol=1e-4, atol=1e-4)


def test_bytes_are_those_of_each_input_once_and_each_output_once():
    arrays = gpu_values.random_inputs(1, 16, 16, 64, 64, False, jnp.bfloat16)
    values = 16 * 16 * 64
    # x, y and their cotangents 2 bytes each, gates 24, lam and out_gate 8 each, and so theirs; merge is four float32
    assert gpu_operator.needed_bytes(arrays) == {"forward": 44 * values + 16, "backward": 86 * values + 32}


def test_where_the_lines_cross():
    rows = [{"tokens": tokens, "ratio": ratio} for tokens, ratio in ((256, 0.25), (1024, 0.5), (4096, 2.0))]
    assert gpu_operator.crossing(rows) == pytest.approx(2048)  # as far below 1 before as above it after
    assert gpu_operator.crossing(rows[1:] + rows[:1]) == pytest.approx(2048)
    assert gpu_operator.crossing(rows[2:]) == 4096
    assert gpu_operator.crossing(rows[:2]) is None
    assert gpu_operator.crossing([*rows, {"tokens": 9, "ratio": None}]) is None


def test_no_ratio_is_taken_to_attention_that_is_not_flash_attention(monkeypatch):
    monkeypatch.setattr(attention, "choose", lambda *_: attention.Choice("xla", "cannot run here"))
    monkeypatch.setattr(attention.Choice, "fair", False)
    monkeypatch.setattr(gpu_operator, "operator", lambda backend: lambda x, *others: x)
    rows = list(gpu_operator.against_attention(gpu_operator.TINY, 1))
    assert len(rows) == 4 and all(row["ratio"] is None and row["implementation"] == "xla" for row in rows)
