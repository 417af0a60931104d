"""The GPU kernel on a machine without one: interpreted with race detection against the scan backend, and lowered.

The interpreter gives every warpgroup a thread of XLA's CPU client and blocks it at barriers; the 8 fake devices of
tests/conftest.py make that pool large enough.
"""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import bodies, compat, devices, launch, line_scan, mosaic_gpu, propagate, tiles, walk
from gspn_jax.kernels.sharding import over_shards, sharded
from tests.kernels import numpy_scan as truth
from tests.kernels.mosaic import interpreted

TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3}  # relative; the gradients go through states saved in bfloat16
NAMES = ("y", "x", "gates", "lam", "out_gate", "merge", "skip")


def arguments(batch, height, width, channels, *, groups=None, skip=False, merge=(4,), dtype=jnp.float32):
    rng = np.random.default_rng(0)
    pixels = (batch, height, width)
    shapes = [(*pixels, channels), (*pixels, 4, 3, groups or channels), (*pixels, 4, channels), (*pixels, 4, channels)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in [*shapes, (*pixels, 4, channels)]]
    return *arrays[:4], jnp.asarray(rng.normal(size=merge), jnp.float32), arrays[4] if skip else None


def value_and_gradients(function, arrays):
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), arrays[0].dtype)

    def run(arrays):
        y, pull = jax.vjp(lambda *a: function(*a), *arrays)
        return y, *pull(cotangent)

    return jax.jit(run)(arrays)


def run_propagate(backend, chunk=None):
    return lambda *a: propagate(*a[:5], skip=a[5], chunk=chunk, backend=backend)


def assert_same_as_the_scan(arrays, chunk=None, *, races=True):
    expected = value_and_gradients(run_propagate("scan", chunk), arrays)
    with interpreted(races):
        found = jax.block_until_ready(value_and_gradients(run_propagate("mosaic_gpu", chunk), arrays))
    assert not (races and compat.races_found())
    for name, a, b in zip(NAMES, found, expected, strict=True):
        if b is not None:
            assert a.dtype == b.dtype
            assert truth.relative_error(a, b) < TOLERANCE[arrays[0].dtype.name], name


def assert_one_direction_is_the_scan(arrays, direction):
    x, gates, *_ = arrays
    weights = [0.3 * gates[:, :, :, 0, j] for j in range(3)]

    def run(backend):
        return value_and_gradients(
            lambda *a: line_scan(*a, direction=direction, chunk=3, backend=backend), (x, *weights)
        )

    expected = run("scan")
    with interpreted():
        found = jax.block_until_ready(run("mosaic_gpu"))
    assert not compat.races_found()
    for a, b in zip(found, expected, strict=True):
        assert truth.relative_error(a, b) < TOLERANCE["float32"]


def test_directions_meet_in_shared_memory(monkeypatch):
    """With loads ahead, for which float32 has no registers on a GPU, but which it shows more exactly."""
    monkeypatch.setattr(bodies, "MOST_AHEAD", 28)
    arrays = arguments(1, 4, 4, 64, skip=True, merge=(4, 64))
    assert tiles.make_plan(4, 4, 64, directions=4, device=devices.current()).joint
    assert_same_as_the_scan(arrays, chunk=3)


@pytest.mark.slow
def test_terms_may_have_another_type_than_x():
    """Their cotangents then have it too."""
    x, *terms = arguments(1, 4, 4, 64)
    assert_same_as_the_scan((x.astype(jnp.bfloat16), *terms))


@pytest.fixture
def small_memory():
    """Maps too large to meet on chip, and lines that two warpgroups share, at sizes that can be interpreted."""
    device = dataclasses.replace(devices.DEVICES["9.0"], scan_bytes=2**14, apart_tile=256)
    plan = tiles.make_plan(8, 8, 64, directions=4, device=device)
    assert not plan.joint
    assert plan.warpgroups == 2
    with devices.for_device(device):
        yield


