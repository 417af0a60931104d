"""Widths padded for tensor cores: the function of the parameters stays the same, and what is added is zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspn_jax import models
from gspn_jax.config import ModelConfig
from gspn_jax.models import blocks, resolve, width
from gspn_jax.models.norms import layer_norm
from gspn_jax.models.stack import Machine, run_blocks_on
from tests.models.model_cases import BFLOAT16, PAPER, make_config, random_inputs, random_params, relative_error

ODD = dataclasses.replace(PAPER, hidden=20, depth=2, proxy_ratio=4)
"""20 channels are computed as 64, a proxy of 5 as 32."""


@pytest.mark.parametrize(
    ("preset", "widths"),
    [
        ("GSPN-XL/2", {"hidden": 1536, "proxy": 96}),
        ("GSPN-L/2", {"hidden": 1200, "proxy": 96}),
        ("GSPN-B/2", {"hidden": 960, "proxy": 56}),
        ("GSPN-S/2", {"hidden": 368, "proxy": 32}),
    ],
)
def test_widths_that_are_no_multiple_of_16_bytes_are_padded(preset, widths):
    assert width.widths(resolve(ModelConfig(preset=preset))) == widths


def test_groups_of_channels_stay_together():
    arch = resolve(dataclasses.replace(ODD, groups=4))
    assert width.widths(arch)["hidden"] == 20


def loss_and_gradient(config, *, tensor_cores):
    graphdef, _ = models.abstract(config)
    params, inputs = random_params(config), random_inputs(2, 8, 8)

    def loss(params):
        y = models.apply(graphdef, params, *inputs)
        return jnp.square(y).mean(), y

    with run_blocks_on(Machine(tensor_cores=tensor_cores)):
        (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return {"y": y, **gradient}


@pytest.mark.parametrize(
    "change",
    [{}, pytest.param({"groups": 1, "skip": True, "remat": "names"}, marks=pytest.mark.slow)],
    ids=["plain", "shared_skip_names"],
)
def test_padding_changes_neither_outputs_nor_gradients(change):
    config = make_config(dataclasses.replace(ODD, **change))
    wanted, found = (loss_and_gradient(config, tensor_cores=on) for on in (False, True))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted)
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        name = jax.tree_util.keystr(path)
        twin = found
        for key in path:
            twin = twin[key.key]
        assert relative_error(twin, np.asarray(leaf, np.float64)) < 1e-5, name


def test_what_is_added_to_the_tokens_is_zero_after_a_block():
    config = make_config(ODD)
    arch = resolve(config.model)
    params = jax.tree.map(lambda a: a[0], random_params(config)["trunk"]["out_blocks"])
    layer = jax.tree.map(lambda own: own.layer, models.abstract(config)[1]["trunk"]["out_blocks"])
    block = nnx.eval_shape(lambda: blocks.GSPNBlock(arch, long_skip=True, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x, skip = (width.pad_tokens(jnp.asarray(random_inputs(1, 4, 4, channels=20, seed=seed)[0]), 64) for seed in (1, 2))
    with run_blocks_on(Machine(tensor_cores=True)):
        padded = blocks.prepared(params, layer, arch, jnp.float32)
        y = nnx.merge(nnx.graphdef(block), padded)(x, chunk=None, long_skip=skip)
    assert y.shape[-1] == 64 and np.abs(y[..., :20]).max() > 0.1
    np.testing.assert_array_equal(y[..., 20:], 0)


def test_a_layer_norm_of_padded_tokens_is_that_of_the_others():
    x = np.random.default_rng(0).normal(3, 2, (2, 1, 1, 20)).astype(np.float32)
    found = layer_norm(width.pad_tokens(jnp.asarray(x), 64), 20)[..., :20]
    # 44 channels are taken off a sum over 64 of which 20 are left: rounding grows by 1 + 44/20 (mean / deviation)^2 = 6
    np.testing.assert_allclose(found, layer_norm(jnp.asarray(x)), rtol=6 * 2**-22)


@pytest.mark.parametrize("added", [0, 44])
def test_the_derivatives_of_a_layer_norm_are_those_of_its_operations(added):
    """Forward and backward, of what tensor cores compute; added channels have neither tangent nor cotangent."""
    rng = np.random.default_rng(0)
    x, tangent, cotangent = (jnp.asarray(rng.normal(1, 2, (2, 3, 1, 20)), jnp.float32) for _ in range(3))

    def padded(x):
        with run_blocks_on(Machine(tensor_cores=True)):
            return layer_norm(width.pad_tokens(x, 20 + added), 20)[..., :20]

    (_, found), (_, wanted) = (jax.jvp(f, (x,), (tangent,)) for f in (padded, layer_norm))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    (found,), (wanted,) = (jax.vjp(f, x)[1](cotangent) for f in (padded, layer_norm))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_parameters_are_prepared_once_and_for_all():
    """The same numbers to float32's rounding, far below one of bfloat16, whether blocks cast and pad their weights or
    find them so; only `merge` stays float32."""
    config = make_config(ODD, precision=BFLOAT16)
    graphdef, _ = models.abstract(config)
    params, inputs = random_params(config), random_inputs(2, 8, 8)
    apply = jax.jit(lambda params: models.apply(graphdef, params, *inputs))
    with run_blocks_on(Machine(tensor_cores=True)):
        prepared = models.prepared(config, params)
        found, wanted = apply(prepared), apply(params)
    assert relative_error(found, np.asarray(wanted, np.float64)) < 1e-6
    mixer = prepared["trunk"]["in_blocks"]["mixer"]
    assert mixer["lam"]["kernel"].shape[1:] == (32, 4, 64) and mixer["lam"]["kernel"].dtype == jnp.bfloat16
    assert mixer["merge"].dtype == jnp.float32 and prepared["final"]["linear"]["kernel"].dtype == np.float32
