"""Faults planted in the kernels themselves, in their machine code or in how their memory lies, are reported."""

import functools
import re

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from gspn_jax.kernels import mosaic_gpu, propagate, propagate_low_rank, shared_memory
from tests.ptx import cases, emulation

pytestmark = pytest.mark.ptx
PLAIN = cases.Case(1, 16, 16, 64, "float32")
OVERLAPPING = cases.Case(1, 7, 7, 64, "float32")
LOW_RANK = cases.Case(4, 16, 16, 64, rank=24)
LOCAL = cases.Case(2, 16, 16, 40, rank=24, chunk=2)
RIGHT = {PLAIN: 1e-6, LOW_RANK: 1e-2, LOCAL: 1e-2}
"""Bounds of a norm error that only comes of rounding."""
WAIT = r"mbarrier\.try_wait\.parity\S* P1, [^;]*;"
PASSES = "setp.eq.b32 P1, 0, 0;"


@functools.cache
def expected(case):
    arrays = {name: array.astype(jnp.float32) for name, array in case.arrays().items()}
    return (propagate_low_rank if case.rank else propagate)(**arrays, chunk=case.chunk, backend="scan")


def forward(case, edit=str, policy=emulation.Policy.RANDOM):
    """(norm error of y, kinds of faults) of the kernel whose PTX was edited."""
    operator = mosaic_gpu.propagate_low_rank if case.rank else mosaic_gpu.propagate
    names = ("x", *(["proxy"] if case.rank else []), "gates", "lam", "out_gate", "merge")
    arrays = case.arrays()
    with emulation.emulated(edit=edit, policy=policy) as runs:
        y = operator(*(arrays[name] for name in names), None, case.chunk)
    return cases.norm_error(y, expected(case)), {fault.kind for run in runs for fault in run.faults}


def replace(pattern, by, which=None):
    """Edits the matches of `pattern`, or only the one of that number; `by` is a text or a function of the match."""

    def edit(source):
        matches = list(re.finditer(pattern, source))
        assert matches
        for match in reversed(matches if which is None else [matches[which]]):
            text = by if isinstance(by, str) else by(match)
            source = source[: match.start()] + text + source[match.end() :]
        return source

    return edit


def any_race(faults):
    return any(kind.startswith("race") for kind in faults)


@pytest.mark.parametrize("which", [0, None], ids=["first", "all"])
def test_a_wait_for_a_turn_left_out(which):
    """Of the directions, to add to the sum that they share. Some waits are not needed where the map is square."""
    assert any_race(forward(PLAIN, replace(WAIT, PASSES, which))[1])


@pytest.mark.parametrize("which", [2, 3, None], ids=["of the cleared state", "of a line", "all"])
def test_barriers_left_out(which):
    """The first two are those of the launch; each direction has two of its own, and each of them is needed."""
    assert any_race(forward(PLAIN, replace(r"bar\.sync[^;]*;", "", which))[1])


@pytest.mark.parametrize("which", [4, 5], ids=["of states", "of the sum"])
def test_a_barrier_between_tiles_that_overlap_left_out(which):
    assert not forward(OVERLAPPING)[1]
    assert any_race(forward(OVERLAPPING, replace(r"bar\.sync[^;]*;", "", which))[1])


@pytest.mark.parametrize("policy", [emulation.Policy.LATE_COPIES, emulation.Policy.RANDOM])
def test_waits_left_out_of_the_kernel_of_two_lines(policy):
    """For copies, and for the classes of pixels to meet."""
    assert any_race(forward(LOCAL, replace(WAIT, PASSES), policy)[1])


def test_products_not_waited_for_in_the_kernel_of_two_lines():
    assert not forward(LOCAL, replace(r"wgmma\.wait_group\S* 0;", ""))[0] < RIGHT[LOCAL]


@pytest.mark.slow
def test_a_fence_of_the_proxy_left_out():
    """Fences of `commit_smem`, behind which the copy engine overwrites what threads wrote."""
    case = cases.Case(3, 32, 16, 16, rank=24, chunk=2)
    assert "missing proxy fence" in forward(case, replace(r"fence\.proxy\.async[^;]*;", ""))[1]


def test_factors_that_nobody_waited_for():
    """Threads copy them to shared memory; the barrier of the first line lets all read them."""
    assert not forward(LOW_RANK)[1]
    assert any_race(forward(LOW_RANK, replace(r"bar\.sync[^;]*;", ""))[1])


@pytest.mark.parametrize("which", [20, -20])
def test_a_row_too_far(which):
    """A row of the state or the sum is 64 channels of 4 bytes."""

    def next_row(load):
        return f"{load[1]}+{int(load[2] or 0) + 256}]"

    error, faults = forward(PLAIN, replace(r"(ld\.shared\S*\s+\{[^}]*\}, \[%\w+)(?:\+(\d+))?\]", next_row, which))
    assert faults or not error < RIGHT[PLAIN]


def test_a_result_not_stored():
    error, _ = forward(PLAIN, replace(r"st(\.global)?(\.v2)?\.b32[^;]*;", "", which=-1))
    assert not error < RIGHT[PLAIN]  # NaN


def test_buffers_left_to_jax(monkeypatch):
    """It swizzles them: values are wrong, and no detector of memory can tell."""
    monkeypatch.setattr(shared_memory, "row_major", lambda shape: plgpu.SMEM(shape, jnp.float32))
    error, faults = forward(PLAIN)
    assert error > 0.1
    assert not faults