@pytest.mark.slow
def test_directions_apart_and_lines_shared_by_warpgroups(small_memory):
    assert_same_as_the_scan(arguments(1, 8, 8, 64, dtype=jnp.bfloat16))


@pytest.mark.slow
def test_directions_apart_with_chunks_and_a_skip_term(small_memory):
    assert_same_as_the_scan(arguments(1, 8, 8, 64, skip=True), chunk=2)


def test_slabs_that_overlap_and_weights_of_small_groups():
    """72 channels are two overlapping slabs of 64. They store the same values twice, which counts as a race."""
    assert_same_as_the_scan(arguments(1, 4, 4, 72, groups=18, dtype=jnp.bfloat16), races=False)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(64, 1), pytest.param(128, 2, marks=pytest.mark.slow), pytest.param(72, 1, marks=pytest.mark.slow)],
)
def test_weights_that_the_channels_of_a_block_share(channels, groups):
    """The kernel reads a number a pixel and spreads it. 72 channels overlap, as above."""
    assert_same_as_the_scan(arguments(1, 4, 4, channels, groups=groups, skip=True), chunk=3, races=channels != 72)


@pytest.mark.slow
def test_shared_weights_on_a_device_where_directions_do_not_meet_for_them(monkeypatch):
    def forward(job, plan, *rest, **options):
        plans.append((plan.joint, job.shared))
        return run(job, plan, *rest, **options)

    plans, run = [], launch.forward
    monkeypatch.setattr(launch, "forward", forward)
    with devices.for_device("8.0"):
        assert_same_as_the_scan(arguments(1, 4, 4, 64, groups=1))
    assert plans == [(False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("slab", [0, 1])
def test_a_slab_that_overlaps_another_has_no_race_of_its_own(monkeypatch, slab):
    """Each of the two slabs of 72 channels alone: what is left of races is that both store the same values."""
    arrays = arguments(1, 4, 4, 72, dtype=jnp.bfloat16)
    expected = run_propagate("scan")(*arrays)
    monkeypatch.setattr(tiles.Plan, "slabs", 1)
    monkeypatch.setattr(launch, "_merge_cotangent", lambda partial, job, plan: jnp.zeros((4, 72)))  # of both slabs
    monkeypatch.setattr(
        walk,
        "lax",
        SimpleNamespace(
            **vars(jax.lax) | {"axis_index": lambda name: slab if name == "slab" else jax.lax.axis_index(name)}
        ),
    )

    def by_x(backend):
        return jax.jit(jax.grad(lambda x: run_propagate(backend)(x, *arrays[1:]).astype(jnp.float32).sum()))(arrays[0])

    with interpreted():
        found = jax.block_until_ready(jax.jit(run_propagate("mosaic_gpu"))(*arrays))
        assert not compat.races_found()
        gradient = jax.block_until_ready(by_x("mosaic_gpu"))
        assert not compat.races_found()
    mine = slice(0, 64) if slab == 0 else slice(8, 72)
    assert truth.relative_error(found[..., mine], expected[..., mine]) < TOLERANCE["bfloat16"]
    assert truth.relative_error(gradient[..., mine], by_x("scan")[..., mine]) < TOLERANCE["bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "channels", "groups"), [(4, 8, 64, 1), (5, 3, 12, 6), (16, 16, 64, 64)])
def test_other_maps(height, width, channels, groups):
    assert_same_as_the_scan(arguments(1, height, width, channels, groups=groups, skip=True))


@pytest.mark.slow
def test_tiles_of_a_line_that_overlap():
    """Rows of 5 positions and columns of 7, each two tiles of 4. What both tiles have is summed once."""
    plan = tiles.make_plan(7, 5, 64, directions=4, device=devices.current())
    assert plan.joint and plan.rows.overlap and plan.columns.overlap
    assert_same_as_the_scan(arguments(1, 7, 5, 64, skip=True, merge=(4, 64)), chunk=3)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, 1])
def test_tiles_that_overlap_within_the_parts_of_warpgroups(groups):
    """Two warpgroups share a line of 14 positions; each takes 7 of them in two tiles of 4."""
    device = dataclasses.replace(devices.DEVICES["9.0"], scan_bytes=2**15, apart_tile=256)
    with devices.for_device(device):
        plan = tiles.make_plan(14, 14, 64, directions=4, device=device)
        assert not plan.joint and plan.warpgroups == 2 and plan.rows.stretch == 7
        assert_same_as_the_scan(arguments(1, 14, 14, 64, groups=groups), chunk=5)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "groups"), [(8, None), (6, 1)])
