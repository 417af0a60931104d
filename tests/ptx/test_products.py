"""Products by `mma.sync`, emulated: JAX and the emulator agree on which lane has what of a matrix, or the values would
not be those of float64."""

import pathlib
import subprocess
import sys

import pytest

from tests.ptx import emulation, products

pytestmark = pytest.mark.ptx
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("product", products.PRODUCTS, ids=str)
def test_a_product_is_that_of_float64(product):
    error, ran = product.run()
    assert error < products.LIMIT
    assert not ran.faults


@pytest.mark.parametrize("capability", ["8.0", "12.0"])
def test_other_generations_of_gpus(capability):
    """Each in a process of its own: the compiler keeps the GPU of its first kernel."""
    command = [sys.executable, "-m", "tests.ptx.products", capability]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]


@pytest.mark.parametrize("policy", emulation.Policy)
def test_operands_of_other_threads_without_a_barrier_are_a_race(policy):
    _, ran = products.Product(16, 64, True, meets=False).run(policy=policy)
    assert {fault.kind for fault in ran.faults} & {"race: read after write", "race: write after read"}
