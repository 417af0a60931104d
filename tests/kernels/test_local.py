"""The kernel of chunk=2, interpreted against the scan backend, and lowered; in machine code it is in tests/ptx."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.kernels import compat, devices, local, local_block, local_bodies, mosaic_gpu
from gspn_jax.kernels.terms import Job
from gspn_jax.kernels.weights import DIRECTIONS
from tests.kernels.low_rank_cases import NAMES, arguments, error, value_and_gradients
from tests.kernels.mosaic import interpreted


@contextlib.contextmanager
def few_blocks_on(capability):
    with devices.for_device(dataclasses.replace(devices.DEVICES[capability], multiprocessors=1)):
        yield


@pytest.fixture
def few_blocks():
    """A block walks over several images, as it does in training."""
    with few_blocks_on("9.0"):
        yield


@pytest.fixture
def few_blocks_without_wgmma():
    with few_blocks_on("8.9"):
        yield


def of_size(batch, height, width, **options):
    """Arguments for a map that need not be square."""
    row = arguments(batch, height * width, 16, 16, **options)
    return {
        name: array[:, :1].reshape(batch, height, width, -1) if name in ("x", "proxy") else array
        for name, array in row.items()
    }


def by_kernel(arrays):
    """As `value_and_gradients`, without the checks of the public operator, which wants 64 channels."""
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=arrays["x"].shape), arrays["x"].dtype)

    def operator(arrays):
        return mosaic_gpu.propagate_low_rank(*(arrays.get(name) for name in NAMES), 2)

    def run(arrays):
        y, pull = jax.vjp(operator, arrays)
        return {"y": y, **pull(cotangent)[0]}

    return jax.block_until_ready(jax.jit(run)(arrays))


def assert_same_as_the_scan_in_float32(arrays, *, races=True):
    """As near to it as the scan backend with the same bfloat16 inputs."""
    exact = {name: array.astype(jnp.float32) for name, array in arrays.items()}
    expected = value_and_gradients(exact, backend="scan", chunk=2)
    rounded = value_and_gradients(arrays, backend="scan", chunk=2)
    with interpreted(races):
        assert local.refuses(arrays["x"], arrays["proxy"], 6 if "skip" in arrays else 5) is None
        found = by_kernel(arrays)
    assert not (races and compat.races_found())
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == arrays["x" if name == "y" else name].dtype
        assert error(array, expected[name]) < 1.5 * error(rounded[name], expected[name]), name


def test_values_and_gradients_are_those_of_the_scan(few_blocks):
    arrays = arguments(2, 16, 16, 24, merge=(4, 16))
    assert local._splits(2, 1) == 1
    assert_same_as_the_scan_in_float32(arrays)


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    dict(batch=3, size=16, channels=32, rank=24, skip=True),  # six kinds, two slabs, an odd batch
    dict(batch=1, size=16, channels=32, rank=24, groups=4),
], ids=lambda case: "-".join(map(str, case.values())))  # fmt: skip
def test_other_kinds_and_groups(few_blocks, case):
    assert_same_as_the_scan_in_float32(arguments(**case))


@pytest.mark.slow
def test_slabs_that_overlap():
    """24 channels are two overlapping slabs of 16. They store the same values twice, which counts as a race."""
    assert_same_as_the_scan_in_float32(arguments(1, 16, 24, 16), races=False)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(28, 14), (28, 26), (32, 32), (16, 48), (48, 16), (14, 14)], ids=str)
def test_maps_of_several_pieces(few_blocks, size, capsys):
    assert_same_as_the_scan_in_float32(of_size(1, *size))
    assert "RACE" not in capsys.readouterr().out  # in the forward kernel, which is not the last one


@pytest.mark.slow
def test_several_images_of_several_pieces_with_skip(few_blocks):
    assert_same_as_the_scan_in_float32(of_size(3, 32, 16, skip=True))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "size", "skip"), [
    (2, (16, 16), True), (1, (28, 14), False), (3, (32, 16), True),
], ids=str)  # fmt: skip
def test_gpus_without_wgmma(few_blocks_without_wgmma, batch, size, skip, capsys):
    assert_same_as_the_scan_in_float32(of_size(batch, *size, skip=skip))
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.skipif(not compat.RESHAPES_REFERENCES, reason="JAX 0.10 runs the kernel of every chunk")
@pytest.mark.parametrize(("channels", "rank", "size"), [
    (1200, 75, 16),
    pytest.param(1200, 75, 32, marks=pytest.mark.slow),
    pytest.param(1536, 93, 16, marks=pytest.mark.slow),
])  # fmt: skip
def test_models_launch_it_once_each_way_and_keep_nothing_for_the_backward_pass(channels, rank, size):
    shapes = jax.eval_shape(lambda: arguments(4, size, channels, rank))

    def operator(a):
        return mosaic_gpu.propagate_low_rank(*(a.get(name) for name in NAMES), 2)

    def with_gradients(a):
        y, pull = jax.vjp(operator, a)
        return pull(y)

    for function, launches in ((operator, 1), (with_gradients, 2)):
        text = jax.jit(function).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu") == launches
    saved = jax.eval_shape(lambda a: jax.vjp(operator, a)[1], shapes)
    largest = max(jax.tree.leaves(saved), key=lambda array: array.size)
    assert largest.size <= max(shapes["x"].size, 4 * 5 * channels * 96)


@pytest.mark.parametrize("slab", [8, 16])
@pytest.mark.parametrize("tiles", [2, 4])
def test_rows_of_what_classes_exchange_start_in_other_banks(tiles, slab):
    """A half warp reads or writes 32 bytes of each of four rows at a time, and the 32 banks have 4 bytes each."""
    starts = {4 * row * local_block.exchanged_channels(tiles, slab) % 128 for row in range(4)}
    assert starts == {0, 32, 64, 96}


def test_every_term_is_in_one_pair():
    for skip in (False, True):
        job = Job(directions=DIRECTIONS, chunk=2, logits=True, lam=True, out_gate=True, skip=skip)
        first = [(axis, False, kind) for axis in range(2) for kind in range(3, job.kinds)]
        second = [(axis, True, kind) for axis in range(2) for kind in range(job.kinds)]
        assert sorted(itertools.chain(*local_bodies.pairs(job))) == sorted(first + second)


@pytest.mark.parametrize(("change", "reason"), [
    (dict(dtype=jnp.float32), "takes bfloat16, not float32"),
    (dict(size=15), "takes even numbers of lines"),
    (dict(size=24), "would fill up a map of 24 x 24 to 1.8 times its pixels"),
    (dict(channels=68), "channels in eights from 16"),
    (dict(rank=128), "has no room on chip for a proxy of 128"),
])  # fmt: skip
def test_what_it_cannot_take(change, reason):
    sizes = dict(batch=1, size=16, channels=64, rank=16, dtype=jnp.bfloat16) | change
    shapes = jax.eval_shape(lambda: arguments(**sizes))
    with compat.interpreted():
        assert reason in local.refuses(shapes["x"], shapes["proxy"], 5)


@pytest.mark.parametrize("size", [(15, 16), (26, 34)])
def test_the_kernel_of_every_chunk_takes_what_this_one_refuses(size):
    """Odd numbers of lines, and maps that would be filled up too much."""
    shapes = jax.eval_shape(lambda: of_size(1, *size))
    with compat.interpreted():
        assert local.refuses(shapes["x"], shapes["proxy"], 5)
        assert mosaic_gpu.refuses_low_rank(shapes["x"], shapes["proxy"], 5, local.CHUNK) is None
