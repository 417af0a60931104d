"""Terms of low rank: a kernel that expands the proxy by itself, interpreted against the scan backend, and lowered."""

import dataclasses
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import api, compat, devices, mosaic_gpu, propagate, propagate_low_rank, sharded, tiles
from tests.kernels import numpy_scan as truth
from tests.kernels.low_rank_cases import NAMES, arguments, error, value_and_gradients
from tests.kernels.mosaic import interpreted


def tuned(**tuning):
    return devices.for_device(dataclasses.replace(devices.DEVICES["9.0"], expanding=devices.Expanding(**tuning)))


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["backward by XLA", "on chip"])
def few_rows(request, monkeypatch):
    """Blocks of 2 warpgroups and 8 positions in place of 4 and 64: maps of 4 and 8 can be interpreted in seconds."""
    monkeypatch.setattr(tiles, "ROWS", 8)
    with tuned(warpgroups=2, backward_on_chip=request.param):
        yield


def errors(arrays, *, races=True, **options):
    """(error of the kernel, error of the scan backend with the same inputs) of the value and every gradient."""
    size = arrays["x"].shape[1]
    plan = tiles.make_expanding_plan(size, size, arrays["x"].shape[3], device=devices.current())
    assert plan.images == tiles.ROWS // size
    exact = {name: array.astype(jnp.float32) for name, array in arrays.items()}
    expected = value_and_gradients(exact, backend="scan", **options)
    rounded = value_and_gradients(arrays, backend="scan", **options)
    with interpreted(races):
        found = jax.block_until_ready(value_and_gradients(arrays, backend="mosaic_gpu", **options))
    assert not (races and compat.races_found())
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == arrays["x" if name == "y" else name].dtype
    return {name: (error(found[name], expected[name]), error(rounded[name], expected[name])) for name in found}


def assert_same_as_the_scan_in_float32(*draws, **options):
    """As near to it as the scan backend with the same bfloat16 inputs, whose error is 2e-3 to 1e-2 of the norm; root
    mean square over the draws, for that of a gradient of four numbers is chance: 2e-4 to 6e-3."""
    found = [errors(arrays, **options) for arrays in draws]
    for name in found[0]:
        kernel, scan = np.sqrt(np.mean(np.square([each[name] for each in found]), axis=0))
        assert kernel < 1.5 * scan, name


@pytest.mark.slow
def test_the_kernel_expands_as_xla_does(few_rows):
    assert_same_as_the_scan_in_float32(arguments(2, 4, 64, 24, merge=(4, 64)))


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    dict(batch=2, size=4, channels=64, rank=40, skip=True),  # six kinds
    dict(batch=3, size=4, channels=64, rank=24, merge=(4, 64)),  # a batch that is no whole number of blocks
    dict(batch=1, size=8, channels=64, rank=24, groups=4),  # a line shared by the warpgroups
], ids=lambda case: "-".join(map(str, case.values())))  # fmt: skip
def test_other_maps_and_kinds(few_rows, case):
    assert_same_as_the_scan_in_float32(arguments(**case), chunk=3)


@pytest.mark.slow
def test_slabs_that_overlap(few_rows):
    """72 channels are two overlapping slabs of 64. They store the same values twice, which counts as a race."""
    draws = (arguments(2, 4, 72, 24, seed=seed) for seed in range(4))
    assert_same_as_the_scan_in_float32(*draws, races=False)


