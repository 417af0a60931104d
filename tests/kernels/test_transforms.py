"""How buffers of shared memory lie there, as JAX decides when it lowers a kernel: no swizzle where rows are shifted.

A swizzle exchanges columns in a pattern that repeats every 8 rows. JAX gives one to a buffer without transforms, also
where slices of it start at rows that are no multiples of 8, and then reads and writes those at wrong addresses
(docs/kernel_code.md, "A defect of JAX"). The interpreter knows no swizzles, so only the lowering shows it.
"""

import functools
import re

import jax
import jax.experimental.mosaic.gpu as mosaic
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import dialect_lowering
from jax.experimental.pallas import mosaic_gpu as plgpu

from gspn_jax.kernels import compat, devices, mosaic_gpu, shared_memory, tiles

PATTERN = 8
"""Rows after which a swizzle repeats."""
BUFFER = re.compile(r"mosaic_gpu\.slice_smem.*?out_transforms = \[\[(.*?)\]\].*?-> memref<([\dx]+)x(\w+),")


@pytest.fixture
def buffers(monkeypatch):
    """Of the kernels that are lowered: (shape, type, rows of a tile or None, bytes of the swizzle)."""
    found = []
    lower = dialect_lowering.lower_mgpu_dialect

    def read(module, *arguments, **options):
        for transforms, shape, dtype in BUFFER.findall(str(module)):
            tile = re.search(r"tile<\[([\d, ]+)\]>", transforms)
            swizzle = int(("0", *re.findall(r"swizzle<(\d+)", transforms))[-1])
            rows = [*map(int, tile[1].split(", "))][:-1] if tile else []
            found.append((shape, dtype, rows[0] if rows else None, 0 if swizzle == 16 else swizzle))  # 16: JAX 0.10
        return lower(module, *arguments, **options)

    for module in (dialect_lowering, mosaic):  # since JAX 0.11, and in 0.10
        monkeypatch.setattr(module, "lower_mgpu_dialect", read)
    return found


def lower_with_gradients(function, *shapes):
    def run(*arrays):
        y, pull = jax.vjp(function, *arrays)
        return y, pull(y)

    jax.clear_caches()
    jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))


def lower_propagate(side=16, channels=64):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    pixels = (1, side, side)
    lower_with_gradients(
        lambda *a: mosaic_gpu.propagate(*a, None, None),
        array((*pixels, channels)),
        array((*pixels, 4, 3, channels)),
        array((*pixels, 4, channels)),
        array((*pixels, 4, channels)),
        array((4,), dtype=jnp.float32),
    )


def lower_narrow_slabs(channels=64, groups=4):
    """Slabs of 16 channels, as wide as a group or the map: JAX 0.12 knows no store of some that it calls good, JAX
    before it does not lower them."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    lower_with_gradients(
        lambda *a: mosaic_gpu.propagate(*a, None, None),
        array((1, 16, 16, channels)),
        array((1, 16, 16, 4, 3, groups)),
        *[array((1, 16, 16, 4, channels))] * 2,
        array((4,)),
    )


def lower_few_channels():
    lower_narrow_slabs(channels=16, groups=16)


def lower_line_scan():
    weights = [jax.ShapeDtypeStruct((1, 16, 16, 64), jnp.float32)] * 4
    lower_with_gradients(lambda *a: mosaic_gpu.line_scan(*a, "left", None), *weights)


def lower_low_rank(rank=24, side=16, channels=68, chunk=None, capability="9.0"):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    pixels = (4, side, side)
    with devices.for_device(capability):
        lower_with_gradients(
            lambda *a: mosaic_gpu.propagate_low_rank(*a[:6], a[6], chunk),
            array((*pixels, channels)),
            array((*pixels, rank)),
            array((rank, 4, 3, channels)),
            array((rank, 4, channels)),
            array((rank, 4, channels)),
            array((4,), dtype=jnp.float32),
            array((rank, 4, channels)),
        )


def lower_local():
    lower_low_rank(channels=72, chunk=2)


def lower_local_in_pieces():
    lower_low_rank(side=28, channels=72, chunk=2)


def lower_local_without_wgmma():
    lower_low_rank(side=28, channels=72, chunk=2, capability="8.9")


def shifted(buffers):
    """Those that have a swizzle and may be sliced inside of its pattern: JAX took tiles of less than 8 rows."""
    return [buffer for buffer in buffers if buffer[3] and (buffer[2] is None or buffer[2] % PATTERN)]


@pytest.mark.parametrize("lower", [
    lower_propagate,
    lower_narrow_slabs,
    pytest.param(lower_few_channels, marks=pytest.mark.slow),
    lower_line_scan,
    pytest.param(lower_low_rank, marks=pytest.mark.skipif(not compat.HAS_MMA, reason="refused")),
    pytest.param(lower_local, marks=pytest.mark.skipif(not compat.RESHAPES_REFERENCES, reason="refused")),
    pytest.param(lower_local_in_pieces, marks=pytest.mark.skipif(not compat.RESHAPES_REFERENCES, reason="refused")),
    pytest.param(lower_local_without_wgmma, marks=pytest.mark.skipif(not compat.HAS_MMA, reason="refused")),
])  # fmt: skip
def test_no_buffer_that_is_sliced_at_any_row_is_swizzled(lower, buffers):
    lower()
    assert buffers
    assert not shifted(buffers)


def test_none_where_directions_do_not_meet_on_chip(buffers):
    assert not tiles.make_plan(64, 64, 16, directions=4, device=devices.DEVICES[devices.DEFAULT]).joint
    lower_propagate(64, 16)
    assert buffers
    assert not shifted(buffers)


def test_the_test_sees_a_buffer_left_to_jax(buffers, monkeypatch):
    """If this fails alone, JAX infers other transforms, and the row-major ones may no longer be needed."""
    monkeypatch.setattr(shared_memory, "row_major", lambda shape: plgpu.SMEM(shape, jnp.float32))
    lower_propagate()
    assert shifted(buffers)


def test_jax_refuses_a_swizzle_of_our_own_where_rows_are_shifted():
    """So that what has one, and lowers, is sliced at whole patterns only."""

    def body(x, y, shared):
        tile = compat.load(x, (slice(None), slice(None)), tiles.layout(64))
        shared[pl.ds(1, 16), :] = tile
        y[...] = compat.load(shared, (pl.ds(0, 16), slice(None)), tiles.layout(64))

    transforms = (plgpu.TilingTransform((PATTERN, 32)), plgpu.SwizzleTransform(128))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32)

    def kernel(x):
        return compat.kernel(
            body,
            (),
            [x],
            out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=(1,),
            grid_names=("one",),
            num_threads=1,
            thread_name="warpgroup",
            scratch_types=[plgpu.SMEM((24, 64), jnp.float32, transforms=transforms)],
        )

    with pytest.raises(ValueError):
        jax.jit(kernel).trace(x).lower(lowering_platforms=("cuda",))
