"""Which GPUs the kernel runs on, in which cut, and what it says of the others; no GPU is here."""

import dataclasses
import logging
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax import kernels
from gspn_jax.kernels import (
    api,
    compat,
    devices,
    launch,
    local,
    mosaic_gpu,
    propagate,
    propagate_low_rank,
    sharded,
    tiles,
)
from gspn_jax.kernels.depthwise_plan import Plan
from gspn_jax.kernels.terms import Inputs, Job
from gspn_jax.kernels.weights import DIRECTIONS

JAX = jax.__version_info__


def gpu(capability, kind="NVIDIA GPU"):
    return SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)


class MeshOf(jax.sharding.Mesh):
    """Of devices that are not there."""

    def __new__(cls, *found):
        return object.__new__(cls)

    def __init__(self, *found):
        object.__setattr__(self, "devices", np.array(found, object))


def machine(monkeypatch, *gpus, default=None):
    monkeypatch.setattr(devices, "get_default_device", lambda: default or gpus[0])
    monkeypatch.setattr(jax, "devices", lambda: list(gpus))


def terms(size, channels, dtype=jnp.bfloat16):
    pixel = (4, size, size)
    shapes = [(*pixel, channels), (*pixel, 4, 3, channels), (*pixel, 4, channels), (*pixel, 4, channels)]
    return [*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), jax.ShapeDtypeStruct((4,), jnp.float32)]


def low_rank_terms(size, channels, rank):
    shapes = [
        (4, size, size, channels),
        (4, size, size, rank),
        (rank, 4, 3, channels),
        (rank, 4, channels),
        (rank, 4, channels),
    ]
    return [*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes), jax.ShapeDtypeStruct((4,), jnp.float32)]


@pytest.mark.parametrize("capability", devices.DEVICES)
def test_the_kernel_is_taken_on_the_gpus_it_is_made_for(monkeypatch, capability):
    machine(monkeypatch, gpu(capability), gpu(capability))
    old = capability.startswith("8") and JAX < (0, 11, 2)
    assert (kernels.available_backends()[0] == "mosaic_gpu") != old
    assert devices.current().capability == capability
    if old:
        assert f"needs JAX 0.11.2 or newer on GPUs of compute capability {capability}" in devices.missing()


def test_work_is_split_for_the_multiprocessors_of_the_gpu_that_is_there(monkeypatch):
    splits = {}
    for kind, multiprocessors in (("NVIDIA GeForce RTX 4090", 128), ("NVIDIA L4", 58)):
        there = gpu("8.9", kind)
        there.core_count = multiprocessors
        machine(monkeypatch, there)
        assert devices.current() == dataclasses.replace(devices.DEVICES["8.9"], multiprocessors=multiprocessors)
        splits[kind] = local._splits(64, 16), Plan.of((64, 16, 16, 1536), (7, 7)).blocks
    # 64 images in 16 slabs: 128 blocks of 8 images in one round, or 256 of 4 in five rounds
    assert splits == {"NVIDIA GeForce RTX 4090": (8, 64), "NVIDIA L4": (16, 29)}


@pytest.mark.parametrize("capability", ["7.0", "7.5", "8.7", "11.0", "13.0", "gfx942", "9.0a"])
def test_other_gpus_scan_and_a_sentence_says_so(monkeypatch, capability, caplog):
    machine(monkeypatch, gpu(capability, "Some GPU"))
    api._log_choice.cache_clear()
    arrays = terms(4, 8)
    with caplog.at_level(logging.INFO, logger="gspn_jax.kernels.api"):
        jax.eval_shape(lambda *a: propagate(*a), *arrays)
    sentence = (
        f"needs an NVIDIA GPU of compute capability 8.0, 8.6, 8.9, 9.0, 10.0, 10.3, 12.0, 12.1, and 'Some GPU' "
        f"has {capability}"
    )
    assert caplog.messages == [f"Line scans run on the 'scan' backend. The 'mosaic_gpu' backend {sentence}."]
    with pytest.raises(ValueError, match=re.escape(f"'mosaic_gpu', which {sentence}; 'scan' runs everywhere")):
        jax.eval_shape(lambda *a: propagate(*a, backend="mosaic_gpu"), *arrays)
    assert kernels.backend_caveats()["mosaic_gpu"] == f"{sentence}; 'scan' runs instead"


