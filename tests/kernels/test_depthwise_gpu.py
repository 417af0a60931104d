"""The depthwise convolution's GPU kernels without a GPU: interpreted with race detection against a float64 loop."""

import dataclasses
import functools
import itertools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import compat, depthwise, depthwise_conv, depthwise_gpu, depthwise_plan, devices, sharded
from tests.kernels.mosaic import interpreted
from tests.kernels.numpy_depthwise import inputs, loop, squared_relu_loop
from tests.kernels.numpy_scan import relative_error

TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8}


def tuned(segment=16):
    """A GPU that six blocks keep busy: each costs the interpreter time, and so one goes through rows of several images,
    and not whole ones."""
    tuning = devices.Depthwise(segment=segment, blocks=3)
    return devices.for_device(dataclasses.replace(devices.DEVICES["9.0"], multiprocessors=2, depthwise=tuning))


@pytest.fixture(autouse=True)
def few_blocks():
    with tuned():
        yield


def value_and_gradients(x, kernel, cotangent, **options):
    y, pull = jax.vjp(lambda *a: depthwise_conv(*a, **options), x, kernel)
    return y, *pull(cotangent)


def assert_right(found, arrays, exact=loop):
    x, kernel, cotangent = (np.asarray(array, np.float64) for array in arrays)
    for name, a, b in zip(("y", "x", "kernel"), found, exact(x, kernel, 0, cotangent), strict=False):
        assert a.dtype == arrays[0].dtype
        assert relative_error(a, b) < TOLERANCE[a.dtype.name], name


def arguments(size, kernel, dtype):
    x, kernel, _, cotangent = inputs(size, (*kernel, size[3]))
    return [jnp.asarray(array, dtype) for array in (x, kernel, cotangent)]


@pytest.mark.parametrize(
    ("size", "kernel", "dtype", "segment"),
    [
        ((2, 5, 4, 128), (3, 3), "float32", 16),
        ((2, 7, 2, 256), (7, 7), "bfloat16", 16),  # 2 channels a thread; an odd number of rows
        ((1, 3, 8, 128), (5, 3), "float32", 4),  # two segments: a halo is inside or outside of the image
        pytest.param((3, 17, 2, 256), (3, 5), "bfloat16", 16, marks=pytest.mark.slow),  # three strips, the last shorter
    ],
)
def test_values_and_gradients_are_those_of_the_float64_loop(size, kernel, dtype, segment):
    arrays = arguments(size, kernel, dtype)
    with tuned(segment), interpreted():
        found = jax.block_until_ready(value_and_gradients(*arrays))
        assert not compat.races_found()
    assert_right(found, arrays)


def test_slabs_and_segments_that_overlap():
    """They store the same values twice, which counts as a race."""
    arrays = arguments((1, 3, 7, 129), (5, 3), "float32")
    with tuned(segment=4), interpreted(detect_races=False):
        found = jax.block_until_ready(value_and_gradients(*arrays))
    assert_right(found, arrays)


def test_segments_cover_a_row_and_no_halo_crosses_an_edge_of_the_image():
    halo = max(depthwise_gpu.SIDES) // 2
    for width in (*range(1, 600), *range(600, depthwise_gpu.WIDEST, 13), depthwise_gpu.WIDEST):
        plan = depthwise_plan.Plan.of((1, 1, width, 128), (3, 2 * halo + 1))
        firsts = [min(segment * plan.length, width - plan.length) for segment in range(plan.segments)]
        assert firsts[0] == 0 and firsts[-1] + plan.length == width
        assert all(b - a <= plan.length for a, b in itertools.pairwise(firsts))
        if plan.segments > 1:
            assert firsts[1] >= halo and firsts[-2] + plan.length <= width - halo


@pytest.mark.parametrize(
    ("size", "kernel", "dtype", "segment"),
    [
        ((1, 5, 4, 128), (3, 3), "float32", 16),  # a block for each row
        ((3, 5, 2, 256), (3, 3), "bfloat16", 16),  # three rows a block, of two images
        ((1, 2, 8, 128), (3, 3), "float32", 4),  # the gradients one by one
    ],
)
def test_squared_relu_is_computed_on_chip(size, kernel, dtype, segment):
    arrays = arguments(size, kernel, dtype)
    with tuned(segment), interpreted():
        found = jax.block_until_ready(value_and_gradients(*arrays, squared_relu=True))
        assert not compat.races_found()
    assert_right(found, arrays, squared_relu_loop)