def test_lines_for_which_no_other_slab_has_room(channels, groups):
    """Two slabs of four channels. Of six channels the second overlaps the first, which counts as a race."""
    device = dataclasses.replace(devices.DEVICES["9.0"], scan_bytes=2**13, shared_bytes=2**13)
    with devices.for_device(device):
        plan = tiles.make_plan(64, 64, channels, directions=4, device=device)
        assert not plan.joint and plan.slab == tiles.NARROWEST and plan.slabs == 2
        arrays = arguments(1, 64, 64, channels, groups=groups, skip=True)
        assert_same_as_the_scan(arrays, chunk=5, races=channels == 8)


def test_groups_of_weights_smaller_than_a_slab(monkeypatch):
    """Two sets for 64 channels: slabs are as narrow as a group, and the kernel gets the weights as they are."""

    def forward(job, plan, inputs, **options):
        found.append((job.shared, plan.slab, inputs.weights.shape[-1]))
        return run(job, plan, inputs, **options)

    found, run = [], launch.forward
    monkeypatch.setattr(launch, "forward", forward)
    assert_one_direction_is_the_scan(arguments(1, 8, 8, 64, groups=2), "right")
    assert found == [(True, 32, 2)]


@pytest.mark.parametrize(("height", "width"), [(7, 7), (14, 14), (28, 28), (56, 56), (14, 10), (30, 20), (130, 200)])
@pytest.mark.parametrize("capability", devices.DEVICES)
def test_no_map_from_seven_on_is_filled_up(capability, height, width):
    """Every pixel is in memory once, and few positions of lines are computed twice."""
    plan = tiles.make_plan(height, width, 576, directions=4, device=devices.DEVICES[capability])
    assert (plan.height, plan.width, plan.channels) == (height, width, 576)
    assert plan.computed <= 1.4 * height * width
    if capability == "9.0":
        assert plan.computed <= 1.2 * height * width
        assert plan.joint == (height <= 30)
        assert plan.joint or plan.warpgroups == 4 or height > 56


@pytest.mark.parametrize("direction", ["up", pytest.param("left", marks=pytest.mark.slow)])
def test_one_direction_with_ready_weights(direction):
    assert_one_direction_is_the_scan(arguments(2, 4, 7, 64), direction)


def test_the_interpreter_sees_a_missing_barrier(small_memory, monkeypatch):
    """Races are only excluded by a detector that finds them."""
    monkeypatch.setattr(bodies, "begin_line", lambda plan, shared: None)
    try:
        with interpreted():
            jax.block_until_ready(run_propagate("mosaic_gpu")(*arguments(1, 8, 8, 64)))
    except jax.errors.JaxRuntimeError as error:  # JAX 0.12 does not go on after a race
        assert "RACE DETECTED" in str(error)
    else:
        assert compat.races_found()


