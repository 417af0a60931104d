"""The depthwise convolution's machine code, emulated: values and gradients against float64, no fault, no spill."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import depthwise_gpu, depthwise_plan, devices
from tests.kernels.numpy_depthwise import inputs, loop, squared_relu_loop
from tests.ptx import emulation, toolchain
from tests.ptx.cases import norm_error

pytestmark = pytest.mark.ptx
LIMITS = {"float32": 1e-6, "bfloat16": 3e-3}
"""Of norm errors; a result in bfloat16 is rounded once, 1.7e-3."""


@pytest.mark.parametrize(
    ("size", "kernel", "dtype", "squared_relu", "launches"),
    [
        ((1, 16, 16, 256), (7, 7), "bfloat16", False, 3),
        ((2, 17, 19, 130), (5, 7), "float32", False, 3),  # strips and segments, which overlap; one channel a thread
        ((1, 4, 33, 129), (7, 3), "bfloat16", False, 3),  # three segments
        ((2, 5, 16, 260), (3, 3), "bfloat16", True, 2),  # slabs overlap
        ((3, 7, 5, 129), (3, 3), "float32", True, 2),
        ((1, 3, 17, 128), (3, 3), "bfloat16", True, 4),
    ],
)
def test_values_and_gradients_are_those_of_float64(size, kernel, dtype, squared_relu, launches):
    # so few that a block has several rows, of several images
    device = dataclasses.replace(devices.DEVICES[devices.DEFAULT], multiprocessors=8)
    x, taps, _, cotangent = (jnp.asarray(a, dtype) for a in inputs(size, (*kernel, size[3])))
    with toolchain.for_device(device), emulation.emulated() as runs:
        y, pull = jax.vjp(lambda *a: depthwise_gpu.correlate(*a, squared_relu), x, taps.astype(jnp.float32))
        found = y, *pull(cotangent)
    assert len(runs) == launches and not [fault for run in runs for fault in run.faults]
    exact = (squared_relu_loop if squared_relu else loop)(
        *(np.asarray(a, np.float64) for a in (x, taps)), 0, np.asarray(cotangent, np.float64)
    )
    assert [a.dtype.name for a in found] == [dtype, dtype, "float32"]
    for a, b in zip(found, exact, strict=False):
        assert norm_error(a, b) < LIMITS[dtype if launches == 4 else a.dtype.name]  # its cotangent is rounded too


@pytest.mark.parametrize("side", [7, 3])
def test_nothing_spills_and_products_are_added_in_one_instruction(side):
    def both(x, kernel):
        y, pull = jax.vjp(lambda *a: depthwise_gpu.correlate(*a, False), x, kernel)
        return y, pull(y)

    shapes = (64, 16, 16, 1500), (side, side, 1500)
    modules = toolchain.lower(both, *map(jax.ShapeDtypeStruct, shapes, (jnp.bfloat16, jnp.float32)))
    plan = depthwise_plan.Plan.of(shapes[0], shapes[1][:2])
    for found in (toolchain.assemble(module, disassemble=True) for module in modules):
        assert found.spilled_bytes == 0
        assert found.registers <= 168  # three warpgroups of a multiprocessor
        # two channels a thread; columns that a tap finds outside of the image cost nothing
        products = 2 * (side * 16 - 2 * sum(range(1, side // 2 + 1)))
        rows = depthwise_gpu.TAPS if "sum_kernel_gradient" in found.ptx else plan.together**2
        assert found.sass.count("FFMA") == products * rows
        assert not found.sass.count("FMUL") and not found.sass.count("FADD")
        assert ", 0x7632, " not in found.sass  # the second instruction of widening the upper of two bfloat16