def test_the_gradient_of_the_kernel_is_the_same_every_time():
    x, kernel, cotangent = arguments((3, 2, 2, 128), (3, 3), "float32")
    with interpreted():
        for gradient in (
            lambda: depthwise_gpu.kernel_gradient(x, cotangent, (3, 3)),
            lambda: depthwise_gpu.squared_relu_gradients(x, kernel, cotangent)[1],
        ):
            np.testing.assert_array_equal(gradient(), gradient())


@pytest.mark.parametrize(("squared_relu", "exact"), [(False, loop), (True, squared_relu_loop)])
def test_over_a_mesh_the_kernels_give_the_values_and_gradients_of_one_device(squared_relu, exact):
    """Images and channels split; the parts of the gradient of the kernel are added up in float32."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    arrays = arguments((2, 2, 2, 256), (3, 3), "float32")

    def run(*arrays):
        with sharded(mesh, batch=("data",), channels=("tensor",)):
            return value_and_gradients(*arrays, squared_relu=squared_relu)

    with interpreted(detect_races=False):
        found = jax.block_until_ready(jax.jit(run)(*arrays))
    assert_right(found, arrays, exact)


def lowered(run, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    with devices.for_device("9.0"):
        return jax.jit(lambda *a: run(*a)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_over_a_mesh_each_device_convolves_its_part():
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def run(*arrays):
        with sharded(mesh, batch=("data",), channels=("tensor",)):
            return value_and_gradients(*arrays)

    text = lowered(run, (2, 4, 4, 256), (3, 3, 256), (2, 4, 4, 256))
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 3
    assert all("tensor<1x4x4x128xbf16>" in line and "x256x" not in line for line in calls)
    sums = re.findall(r'"stablehlo.all_reduce"\(.*?\) -> (\S+)', text.replace("\n", " "))
    assert sums == ["tensor<3x3x128xf32>"]


@pytest.mark.parametrize(("width", "squared_relu", "launches"), [(4, False, 3), (4, True, 2), (17, True, 4)])
def test_its_launches_and_nothing_of_xlas(width, squared_relu, launches):
    run = functools.partial(value_and_gradients, squared_relu=squared_relu)
    text = lowered(run, (1, 4, width, 128), (3, 3, 128), (1, 4, width, 128))
    assert text.count("custom_call @mosaic_gpu") == launches
    assert not re.search(r"stablehlo\.(convolution|maximum|multiply)", text)


@pytest.mark.parametrize(
    ("shape", "kernel", "dtype", "sentence"),
    [
        ((1, 4, 4, 128), (9, 9), "float32", r"takes kernels of 3, 5, 7 rows and columns, not \[9, 9\]"),
        ((1, 4, 4, 64), (3, 3), "float32", r"takes at least 128 channels and no empty axis, not \[1, 4, 4, 64\]"),
        ((1, 4, 4, 128), (3, 3), "float16", "takes float32 and bfloat16, not float16"),
        ((2**14, 1, 1, 1024), (3, 3), "float32", r"takes up to 65535 slabs .*, not those of \[16384, 1, 1, 1024\]"),
        ((1, 1, 4097, 128), (3, 3), "float32", "takes images of up to 4096 columns, not 4097"),
    ],
)
def test_what_it_does_not_take_is_xlas_with_a_reason_in_the_log(monkeypatch, caplog, shape, kernel, dtype, sentence):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    depthwise._log_refusal.cache_clear()
    with caplog.at_level(logging.INFO, logger="gspn_jax.kernels"):
        arrays = [jax.ShapeDtypeStruct(s, dtype) for s in (shape, (*kernel, shape[3]))]
        with devices.for_device("9.0"):
            traced = str(jax.make_jaxpr(lambda *a: depthwise_conv(*a))(*arrays))
    assert "conv_general_dilated" in traced
    assert re.search(f"Depthwise convolutions are XLA's: the GPU kernel {sentence}\\.", caplog.text)
