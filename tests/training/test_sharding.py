"""Where parameters live, and the meshes and batches that are refused."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from gspn_jax import models
from gspn_jax.config import ConfigError, MeshConfig
from gspn_jax.training import sharding
from gspn_jax.training.state import abstract_state
from tests.training import tiny


def test_data_axis_takes_the_devices_that_are_left():
    assert dict(sharding.make_mesh(MeshConfig(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("mesh", [MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(tensor=16), MeshConfig(4, 1, 1)])
def test_a_mesh_of_another_number_of_devices_is_refused(mesh):
    with pytest.raises(ConfigError, match="must be the 8 devices there are"):
        sharding.make_mesh(mesh)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    sharding.check_batch(tiny.config(batch_size=16), mesh)
    with pytest.raises(ConfigError, match=r"multiple of 8 .* found 12"):
        sharding.check_batch(tiny.config(batch_size=12), mesh)
    with pytest.raises(ConfigError, match=r"multiple of 16 .* found 24"):
        sharding.check_batch(tiny.config(batch_size=24, accumulate=2), mesh)


@pytest.mark.parametrize("gspn", [True, False])
def test_every_large_weight_is_split_over_fsdp_and_no_two_axes_share_one(gspn):
    config = tiny.config(gspn=gspn)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    _, shapes = models.abstract(config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = sharding.partition_spec(name, leaf.shape, mesh)
        used = [axis for axis in spec if axis is not None]
        assert len(used) == len(set(used)), (name, spec)
        if leaf.size >= sharding.MIN_SHARDED_SIZE:
            assert "fsdp" in used, (name, leaf.shape, spec)


def test_gspn_channels_are_split_over_tensor_from_first_to_last_projection():
    mesh = sharding.make_mesh(MeshConfig(tensor=2, fsdp=2))
    _, shapes = models.abstract(tiny.config(gspn=True))
    specs = {jax.tree_util.keystr(path, simple=True, separator="/"): sharding.partition_spec(
        jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert specs["trunk/in_blocks/mixer/in_proj/kernel"] == P(None, "fsdp", "tensor")
    assert specs["trunk/in_blocks/mixer/conv/kernel"] == P(None, None, None, "tensor")
    assert specs["trunk/in_blocks/mixer/gates/kernel"][-1] == "tensor"
    assert specs["trunk/in_blocks/mixer/lam/kernel"][-1] == "tensor"
    assert specs["trunk/in_blocks/mixer/out_gate/kernel"][-1] == "tensor"
    assert specs["trunk/in_blocks/mixer/out_proj/kernel"] == P(None, "tensor", "fsdp")


def test_optimizer_moments_and_averages_live_where_their_parameters_do():
    state = abstract_state(tiny.config(), sharding.make_mesh(MeshConfig(fsdp=4, tensor=2)))
    where = jax.tree.map(lambda s: s.sharding.spec, state.params)
    assert len(set(map(str, jax.tree.leaves(where, is_leaf=lambda s: isinstance(s, P))))) > 2
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda s: isinstance(s, dict))
    moments = [s for s in leaves if isinstance(s, dict)]
    assert len(moments) == 2
    for tree in (*moments, *state.ema.values()):
        assert jax.tree.map(lambda s: s.sharding.spec, tree) == where


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    assert sharding.partition_spec("x/kernel", (1500, 4096), mesh) == P(None, "fsdp")
    assert sharding.partition_spec("x/kernel", (1500, 1500), mesh) == P(None, None)
    assert sharding.partition_spec("x/bias", (8,), mesh) == P(None)