@pytest.mark.parametrize("memory", ["plenty", pytest.param("little", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "groups"),
    [
        (jnp.float32, None),
        pytest.param(jnp.bfloat16, 1, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, None, marks=pytest.mark.slow),
    ],
)
def test_every_variant_lowers_for_cuda(memory, dtype, groups, request):
    """The Python half of the compilation, which infers layouts and checks every operation, runs without a GPU."""
    if memory == "little":
        request.getfixturevalue("small_memory")
    skip = dtype == jnp.float32
    arrays = jax.eval_shape(lambda: arguments(2, 8, 8, 68, groups=groups, skip=skip, dtype=dtype))

    def run(*arrays):
        y, pull = jax.vjp(lambda *a: mosaic_gpu.propagate(*a, 2 if skip else None), *arrays)
        return y, pull(y)

    text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 2
    assert all(f"tensor<2x8x8x4x3x{groups or 68}x" in line for line in calls)  # weights as they were given


def test_one_direction_lowers_for_cuda():
    x = jax.ShapeDtypeStruct((1, 16, 16, 64), jnp.bfloat16)

    def run(*arrays):
        y, pull = jax.vjp(lambda *a: mosaic_gpu.line_scan(*a, "left", None), *arrays)
        return pull(y)

    assert "mosaic_gpu" in jax.jit(run).trace(x, x, x, x).lower(lowering_platforms=("cuda",)).as_text()


def four_devices():
    return jax.make_mesh(
        (2, 2), ("data", "tensor"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def test_over_a_mesh_the_kernel_gives_the_values_and_gradients_of_one_device():
    """Under `shard_map`, images and channels split. JAX 0.12's interpreter mixes up the clocks of several devices and
    sees races where on one device it sees none, so they are looked for under 0.10 only."""
    arrays = arguments(2, 4, 4, 128, merge=(4, 128))
    expected = value_and_gradients(run_propagate("scan"), arrays)

    def run(*arrays):
        with sharded(four_devices(), batch=("data",), channels=("tensor",)):
            return run_propagate("mosaic_gpu")(*arrays)

    races = jax.__version_info__ < (0, 11)
    with interpreted(races):
        found = jax.block_until_ready(value_and_gradients(run, arrays))
    assert not (races and compat.races_found())
    for name, a, b in zip(NAMES, found, expected, strict=True):
        if b is not None:
            assert truth.relative_error(a, b) < TOLERANCE["float32"], name


def test_over_a_mesh_the_kernel_takes_each_device_its_part():
    """Lowered over four devices, images and channels split: its arrays are a quarter, nothing is communicated."""
    mesh = four_devices()
    arrays = jax.eval_shape(lambda: arguments(2, 4, 4, 128))[:5]
    operator = over_shards(mosaic_gpu.propagate, "bc bc bc bc -c bc")

    def run(*arrays):
        with sharded(mesh, batch=("data",), channels=("tensor",)):
            y, pull = jax.vjp(lambda x: operator(x, *arrays[1:], None, None), arrays[0])
            return pull(y)

    text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "mosaic_gpu" in line and "custom_call" in line]
    assert len(calls) == 2
    assert all("tensor<1x4x4x4x3x64xf32>" in line and "x128x" not in line for line in calls)
    assert not re.search(r"all_reduce|all_gather|all_to_all|collective_permute|reduce_scatter", text)


def test_what_cannot_run_says_so_and_names_the_fallback():
    arrays = arguments(1, 4, 4, 8)
    with pytest.raises(ValueError, match=r"found 'mosaic_gpu', which needs an NVIDIA GPU, .*; 'scan' runs everywhere"):
        propagate(*arrays[:5], backend="mosaic_gpu")
    with compat.interpreted():
        with pytest.raises(ValueError, match="takes float32 and bfloat16, not float16"):
            propagate(*(a.astype(jnp.float16) for a in arrays[:5]), backend="mosaic_gpu")
        long = jax.eval_shape(lambda: arguments(1, 1, 2**14, 8))
        with pytest.raises(ValueError, match="no room on chip for lines of 16384 positions"):
            jax.eval_shape(run_propagate("mosaic_gpu"), *long)
        jax.eval_shape(run_propagate(None), *long)


def test_a_program_that_calls_a_kernel_twice_has_it_once():
    x = jax.ShapeDtypeStruct((1, 16, 16, 64), jnp.float32)

    def run(x, chunk):
        def scan(x):
            return mosaic_gpu.line_scan(x, x, x, x, "down", None)

        return scan(scan(x)) + mosaic_gpu.line_scan(x, x, x, x, "down", chunk)

    for chunk, kernels_of_program in ((None, 1), (2, 2)):
        text = jax.jit(run, static_argnums=1).trace(x, chunk).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels_of_program