def test_gpus_of_several_kinds_scan_unless_one_is_chosen(monkeypatch):
    machine(monkeypatch, gpu("9.0"), gpu("10.0"))
    assert "needs GPUs of one compute capability, and found 9.0 and 10.0" in devices.missing()
    assert kernels.available_backends() == ("scan", "reference")
    with jax.default_device(jax.local_devices()[0]):  # which, here, is the GPU of 9.0
        assert devices.missing() is None


def test_it_is_the_mesh_that_counts(monkeypatch):
    machine(monkeypatch, gpu("9.0"), gpu("10.0"))
    for found, reason in (
        ([gpu("9.0")] * 2, None),
        ([gpu("10.0")] * 2, "found 9.0 and 10.0"),
        (jax.local_devices()[:2], "device is 'cpu'"),
    ):
        with sharded(MeshOf(*found), batch=("data",)):
            assert devices.missing() is None if reason is None else reason in devices.missing()


@pytest.mark.parametrize("capability", [
    c if c in ("8.9", "9.0") else pytest.param(c, marks=pytest.mark.slow) for c in devices.DEVICES
])  # fmt: skip
def test_all_expand_proxies_with_a_jax_that_can(capability, caplog):
    api._log_expansion.cache_clear()
    with devices.for_device(capability), caplog.at_level(logging.INFO, logger="gspn_jax.kernels.api"):
        if devices.missing():
            pytest.skip(devices.missing())
        text = (
            jax.jit(lambda *a: propagate_low_rank(*a))
            .trace(*low_rank_terms(16, 64, 32))
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
        caveat = kernels.backend_caveats().get("mosaic_gpu")
    assert text.count("custom_call @mosaic_gpu") == 1
    wide = "4x16x16x4x3x64xbf16" in text  # logits in device memory
    assert wide != compat.HAS_MMA
    reason = f"needs JAX 0.11.2 or newer to expand proxies, and this is {jax.__version__}"
    line = f"XLA expands the proxy, and the plain kernel scans: the one that does both {reason}."
    assert (line in caplog.messages) == wide
    assert (caveat or "").startswith(f"{reason}: XLA expands them") == wide


@pytest.mark.parametrize("capability", [
    "8.9", *(pytest.param(c, marks=pytest.mark.slow) for c in devices.DEVICES if c != "8.9")
])  # fmt: skip
def test_all_expand_proxies_for_chunk_2_with_a_jax_that_can(capability):
    shapes = low_rank_terms(16, 64, 32)
    with devices.for_device(capability):
        if devices.missing():
            pytest.skip(devices.missing())
        reason = mosaic_gpu.refuses_low_rank(*shapes[:2], 5, 2)
        if JAX < (0, 11):
            assert "needs JAX 0.11.2 or newer to expand proxies" in reason
            return
        assert reason is None
        assert (mosaic_gpu.caveat() is None) == compat.HAS_MMA
        lowered = jax.jit(lambda *a: propagate_low_rank(*a, chunk=2)).trace(*shapes).lower(lowering_platforms=("cuda",))
        text = lowered.as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "4x16x16x4x3x64xbf16" not in text  # no logits in device memory


def allocated(shapes):
    """Bytes of a block's shared memory in types of scratch memory; a barrier has 8."""
    leaves = jax.tree.leaves(shapes, is_leaf=lambda node: not isinstance(node, tuple))
    return sum(
        np.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
        if hasattr(leaf, "shape")
        else 8 * np.prod(leaf.num_barriers)
        for leaf in leaves
    )


@pytest.mark.parametrize("capability", devices.DEVICES)
def test_what_a_block_takes_fits_into_its_shared_memory(capability):
    """As allocated for the backward pass, which takes more."""
    for height, width in [(4, 4), (16, 16), (14, 14), (28, 28), (64, 64), (1024, 1024), (20, 72), (7, 9), (1, 700)]:
        for channels in (1, 8, 64, 72, 1152, 1500):
            for directions in (DIRECTIONS, DIRECTIONS[:1]):
                assert_block_fits(devices.DEVICES[capability], height, width, channels, directions)


def assert_block_fits(device, height, width, channels, directions=DIRECTIONS):
    plan = tiles.make_plan(height, width, channels, directions=len(directions), device=device)
    job = Job(directions=directions, chunk=None, logits=True, lam=True, out_gate=True, skip=False)
    shared = launch._shared(job, plan, Inputs(*[None] * 6), plan.handed_on)
    assert 0 < allocated(shared) <= device.shared_bytes


@pytest.mark.parametrize(("capability", "longest"), [("8.0", 1664), ("8.6", 1024), ("9.0", 2304), ("12.0", 1024)])
def test_lines_up_to_the_longest_have_a_block(capability, longest):
    device = devices.DEVICES[capability]
    for length in (*range(100, longest, 36), longest):
        assert_block_fits(device, length, 70, 8)
    assert tiles.make_plan(longest + 1, 70, 8, directions=4, device=device) is None


def test_weights_of_four_channels_are_spread_as_before():
    """Their slabs are for long lines, and would leave most of each sector elsewhere."""
    for length in (64, 2048):
        assert tiles.make_plan(length, 64, 72, directions=4, device=devices.DEVICES["9.0"], group=4) is None


def test_a_function_is_traced_anew_for_another_device():
    @jax.jit
    def slabs():
        found.append(tiles.make_plan(16, 16, 1536, directions=4, device=devices.current()).slab)
        return 0

    found = []
    for capability in ("9.0", "8.9", "9.0", "8.9"):
        with devices.for_device(capability):
            slabs()
    assert found == [64, 32]


def test_pallas_lowers_for_the_device_that_was_asked_for():
    from jax.experimental.mosaic.gpu import core, utils

    def inferred():
        return (core if hasattr(core, "_infer_arch") else utils)._infer_arch()

    with devices.for_device("12.1"):
        assert inferred() == (12, 1)
        with devices.for_device(dataclasses.replace(devices.DEVICES["8.0"], scan_bytes=2**14)) as tuned:
            assert inferred() == (8, 0)
            assert devices.current() == tuned
    assert inferred() == (9, 0)
    assert devices.current().capability == "9.0"


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"a compute capability of 8\.0, .*, 12\.1, found '7\.5'\."):
        devices.for_device("7.5").__enter__()


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        ("import jax.experimental.pallas.mosaic_gpu as m; del m.ACC", "cannot import name 'ACC'"),
        ("import sys; sys.modules['jax.experimental.pallas.mosaic_gpu'] = None", "pallas.mosaic_gpu halted"),
    ],
    ids=["name", "module"],
)
def test_a_jax_that_moves_a_name_of_pallas_costs_the_kernel_alone(break_it, said):
    program = f"""{break_it}
import jax.numpy as jnp
from gspn_jax import kernels
assert kernels.available_backends() == ("scan", "reference")
x = jnp.ones((1, 2, 2, 1))
h = kernels.line_scan(x, x, x, x, direction="down")
assert h.sum() == 8, h
print(kernels.backend_caveats()["mosaic_gpu"])
try:
    kernels.line_scan(x, x, x, x, direction="down", backend="mosaic_gpu")
except ValueError as error:
    print(error)
"""
    shown = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[2],
    ).stdout
    caveat, error = shown.splitlines()
    assert caveat.startswith(f"cannot be had from this JAX ({jax.__version__}: ") and said in caveat
    assert caveat.endswith("'scan' runs instead")
    assert "'mosaic_gpu', which cannot be had from this JAX" in error and "'scan' runs everywhere" in error


def test_every_name_of_pallas_that_is_used_is_looked_for_at_import():
    folder = pathlib.Path(kernels.__file__).parent
    used = {name for path in folder.glob("*.py") for name in re.findall(r"\bplgpu\.([A-Za-z]\w*)", path.read_text())}
    only_if_there = {"store", "mma", "Replicated", "transpose_ref", "InterpretGPUParams"}
    assert used - only_if_there == set(compat.PALLAS_NAMES)
