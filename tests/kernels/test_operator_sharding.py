"""The operator over devices: batch and channels sharded, no communication."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gspn_jax.kernels import (
    Shards,
    api,
    depthwise_conv,
    line_scan,
    propagate,
    propagate_low_rank,
    scan,
    sharded,
    sharding,
)
from gspn_jax.kernels.sharding import over_shards
from tests.kernels.numpy_scan import relative_error

COLLECTIVES = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
BATCH, SIZE, CHANNELS = 4, 5, 8


def arrays(groups):
    rng = np.random.default_rng(0)
    shapes = ((CHANNELS,), (4, 3, groups), (4, CHANNELS), (4, CHANNELS))
    pixels = [jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, *shape)), jnp.float32) for shape in shapes]
    return *pixels, jnp.asarray(rng.normal(size=(4, CHANNELS)), jnp.float32)


def shardings(mesh, groups):
    over_groups = "tensor" if groups > 1 else None
    specs = (
        P("data", None, None, "tensor"),
        P("data", None, None, None, None, over_groups),
        P("data", None, None, None, "tensor"),
        P("data", None, None, None, "tensor"),
        P(None, "tensor"),
    )
    return tuple(NamedSharding(mesh, spec) for spec in specs)


def gradients(*operands):
    return jax.grad(lambda *operands: (propagate(*operands, chunk=3) ** 2).sum(), argnums=(0, 1, 2, 3, 4))(*operands)


@pytest.mark.parametrize("groups", [CHANNELS, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 1))])
def test_four_devices_give_the_values_and_gradients_of_one(groups):
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    one = arrays(groups)
    four = tuple(map(jax.device_put, one, shardings(mesh, groups)))
    compiled = jax.jit(lambda *operands: propagate(*operands, chunk=3)).lower(*four).compile()
    assert not re.search(COLLECTIVES, compiled.as_text())
    assert relative_error(compiled(*four), propagate(*one, chunk=3)) < 1e-6
    for found, expected in zip(jax.jit(gradients)(*four), jax.jit(gradients)(*one), strict=True):
        assert relative_error(found, expected) < 1e-6


def test_it_runs_inside_shard_map():
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    one, specs = arrays(CHANNELS), tuple(sharding.spec for sharding in shardings(mesh, CHANNELS))
    over_parts = jax.shard_map(
        gradients, mesh=mesh, in_specs=specs, out_specs=(*specs[:4], P("data", "tensor")), check_vma=False
    )
    *found, by_merge = jax.jit(over_parts)(*one)
    *expected, by_merge_expected = jax.jit(gradients)(*one)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-6
    assert relative_error(by_merge.reshape(2, 4, CHANNELS).sum(0), by_merge_expected) < 1e-6


def test_a_depthwise_convolution_needs_no_communication_and_its_gradient_one_sum():
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    rng = np.random.default_rng(0)
    shapes = (BATCH, SIZE, SIZE, CHANNELS), (3, 3, CHANNELS)
    one = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    four = tuple(
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(one, (P("data", None, None, "tensor"), P(None, None, "tensor")), strict=True)
    )
    compiled = jax.jit(depthwise_conv).lower(*four).compile()
    assert not re.search(COLLECTIVES, compiled.as_text())
    assert relative_error(compiled(*four), depthwise_conv(*one)) < 1e-6
    gradient = jax.jit(jax.grad(lambda *a: (depthwise_conv(*a) ** 2).sum(), argnums=(0, 1)))
    in_loops, entry = gradient.lower(*four).compile().as_text().split("ENTRY")
    assert len(re.findall(rf"= \S+ {COLLECTIVES}\(", entry)) == 1 and not re.search(COLLECTIVES, in_loops)
    for found, expected in zip(gradient(*four), gradient(*one), strict=True):
        assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize(("groups", "merge", "batch"), [(CHANNELS, (4,), 4), (1, (4, CHANNELS), 4), (4, (4,), 3)])
def test_what_a_kernel_is_given_inside_sharded(groups, merge, batch):
    """A kernel, for which the scan stands here, runs under shard_map: its parts make up the whole, and nothing is
    communicated but the sum of the gradients of what every device has. A batch of 3 is not split over 2 devices."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    rng = np.random.default_rng(0)
    shapes = ((CHANNELS,), (4, 3, groups), (4, CHANNELS), (4, CHANNELS), (4, CHANNELS))
    *pixels, skip = [jnp.asarray(rng.normal(size=(batch, SIZE, SIZE, *shape)), jnp.float32) for shape in shapes]
    operands = (*pixels, jnp.asarray(rng.normal(size=merge), jnp.float32), skip)
    seen = []

    def kernel(x, gates, lam, out_gate, merge, skip, chunk):
        seen.append((x.shape, gates.shape))
        return scan.propagate(x, gates, lam, out_gate, merge, skip, chunk)

    def run(*operands):
        with sharded(mesh, batch=("data",), channels=("tensor",)):
            return over_shards(kernel, "bc bc bc bc -c bc")(*operands, 2)

    def by_operands(function):
        return jax.jit(jax.grad(lambda *a: (function(*a) ** 2).sum(), argnums=tuple(range(6))))(*operands)

    split = batch // 2 if batch % 2 == 0 else batch
    compiled = jax.jit(run).lower(*operands).compile()
    assert set(seen) == {((split, SIZE, SIZE, CHANNELS // 2), (split, SIZE, SIZE, 4, 3, max(groups // 2, 1)))}
    assert relative_error(compiled(*operands), scan.propagate(*operands, 2)) < 1e-6
    assert not re.search(r"all-reduce|all-to-all|collective-permute|reduce-scatter", compiled.as_text())
    expected = by_operands(lambda *a: scan.propagate(*a, 2))
    for found, right in zip(by_operands(run), expected, strict=True):
        assert relative_error(found, right) < 1e-6


@pytest.mark.parametrize("groups", [CHANNELS, pytest.param(1, marks=pytest.mark.slow)])
def test_what_a_low_rank_kernel_is_given_inside_sharded(groups):
    """Every device has the proxy of its images and the factors of its channels; gradients are sums over the parts."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    rng = np.random.default_rng(0)
    shapes = (
        (BATCH, SIZE, SIZE, CHANNELS),
        (BATCH, SIZE, SIZE, 3),
        (3, 4, 3, groups),
        (3, 4, CHANNELS),
        (3, 4, CHANNELS),
        (4,),
        (3, 4, CHANNELS),
    )
    operands = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    seen = []

    def kernel(x, proxy, gates, lam, out_gate, merge, skip, chunk):
        seen.append((x.shape, proxy.shape, gates.shape, lam.shape))
        return propagate_low_rank(x, proxy, gates, lam, out_gate, merge, skip=skip, chunk=chunk, backend="scan")

    def run(*operands):
        with sharded(mesh, batch=("data",), channels=("tensor",)):
            return over_shards(kernel, "bc b- -c -c -c -c -c")(*operands, 2)

    def by_operands(function):
        return jax.jit(jax.grad(lambda *a: (function(*a) ** 2).sum(), argnums=tuple(range(7))))(*operands)

    half = CHANNELS // 2
    compiled = jax.jit(run).lower(*operands).compile()
    assert set(seen) == {((2, SIZE, SIZE, half), (2, SIZE, SIZE, 3), (3, 4, 3, max(groups // 2, 1)), (3, 4, half))}
    assert not re.search(COLLECTIVES.replace("(all-gather|", "("), compiled.as_text())
    expected = kernel(*operands, 2)
    assert relative_error(compiled(*operands), expected) < 1e-6
    for found, right in zip(by_operands(run), by_operands(lambda *a: kernel(*a, 2)), strict=True):
        assert relative_error(found, right) < 1e-6


@pytest.mark.parametrize(("heads", "a_device"), [(2, 1), (6, 3), (3, 3)])
def test_an_axis_in_the_middle_is_split_where_the_mesh_divides_it(heads, a_device):
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    x = jnp.arange(4 * 3 * heads * 5, dtype=jnp.float32).reshape(4, 3, heads, 5)
    seen = []

    def double(x, _):
        seen.append(x.shape)
        return 2 * x

    with sharded(mesh, batch=("data",), channels=("tensor",)):
        found = jax.jit(lambda x: over_shards(double, "b-c-")(x, None))(x)
    np.testing.assert_array_equal(found, 2 * x)
    assert set(seen) == {(2, 3, a_device, 5)}


@pytest.fixture
def seen(monkeypatch):
    """Shapes of x that the operators are traced for by a backend "mosaic_gpu", for which the scan stands."""
    found = []

    def line_scan(x, *others):
        found.append(x.shape)
        return scan.line_scan(x, *others)

    monkeypatch.setitem(
        api._BACKENDS, "mosaic_gpu", api._BACKENDS["scan"]._replace(line_scan=over_shards(line_scan, "bc bc bc bc"))
    )
    sharding._log_whole.cache_clear()
    return found


def scan_of(x, w, **options):
    return line_scan(x, w, w, w, direction="down", backend="mosaic_gpu", **options)


def mesh_of_four(kind):
    return jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4], axis_types=(kind,) * 2)


WHOLE, PART = (BATCH, SIZE, SIZE, CHANNELS), (BATCH // 2, SIZE, SIZE, CHANNELS // 2)


def test_a_function_that_was_jitted_outside_of_sharded_is_split_inside(seen):
    x, run = jnp.ones(WHOLE), jax.jit(scan_of)
    mesh = mesh_of_four(jax.sharding.AxisType.Auto)
    expected = run(x, x)
    for _ in range(2):
        with sharded(mesh, batch=("data",), channels=("tensor",)):
            np.testing.assert_allclose(run(x, x), expected, rtol=1e-6)
        np.testing.assert_array_equal(run(x, x), expected)
    assert seen == [WHOLE, PART]


def test_shards_are_an_argument_too_and_come_before_those_of_sharded(seen):
    x = jnp.ones(WHOLE)
    mesh = mesh_of_four(jax.sharding.AxisType.Auto)
    shards = Shards(mesh=mesh, batch=("data",), channels=("tensor",))
    with sharded(mesh, batch=("data",)):
        jax.jit(lambda x: scan_of(x, x, shards=shards))(x)
    assert seen == [PART]


def test_over_explicit_axes_the_type_of_x_says_how_it_is_split(seen):
    with jax.set_mesh(mesh_of_four(jax.sharding.AxisType.Explicit)):
        x = jax.device_put(jnp.ones(WHOLE), P("data", None, None, "tensor"))
        y = jax.jit(scan_of)(x, x)
    assert seen == [PART]
    assert y.sharding.spec == P("data", None, None, "tensor")


def test_a_mesh_without_a_word_on_how_arrays_are_split_gets_a_warning(seen, caplog):
    x = jnp.ones(WHOLE)
    with jax.set_mesh(mesh_of_four(jax.sharding.AxisType.Auto)):
        jax.jit(scan_of)(x, x)
    assert seen == [WHOLE]
    assert "over the mesh axes 'data', 'tensor' without `shards`: every device computes the whole" in caplog.text