@pytest.mark.slow
def test_over_a_mesh(few_rows):
    """Two devices, each with half of the channels and the whole proxy, whose gradient is the sum of theirs."""
    mesh = jax.make_mesh(
        (1, 2), ("data", "tensor"), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    with sharded(mesh, batch=("data",), channels=("tensor",)):
        assert_same_as_the_scan_in_float32(arguments(2, 4, 128, 24, merge=(4, 128)), races=False)


@pytest.mark.slow
@pytest.mark.parametrize("on_chip", [False, True])
def test_at_full_size(on_chip):
    with tuned(backward_on_chip=on_chip):
        assert_same_as_the_scan_in_float32(arguments(4, 16, 64, 32))


def lowered(function, shapes, size):
    """(launches, the most numbers that anything of a pixel has)."""
    text = jax.jit(function).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    widths = [math.prod(map(int, match.split("x"))) for match in re.findall(rf"<4x{size}x{size}x([\dx]+)x", text)]
    return text.count("@mosaic_gpu"), max(widths)


def operator(a):
    return mosaic_gpu.propagate_low_rank(*(a.get(name) for name in (*NAMES[:6], "skip")), None)


def with_gradients(a):
    y, pull = jax.vjp(operator, a)
    return pull(y)


def test_it_lowers_for_cuda_and_no_terms_are_saved():
    """Forward nothing of a pixel is wider than what four directions write; backward XLA makes its 20 C terms anew."""
    size, channels, rank = 16, 1500, 93
    shapes = jax.eval_shape(lambda: arguments(4, size, channels, rank, skip=True))
    assert lowered(operator, shapes, size) == (1, 4 * channels)
    launches, width = lowered(with_gradients, shapes, size)
    assert launches == 2
    assert width == 12 * channels
    saved = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(operator, a)[1], shapes))
    factors = 4 * 6 * channels * 96
    assert max(array.size for array in saved) == factors


@pytest.mark.slow
@pytest.mark.parametrize(("size", "channels", "rank", "skip"), [(16, 1500, 93, True), (64, 368, 23, False)])
def test_on_chip_the_terms_are_not_in_device_memory_either_way(size, channels, rank, skip):
    shapes = jax.eval_shape(lambda: arguments(4, size, channels, rank, skip=skip))
    with tuned(backward_on_chip=True):
        assert lowered(operator, shapes, size) == (1, 4 * channels)
        assert lowered(with_gradients, shapes, size) == (5, 4 * channels)


def test_what_it_computes():
    """On any backend: `propagate` of the products."""
    arrays = arguments(2, 3, 8, 4, groups=2, skip=True, dtype=jnp.float32)
    proxy = np.asarray(arrays["proxy"], np.float64)
    gates, lam, out_gate, skip = (
        jnp.asarray(np.tensordot(proxy, np.asarray(arrays[name], np.float64), 1), jnp.float32)
        for name in ("gates", "lam", "out_gate", "skip")
    )
    expected = propagate(arrays["x"], gates, 1 + lam, 1 + out_gate, arrays["merge"], skip=skip, chunk=2)
    assert truth.relative_error(propagate_low_rank(**arrays, chunk=2), expected) < 1e-6


@pytest.mark.parametrize(("dtype", "size", "rank", "reason"), [
    (jnp.float32, 16, 16, "takes bfloat16, not float32"),
    (jnp.bfloat16, 12, 24, "takes square maps of 16, 32 or 64"),
    (jnp.bfloat16, 16, 192, "has no room on chip for a proxy of 192"),
])  # fmt: skip
def test_what_it_cannot_take_is_expanded_by_xla_with_a_line_that_says_why(dtype, size, rank, reason, caplog):
    api._log_expansion.cache_clear()
    shapes = jax.eval_shape(lambda: arguments(4, size, 64, rank, dtype=dtype))
    with compat.interpreted(), caplog.at_level(logging.INFO):
        jax.eval_shape(lambda a: propagate_low_rank(**a, backend="mosaic_gpu"), shapes)
    assert any("XLA expands the proxy" in line and reason in line for line in caplog.messages)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(("name", "shape", "message"), [
    ("proxy", (2, 3, 4, 4), r"proxy must have shape \[2, 3, 3, 'd'\], found \[2, 3, 4, 4\]"),
    ("gates", (4, 4, 3, 3), r"gates must have shape \[d, 4, 3, G\] with G a divisor of the 8 channels"),
    ("gates", (5, 4, 3, 8), r"gates must have shape \[4, 4, 3, 8\], found \[5, 4, 3, 8\]"),
    ("lam", (4, 4, 1), r"lam must have shape \[4, 4, 8\], found \[4, 4, 1\]"),
    ("merge", (3,), r"merge must have shape \[4\] or \[4, 8\], found \[3\]"),
])  # fmt: skip
def test_wrong_shapes_are_named(name, shape, message):
    arrays = arguments(2, 3, 8, 4) | {name: jnp.zeros(shape, jnp.bfloat16)}
    with pytest.raises(ValueError, match=message):
        propagate_low_rank(**arrays)
