"""For every generation of GPUs that the kernel is made for a kernel is assembled. benchmarks/kernel_assembly.py
assembles them all."""

import pathlib
import subprocess
import sys

import pytest

from gspn_jax.kernels import devices

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "kernel_assembly.py"


@pytest.mark.ptx
@pytest.mark.parametrize("capability", [
    pytest.param(c, marks=pytest.mark.slow) if c in ("10.3", "12.1") else c for c in devices.DEVICES
])  # fmt: skip
def test_it_assembles(capability):
    """One direction with ready weights, terms of low rank, those of chunk=2, and depthwise convolutions: all passes.
    A process of its own for each, as the compiler keeps the architecture of its first kernel."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--devices", capability], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    shown = done.stdout
    launches = 2 + 2 + 2 + 3 + 2
    assert shown.count(" 0 bytes spilled") == launches, shown
    assert shown.count(f"(sm_{capability.replace('.', '')}") == launches, shown
