"""Proxies expanded in registers, interpreted against the scan backend, and lowered; in machine code they are in
tests/ptx."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import compat, devices, from_proxy, mosaic_gpu, propagate_low_rank, sharded, tiles
from tests.kernels.low_rank_cases import NAMES, arguments, error, value_and_gradients
from tests.kernels.mosaic import interpreted


def assert_same_as_the_scan_in_float32(arrays, chunk=None, races=True):
    """As near to it as the scan backend with the same bfloat16 inputs."""
    exact = {name: array.astype(jnp.float32) for name, array in arrays.items()}
    expected = value_and_gradients(exact, backend="scan", chunk=chunk)
    rounded = value_and_gradients(arrays, backend="scan", chunk=chunk)
    with interpreted(races):
        found = jax.block_until_ready(value_and_gradients(arrays, backend="mosaic_gpu", chunk=chunk))
        assert not (races and compat.races_found())
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == arrays["x" if name == "y" else name].dtype
        assert error(array, expected[name]) < 1.5 * error(rounded[name], expected[name]), name


@pytest.mark.parametrize("case", [
    dict(batch=1, size=7, channels=34, rank=5, skip=True, merge=(4, 34)),  # all of it is filled up
    *(pytest.param(case, marks=pytest.mark.slow) for case in (
        dict(batch=1, size=8, channels=64, rank=24, merge=(4, 64)),  # factors in shared memory
        dict(batch=1, size=8, channels=64, rank=16, groups=4, merge=(4, 64)),
        dict(batch=1, size=12, channels=64, rank=8, merge=(4, 64)),  # tiles that overlap
        dict(batch=1, size=14, channels=32, rank=16, merge=(4, 32)),
        dict(batch=2, size=14, channels=96, rank=93, skip=True, merge=(4, 96)),
    )),
], ids=lambda case: "-".join(map(str, case.values())))  # fmt: skip
def test_values_and_gradients_are_those_of_the_scan(case, capsys):
    assert_same_as_the_scan_in_float32(arguments(**case))
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("size", [6, 8])
def test_lines_that_begin_anew(size):
    """Of a map that is filled up, lines beyond it are not walked then."""
    assert_same_as_the_scan_in_float32(arguments(2, size, 64, 8, merge=(4, 64)), chunk=3)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [16, 40])
def test_directions_that_do_not_meet(rank):
    """Warpgroups that share lines share the factors too."""
    with devices.for_device(dataclasses.replace(devices.DEVICES["9.0"], shared_bytes=48 * 1024)):
        plan = tiles.make_plan(16, 16, 64, directions=4, device=devices.current(), rank=from_proxy.filled_up(rank))
        assert not plan.joint and plan.sharing > 1
        assert_same_as_the_scan_in_float32(arguments(1, 16, 64, rank, skip=True, merge=(4, 64)))


@pytest.fixture
def room_for_the_forward_pass_alone():
    device = dataclasses.replace(devices.DEVICES["9.0"], shared_bytes=12 * 1024, scan_bytes=8 * 1024)
    plan = functools.partial(tiles.make_plan, 16, 16, 64, directions=4, device=device, rank=16, kinds=5)
    assert plan() is None and plan(backward=False).rank == 16
    with devices.for_device(device):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
def test_values_and_gradients_where_the_backward_pass_has_no_room(room_for_the_forward_pass_alone, skip):
    assert_same_as_the_scan_in_float32(arguments(1, 16, 64, 16, skip=skip, merge=(4, 64)), chunk=3)


def test_xla_expands_for_a_backward_pass_that_has_no_room(room_for_the_forward_pass_alone):
    """The kernel goes forward by itself; back goes the plain one, and forward before it."""
    shapes = jax.eval_shape(lambda: arguments(1, 16, 64, 16))
    with compat.interpreted():
        text = str(jax.make_jaxpr(lambda arrays: value_and_gradients(arrays, backend="mosaic_gpu"))(shapes))
    launches = re.findall(r"name=line_scan_(forward|backward)\b", text)
    assert launches == ["forward", "forward", "backward"]


@pytest.mark.slow
def test_over_a_mesh():
    """Two devices, each with half of the channels and the whole proxy, whose gradient is the sum of theirs."""
    mesh = jax.make_mesh(
        (1, 2), ("data", "tensor"), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    with sharded(mesh, batch=("data",), channels=("tensor",)):
        assert_same_as_the_scan_in_float32(arguments(2, 8, 128, 24, merge=(4, 128)), races=False)


@pytest.mark.parametrize("slab", tiles.PRODUCTS)
def test_rows_of_factors_are_the_channels_of_a_slab(slab):
    """A product leaves a thread rows n and n + 8 of every 16, which are neighbours."""
    channels = from_proxy.channels(slab)
    assert sorted(channels) == list(range(slab))
    for first in range(slab):
        if first % 16 < 8:
            assert channels[first] % 2 == 0
            assert channels[first + 8] == channels[first] + 1


@pytest.mark.parametrize(("size", "channels"), [(7, 1152), (14, 576), (28, 288), (32, 96), (16, 64)])
def test_shared_memory_is_read_from_all_banks(size, channels):
    """A half warp reads four pairs of channels of every second of eight positions, along rows and along columns."""
    plan = tiles.make_plan(size, size, channels, directions=4, device=devices.DEVICES["9.0"], rank=16)
    assert plan.joint
    _, positions, row = plan.total
    for step in (row, positions * row):
        banks = {(2 * q * step + 2 * g + word) % 32 for q in range(4) for g in range(4) for word in range(2)}
        assert len(banks) == 32


@pytest.mark.skipif(not compat.HAS_MMA, reason="needs JAX 0.11.2")
@pytest.mark.parametrize(("capability", "size", "channels", "rank", "chunk"), [
    ("9.0", 16, 1500, 93, None),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("9.0", 14, 576, 16, None), ("8.0", 14, 576, 16, None), ("8.9", 28, 288, 16, None), ("12.0", 56, 144, 16, None),
        ("10.0", 7, 1152, 16, None), ("8.9", 64, 368, 23, None), ("9.0", 15, 1536, 96, 2),
    )),
])  # fmt: skip
def test_models_read_no_terms_and_save_none(capability, size, channels, rank, chunk):
    shapes = jax.eval_shape(lambda: arguments(4, size, channels, rank))

    def operator(a):
        return mosaic_gpu.propagate_low_rank(*(a.get(name) for name in NAMES), chunk)

    def with_gradients(a):
        y, pull = jax.vjp(operator, a)
        return pull(y)

    with devices.for_device(capability):
        forward, both = (
            jax.jit(function).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
            for function in (operator, with_gradients)
        )
        saved = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(operator, a)[1], shapes))
    assert (forward.count("@mosaic_gpu"), both.count("@mosaic_gpu")) == (1, 2)
    assert f"{size}x{size}x4x3x{channels}xbf16" not in forward  # logits
    # a direction's states, filled up, and their halo, or the factors
    assert max(array.size for array in saved) <= max(1.7 * shapes["x"].size, 20 * channels * rank)


@pytest.mark.parametrize(("change", "taken"), [
    ({}, True), (dict(rank=17), True), (dict(rank=128), True), (dict(dtype=jnp.float32), False),
    (dict(size=13, channels=30), True), (dict(size=64, rank=96, channels=1536), True),
], ids=str)  # fmt: skip
def test_what_it_takes(change, taken):
    """On every generation, where what it cannot take is expanded by XLA."""
    sizes = dict(batch=1, size=14, channels=64, rank=16, dtype=jnp.bfloat16) | change
    shapes = jax.eval_shape(lambda: arguments(**sizes))
    for capability in devices.DEVICES:
        with compat.interpreted(), devices.for_device(capability):
            reason = mosaic_gpu.refuses_low_rank(shapes["x"], shapes["proxy"], 5, None)
        assert (reason is None) == taken


def test_four_directions_meet_on_chip_where_shared_memory_allows():
    """16 x 16 of GSPN-XL/2 on GPUs with the most of it, with a skip term too."""
    for kinds in (5, 6):
        for capability in ("9.0", "10.0"):
            make_plan = functools.partial(tiles.make_plan, 16, 16, 1536, directions=4, rank=96, kinds=kinds)
            plan = make_plan(device=devices.DEVICES[capability])
            assert plan.joint and plan.slab == 32


@pytest.mark.slow
def test_a_gradient_of_a_gradient():
    """By `reference`, as for the other kernels."""
    arrays = arguments(1, 3, 4, 2)

    def penalty(x, backend):
        y = propagate_low_rank(**arrays | {"x": x}, backend=backend).astype(jnp.float32)
        return (y**2).sum()

    def second(backend):
        return jax.grad(lambda x: (jax.grad(penalty)(x, backend).astype(jnp.float32) ** 2).sum())(arrays["x"])

    with interpreted(False):
        found = second("mosaic_gpu")
    assert error(found, second("scan")) < 0.02
    assert np.isfinite(np.asarray(found, np.float32)).all()
