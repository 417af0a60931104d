"""Keys that parameters are drawn from, against `nnx.Rngs`, and stacks, against the same blocks made one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax.models.parameters import rngs_of, stack


def drawn(rngs: nnx.Rngs) -> list[np.ndarray]:
    """Keys and numbers, asked for in every way that streams offer."""
    keys = [rngs.params(), rngs(), rngs.dropout(), rngs["noise"](), rngs.params(), rngs.default.fork()()]
    return [*map(jax.random.key_data, keys), rngs.normal((3,)), rngs.params.uniform((2,))]


def test_keys_are_those_of_nnx():
    key = jax.random.key(7)
    for found in (drawn(rngs_of(key)), jax.jit(lambda key: drawn(rngs_of(key)))(key)):
        jax.tree.map(np.testing.assert_array_equal, found, drawn(nnx.Rngs(key)))


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.inner = nnx.Linear(2, 3, bias_init=nnx.initializers.normal(), rngs=rngs)
        self.scale = nnx.Param(rngs.normal((4,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner(x) * self.scale[...].sum()


def test_a_stack_has_the_parameters_of_its_blocks():
    key, count = jax.random.key(3), 5
    found = stack(lambda rngs: Block(rngs=rngs), count, rngs_of(key))
    keys = jax.random.split(nnx.Rngs(key).params(), count)
    blocks = [nnx.to_pure_dict(nnx.state(Block(rngs=nnx.Rngs(keys[n])))) for n in range(count)]
    wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(same, nnx.to_pure_dict(nnx.state(found)), wanted)
    layers = {path[-1]: variable.get_metadata()["layer"] for path, variable in nnx.to_flat_state(nnx.state(found))}
    assert layers == {"kernel": (2, 3), "bias": (3,), "scale": (4,)}
