"""The stack runner and stochastic depth, on blocks small enough to follow by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.models.drop_path import DropPath
from gspn_jax.models.norms import layer_norm
from gspn_jax.models.parameters import stack
from gspn_jax.models.stack import Machine, run_blocks_on, run_stack, tensor_cores


class Affine(nnx.Module):
    """x -> 2x + bias + chunk (0 if None) + long skip, through the drop path if there is one."""

    def __init__(self, rngs: nnx.Rngs):
        self.bias = nnx.Param(jax.random.normal(rngs.params(), ()))

    def __call__(self, x, condition, *, chunk, drop_path, long_skip):
        branch = x + self.bias[...] + (chunk or 0) + (0.0 if long_skip is None else long_skip)
        return x + (branch if drop_path is None else drop_path(branch))


@pytest.mark.parametrize("chunks", [(2, 2, 2, 2), (2, 2, None, None), (1, 2, 3, 1)])
@pytest.mark.parametrize("remat", ["none", "dots", "names", "full"])
@pytest.mark.parametrize("unroll", [False, True], ids=["loops", "one by one"])
def test_blocks_run_in_order_each_with_its_own_parameters_chunk_and_skip(chunks, remat, unroll):
    blocks = stack(Affine, 4, nnx.Rngs(0))
    bias = np.asarray(blocks.bias[...])
    assert len(set(bias.tolist())) == 4
    skips = np.arange(4.0, dtype=np.float32).reshape(4, 1, 1, 1, 1)
    x = np.ones((1, 1, 1, 1), np.float32)
    found, kept, features = run_stack(
        blocks, jnp.asarray(x), chunks=chunks, remat=remat, unroll=unroll, long_skips=jnp.asarray(skips), keep=True,
        features=(0, 2),
    )  # fmt: skip
    expected = []
    for i in range(4):
        x = 2 * x + bias[i] + (chunks[i] or 0) + skips[i]
        expected.append(x)
    np.testing.assert_allclose(found, expected[-1], rtol=1e-6)
    np.testing.assert_allclose(kept, np.stack(expected[-2::-1]), rtol=1e-6)  # between the blocks, the last first
    np.testing.assert_allclose([features[0], features[2]], [expected[0], expected[2]], rtol=1e-6)


class Turn(nnx.Module):
    """x -> x + tanh(x @ kernel + condition + chunk) + long skip."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 3)))

    def __call__(self, x, condition, *, chunk, drop_path, long_skip):
        return x + drop_path(jnp.tanh(x @ self.kernel[...] + condition[:, None, None] + chunk)) + long_skip


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_are_those_of_blocks_called_in_turn(remat):
    chunks, drops = (1, 2, 1), DropPath(jax.random.split(jax.random.key(1), 3), jnp.array([0.1, 0.5, 0.5]))
    graphdef, params = nnx.split(stack(Turn, 3, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((2, 1, 2, 3), (2, 3), (3, 2, 1, 2, 3))]

    def in_turn(params, x, condition, skips):
        for i, chunk in enumerate(chunks):
            block = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], params))
            drop = DropPath(drops.key[i], drops.rate[i])
            x = block(x, condition, chunk=chunk, drop_path=drop, long_skip=skips[i])
        return jnp.square(x).sum()

    def stacked(unroll, params, x, condition, skips):
        skips = list(skips) if unroll else skips
        blocks, own = nnx.merge(graphdef, params), {"drop_path": drops, "long_skips": skips}
        return jnp.square(run_stack(blocks, x, condition, chunks=chunks, remat=remat, unroll=unroll, **own)[0]).sum()

    wanted = jax.grad(in_turn, (0, 1, 2, 3))(params, *arrays)
    for unroll in (False, True):
        found = jax.jit(jax.grad(functools.partial(stacked, unroll), (0, 1, 2, 3)))(params, *arrays)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, wanted)


