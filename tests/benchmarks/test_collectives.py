"""What a compiled program exchanges: against programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks.collectives import Collective, collectives
from gspn_jax.config import MeshConfig
from gspn_jax.parallel import sharding


def found(function, shape, data, fsdp):
    mesh = sharding.make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])
    sharded = jax.shard_map(function, mesh=mesh, in_specs=P("fsdp"), out_specs=P(), check_vma=False)
    text = jax.jit(sharded).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()
    return list(collectives(text, data * fsdp))


@pytest.mark.parametrize(
    ("function", "kind", "shape", "group", "sent"),
    [
        (lambda x: lax.all_gather(x, "fsdp", tiled=True), "all-gather", (8, 3), 4, 8 * 3 * 4 * 3 / 4),
        (
            lambda x: lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True),
            "reduce-scatter",
            (2, 1),
            4,
            2 * 4 * 4 * 3 / 4,
        ),
        (lambda x: lax.psum(x, "fsdp"), "all-reduce", (2, 3), 4, 2 * 2 * 3 * 4 * 3 / 4),
        (lambda x: lax.psum(x, ("data", "fsdp")), "all-reduce", (2, 3), 8, 2 * 2 * 3 * 4 * 7 / 8),
        (
            lambda x: lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
            "collective-permute",
            (2, 3),
            8,
            2 * 3 * 4,
        ),
    ],
)
def test_a_collective_is_found_with_its_group_and_what_a_ring_sends(function, kind, shape, group, sent):
    whole = (8, 4 if kind == "reduce-scatter" else 3)
    (one,) = found(function, whole, 2, 4)
    assert (one.kind, one.shapes, one.times, one.loops, one.sent) == (kind, (shape,), 1, 0, sent)
    assert one.group == group


def test_what_is_in_a_loop_counts_as_often_as_it_turns():
    def loop(x):
        return lax.scan(lambda carry, _: (lax.psum(carry * 0.5, "fsdp"), None), x, length=5)[0]

    (one,) = found(loop, (8, 3), 1, 4)
    assert one == Collective("all-reduce", ((2, 3),), 24, 4, times=5, loops=1)


def test_what_stays_on_a_device_is_none():
    assert found(lambda x: lax.psum(x, "data"), (8, 3), 1, 4) == []


START = """ENTRY %main (x: f32[8,4], y: bf16[2]) -> f32[8,4] {
  %scatter = ((f32[8,4]{1,0}, f32[16]{0}), (f32[2,4]{1,0}, f32[4]{0})) reduce-scatter-start(%x, %z), \
replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
  %gather = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%y), replica_groups={{0,1,2,3}}, dimensions={0}
  %reduce = f32[6]{0} all-reduce-start(%w), replica_groups={{0,1,2,3}}, to_apply=%add
  %again = ((f32[6]{0}), f32[6]{0}) all-reduce-start(%w), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_one_that_is_started_and_waited_for_counts_by_its_results():
    """As XLA:GPU writes them: the shape names the arguments too."""
    scatter, gather, reduce, again = collectives(START, 4)
    assert (scatter.shapes, scatter.sent) == (((2, 4), (4,)), (32 + 16) * 4 * 3 / 4)
    assert (gather.shapes, gather.sent) == (((8,),), 8 * 2 * 3 / 4)
    assert (reduce.shapes, reduce.sent) == (((6,),), 2 * 6 * 4 * 3 / 4) and again == reduce
