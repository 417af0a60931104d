"""The kernels' machine code, emulated: values and gradients against float64, and nothing that a detector reports."""

import dataclasses
import functools
import pathlib
import subprocess
import sys

import pytest

from gspn_jax.kernels import devices, from_proxy, tiles
from tests.ptx import cases, emulation, toolchain

pytestmark = [pytest.mark.ptx, pytest.mark.timeout(1200)]
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=() if case.quick else pytest.mark.slow) for case in cases.CASES]
)
def test_values_and_gradients_are_those_of_float64(case):
    outcome = cases.run(case)
    outcome.save()
    assert not outcome.wrong()
    assert len(outcome.runs) == 2


@pytest.mark.parametrize(
    "policy", [emulation.Policy.LATE_COPIES, pytest.param(emulation.Policy.EARLY_COPIES, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "case",
    [
        cases.Case(5, 16, 16, 16, rank=24, chunk=2),
        pytest.param(cases.Case(2, 32, 32, 16, rank=24, chunk=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_block_with_chunk_2_walks_over_several_pieces(case, policy):
    """Copies of the next piece overwrite nothing of this one; in the cases above each block has one."""
    with toolchain.for_device(dataclasses.replace(devices.DEVICES[devices.DEFAULT], multiprocessors=1)):
        outcome = cases.run(case, policy=policy)
    assert not outcome.wrong()


@pytest.mark.parametrize("case", [
    cases.Case(1, 28, 26, 16, rank=24, skip=True, chunk=2),
    *(pytest.param(case, marks=pytest.mark.slow) for case in (
        cases.Case(5, 16, 16, 24, rank=40, chunk=2),
        cases.Case(8, 16, 16, 96, rank=128, chunk=2),
        cases.Case(2, 32, 48, 32, rank=96, chunk=2),
        cases.Case(3, 48, 16, 16, rank=32, skip=True, chunk=2),
        cases.Case(2, 14, 14, 64, rank=16, chunk=2),
    )),
], ids=str)  # fmt: skip
def test_chunk_2_by_threads_and_mma(case):
    """What GPUs without wgmma run, which those of 9.0 could run too."""
    device = devices.DEVICES[devices.DEFAULT]
    with toolchain.for_device(dataclasses.replace(device, local=devices.Local(), multiprocessors=1)):
        outcome = cases.run(case)
    assert not outcome.wrong()
    assert len(outcome.runs) == 2


@pytest.mark.parametrize("case", [
    cases.Case(1, 64, 64, 8),
    *(pytest.param(case, marks=pytest.mark.slow) for case in (
        cases.Case(1, 64, 64, 6, "float32", skip=True, chunk=3),  # slabs overlap
        cases.Case(1, 64, 64, 6, groups=1),
    )),
], ids=str)  # fmt: skip
def test_lines_for_which_only_the_narrowest_slabs_have_room(case):
    device = dataclasses.replace(devices.DEVICES[devices.DEFAULT], scan_bytes=2**13, shared_bytes=2**13)
    size = case.height, case.width, case.channels
    assert tiles.make_plan(*size, directions=4, device=device).slab == tiles.NARROWEST
    with toolchain.for_device(device):
        outcome = cases.run(case)
    assert not outcome.wrong()
    assert len(outcome.runs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [16, 24])
def test_lines_that_leave_no_room_for_the_backward_pass(rank):
    """The kernel expands the proxy forward, XLA for the backward pass, and the plain kernel goes forward and back."""
    device = dataclasses.replace(
        devices.DEVICES[devices.DEFAULT], scan_bytes=20 * devices.KIB, shared_bytes=20 * devices.KIB
    )
    make_plan = functools.partial(tiles.make_plan, 64, 64, 16, directions=4, device=device, kinds=6)
    wide = from_proxy.filled_up(rank)
    assert make_plan(rank=wide) is None and make_plan(rank=wide, backward=False).rank == wide
    with toolchain.for_device(device):
        outcome = cases.run(cases.Case(1, 64, 64, 16, rank=rank, skip=True, chunk=5))
    assert not outcome.wrong()
    assert len(outcome.runs) == 3


LONG = cases.Case(1, 64, 600, 4)
"""Lines that have room in the narrowest slabs only, where blocks have 99 KiB."""
GENERATIONS = [
    *((capability, str(LONG)) for capability in ("8.9", "12.0")),
    *((capability, str(case)) for capability in ("8.0", "8.9", "10.0", "12.0") for case in cases.CASES if case.quick),
]
QUICK = {("8.0", "1x16x16x64-bfloat16"), ("8.9", "1x28x26x24-bfloat16-d24-chunk2")}


@pytest.mark.parametrize(
    ("capability", "case"),
    [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in GENERATIONS],
)
def test_other_generations_of_gpus(capability, case):
    """Each in a process of its own: the compiler keeps the GPU of its first kernel."""
    command = [sys.executable, "-m", "tests.ptx.cases", case, capability]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