def test_what_is_not_kept_is_computed_again():
    """The compiler sees both computations of a block, and could take one for the other: a tanh a block each."""
    graphdef, params = nnx.split(stack(Turn, 3, nnx.Rngs(0)))
    drops, x = DropPath(jax.random.split(jax.random.key(0), 3), jnp.zeros(3)), jnp.ones((2, 1, 1, 3))

    def loss(params):
        blocks, own = nnx.merge(graphdef, params), {"drop_path": drops, "long_skips": [x] * 3}
        y, _, _ = run_stack(blocks, x, jnp.zeros((2, 3)), chunks=(1,) * 3, remat="full", unroll=True, **own)
        return jnp.square(y).sum()

    program = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    assert len(re.findall(r"= \S+ tanh\(", program)) == 6


def test_gradients_of_a_block_go_on_together():
    """A barrier a block, without which those of weights may come late where they are sent to other devices."""
    graphdef, params = nnx.split(stack(Turn, 3, nnx.Rngs(0)))
    drops, x = DropPath(jax.random.split(jax.random.key(0), 3), jnp.zeros(3)), jnp.ones((2, 1, 1, 3))

    def loss(params):
        blocks, own = nnx.merge(graphdef, params), {"drop_path": drops, "long_skips": [x] * 3}
        return run_stack(blocks, x, jnp.zeros((2, 3)), chunks=(1,) * 3, remat="none", unroll=True, **own)[0].sum()

    assert jax.jit(jax.grad(loss)).lower(params).as_text().count("optimization_barrier") == 3


def test_stack_drops_by_the_rate_of_each_block():
    blocks = stack(Affine, 3, nnx.Rngs(0))
    blocks.bias[...] = jnp.array([1.0, 10.0, 100.0])
    drop_path = DropPath(jax.random.split(jax.random.key(0), 3), jnp.array([0.0, 0.0, 0.999999]))
    found, _, _ = run_stack(blocks, jnp.zeros((64, 1, 1, 1)), chunks=(None,) * 3, remat="none", drop_path=drop_path)
    np.testing.assert_array_equal(found, np.full((64, 1, 1, 1), 2 * 1.0 + 10.0))


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    branch = jnp.ones((20_000, 2, 3, 4))
    dropped = np.asarray(DropPath(jax.random.key(0), jnp.float32(0.25))(branch)).reshape(20_000, -1)
    assert (dropped == dropped[:, :1]).all()
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
    assert (dropped[:, 0] == 0).mean() == pytest.approx(0.25, abs=0.015)  # five standard errors


def test_branches_of_one_block_are_dropped_independently():
    drop_path = DropPath(jax.random.key(0), jnp.float32(0.5))
    first, second = (np.asarray(drop_path(jnp.ones((4000, 1, 1, 1)), index)).ravel() > 0 for index in (0, 1))
    assert (first & second).mean() == pytest.approx(0.25, abs=0.035)


@pytest.mark.parametrize("on_tensor_cores", [False, True])
def test_layer_norm_is_exact_far_from_zero(on_tensor_cores):
    """Also beside a derivative, where tensor cores have other sums."""
    x = np.random.default_rng(0).standard_normal((1, 2, 2, 64)) + 1000
    truth = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = jnp.asarray(x, jnp.float32)
    with run_blocks_on(Machine(tensor_cores=on_tensor_cores)):
        np.testing.assert_allclose(layer_norm(x), truth, atol=1e-3)
        np.testing.assert_allclose(jax.jvp(layer_norm, (x,), (x,))[0], truth, atol=1e-3)


def test_a_jitted_function_is_traced_anew_for_another_machine():
    seen = []
    jitted = jax.jit(lambda x: (seen.append(tensor_cores()), x + 1)[1])
    jitted(1.0)
    with run_blocks_on(Machine(tensor_cores=True)):
        jitted(1.0)
    jitted(1.0)
    assert seen == [False, True]
