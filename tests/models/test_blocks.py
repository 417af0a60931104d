"""The stack runner and stochastic depth, on blocks small enough to follow by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax.models import blocks
from gspn_jax.models.blocks import DropPath, layer_norm, run_stack
from gspn_jax.models.parameters import stack


class Affine(nnx.Module):
    """x -> 2x + bias + chunk (0 if None) + long skip, through the drop path if there is one."""

    def __init__(self, rngs: nnx.Rngs):
        self.bias = nnx.Param(jax.random.normal(rngs.params(), ()))

    def __call__(self, x, condition, *, chunk, drop_path, long_skip):
        branch = x + self.bias[...] + (chunk or 0) + (0.0 if long_skip is None else long_skip)
        return x + (branch if drop_path is None else drop_path(branch))


@pytest.mark.parametrize("chunks", [(2, 2, 2, 2), (2, 2, None, None), (1, 2, 3, 1)])
@pytest.mark.parametrize("remat", ["none", "dots", "names", "full"])
def test_blocks_run_in_order_each_with_its_own_parameters_chunk_and_skip(chunks, remat):
    blocks = stack(Affine, 4, nnx.Rngs(0))
    bias = np.asarray(blocks.bias[...])
    assert len(set(bias.tolist())) == 4
    skips = np.arange(4.0, dtype=np.float32).reshape(4, 1, 1, 1, 1)
    x = np.ones((1, 1, 1, 1), np.float32)
    found, kept, _ = run_stack(
        blocks, jnp.asarray(x), chunks=chunks, remat=remat, long_skips=jnp.asarray(skips), keep=True
    )
    expected = []
    for i in range(4):
        x = 2 * x + bias[i] + (chunks[i] or 0) + skips[i]
        expected.append(x)
    np.testing.assert_allclose(found, expected[-1], rtol=1e-6)
    np.testing.assert_allclose(kept, np.stack(expected[-2::-1]), rtol=1e-6)  # between the blocks, the last first


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


def test_layer_norm_is_exact_far_from_zero():
    x = np.random.default_rng(0).standard_normal((1, 2, 2, 64)) + 1000
    truth = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(jnp.asarray(x, jnp.float32)), truth, atol=1e-3)


def test_a_jitted_function_is_traced_anew_for_another_machine():
    seen = []
    jitted = jax.jit(lambda x: (seen.append(blocks.tensor_cores()), x + 1)[1])
    jitted(1.0)
    with blocks.run_blocks_on(blocks.Machine(tensor_cores=True)):
        jitted(1.0)
    jitted(1.0)
    assert seen == [False, True]
