"""Runs of a stack of blocks: in a loop, or one block after another in the program; and the machine that it runs on."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gspn_jax.config import Remat
from gspn_jax.kernels.derivatives import linear_call
from gspn_jax.models.drop_path import DropPath
from gspn_jax.models.parameters import shapes_of
from gspn_jax.models.remat import checkpointed

EachOfThem = Sequence[Float[Array, "B H W D"]]
"""Tokens of several blocks, where blocks run one after another; in loops they are in one array."""


class Machine(NamedTuple):
    """Choices that depend on where blocks run: made by who compiles them, in no config and no checkpoint."""

    runner: Callable[[Callable, Any], Callable] | None = None
    """`run_stack` calls runner(apply, shapes) for every block in place of apply(params, x, *others): the parameters of
    one block as they are stored, and arrays (or None) with a leading batch axis; the result has it too. `shapes` has
    the `ParamShape` of each of them.

    It is here that weights split over devices are gathered, one block at a time. They are gathered again for the
    backward pass, so that `remat` "none", which would keep them, becomes "dots"."""
    tensor_cores: bool = False
    """True where widths are padded for them (`width`), and tokens kept row by row between blocks: left to itself
    XLA:GPU turns them, and layer norms take three kernels."""
    forward_only: bool = False
    """True where no gradient is taken. A stretch of blocks then reads its weights and long skips where they are; the
    gradient of that would add up whole stacks, so that they are sliced where there may be one."""
    unrolls: bool = False
    """True where the program has every block of a stack, and no loop: nothing is stacked for the backward pass, and the
    compiler sees from one block to the next."""


_ANY = Machine()
_machine = jax.make_user_context(default_value=_ANY)
"""JAX has it in the key of what it traced before: a jitted function is traced anew for another machine."""


def run_blocks_on(machine: Machine) -> contextlib.AbstractContextManager:
    """Inside, blocks are traced for `machine`."""
    return _machine(machine)


def tensor_cores() -> bool:
    """Tells whether blocks are traced for a machine that has them."""
    return _machine.value.tensor_cores


def forward_only() -> bool:
    """Tells whether blocks are traced where no gradient is taken."""
    return _machine.value.forward_only


def split_over_devices() -> bool:
    """Tells whether a block has to gather its weights (`Machine.runner`)."""
    return _machine.value.runner is not None


def run_stack(
    blocks: nnx.Module, x: Float[Array, "B H W D"], condition: Float[Array, "B D"] | None = None, *,
    chunks: tuple[int | None, ...], remat: Remat, unroll: bool | None = None, drop_path: DropPath | None = None,
    long_skips: Float[Array, "L B H W D"] | EachOfThem | None = None, keep: bool = False,
    prepare: Callable[[Any, Any], Any] = lambda params, shapes: params, features: Collection[int] = (),
) -> tuple[
    Float[Array, "B H W D"], Float[Array, "skips B H W D"] | EachOfThem | None, dict[int, Float[Array, "B H W D"]]
]:  # fmt: skip
    """Runs a stack of blocks: in scans over its leading axis, so that compile time does not depend on the depth, or
    with `unroll` (None: as the machine has it) one after another.

    `chunks` (one entry a block) is static. `drop_path` and `long_skips` have one entry a block too. `prepare` makes
    what is computed with of parameters and their `ParamShape`s, of a block or of all.
    Returns the tokens; with `keep` those between the blocks, the last first: the order of those that read them; and
    those after the blocks that `features` numbers, by their number.
    """
    graphdef, state = nnx.split(blocks)
    params = nnx.to_pure_dict(state)
    shapes = shapes_of(state)
    layer = jax.tree.map(lambda own: own.layer, shapes)
    machine = _machine.value
    runner = machine.runner
    unroll = machine.unrolls if unroll is None else unroll
    policy = "dots" if runner and remat == "none" else remat

    @functools.cache
    def block_of(chunk):
        def apply(params, x, condition, drop_path, long_skip):
            block = nnx.merge(graphdef, prepare(params, layer) if runner else params)
            return block(x, condition, chunk=chunk, drop_path=drop_path, long_skip=long_skip)

        run = runner(apply, layer) if runner else apply

        def block(x, condition, params, drop_path, long_skip):  # benchmarks/roofline.py knows blocks by this name
            return run(params, x, condition, drop_path, long_skip)

        # in a loop the compiler cannot take what is computed again for what was computed before
        return checkpointed(block, policy, prevent_cse=unroll)

    run = _one_by_one if unroll else _in_loops
    drawn = drop_path and jax.vmap(lambda own: own.draw(x.shape[0]))(drop_path)
    layers = (params if runner else prepare(params, shapes), drawn, long_skips)
    return run(block_of, x, condition, layers, chunks, keep=keep, features=features)


def _one_by_one(block_of, x, condition, layers, chunks, *, keep, features):
    """A call of each block. Those of equal chunks are one function, which is traced and lowered once."""
    params, drop_path, long_skips = layers
    calls = {chunk: jax.jit(block_of(chunk)) for chunk in set(chunks)}
    between = []
    for i, (chunk, own) in enumerate(zip(chunks, _unstacked(params, len(chunks)), strict=True)):
        drop = jax.tree.map(lambda a, i=i: a[i], drop_path)
        x, own = _back_together((x, own))
        x = calls[chunk](x, condition, own, drop, None if long_skips is None else long_skips[i])
        between.append(x)
    found = {i: between[i] for i in features}
    return x, between[-2::-1] if keep else None, found


def _back_together(arrays: Any) -> Any:
    """The same arrays, whose gradients go on when all are there. Where gradients of weights are sent to other devices
    XLA would make them late, and keep what they are made of for all blocks."""
    return linear_call(lambda _, given: given, lambda _, back: jax.lax.optimization_barrier(back), (), arrays)


def _unstacked(tree: Any, count: int) -> list[Any]:
    """The `count` entries of a tree of stacks. Their gradients are put side by side, where that of an index would add
    up whole stacks, zero but for one entry."""

    def entries(_, stacked):
        return [stacked[i] for i in range(count)]

    def back(_, cotangents):
        return jnp.stack(cotangents)

    leaves, structure = jax.tree.flatten(tree)
    columns = [linear_call(entries, back, (), leaf) for leaf in leaves]
    return [structure.unflatten(own) for own in zip(*columns, strict=True)]


def _in_loops(block_of, x, condition, layers, chunks, *, keep, features):
    """A scan over each stretch of blocks of equal chunks, which ends after blocks that `features` numbers."""
    kept = jnp.zeros((len(chunks) - 1, *x.shape), x.dtype) if keep else None
    layers = (jnp.arange(len(chunks)), *layers)
    start, found = 0, {}
    parts = [(chunk, sum(feature < i for feature in features)) for i, chunk in enumerate(chunks)]
    for (chunk, _), stretch in itertools.groupby(parts):
        stop, block = start + len(list(stretch)), block_of(chunk)

        def step(carry, layer, block=block):
            x, kept = carry
            index, *others = layer
            if keep:
                kept = _put(kept, x, len(chunks) - 1 - index)
            return (block(x, condition, *others), kept), None

        whole = stop - start == len(chunks)
        if forward_only() and not whole:
            x, kept = _forward(step, (x, kept), layers, start, stop)
        else:
            part = layers if whole else jax.tree.map(lambda a, start=start, stop=stop: a[start:stop], layers)
            (x, kept), _ = jax.lax.scan(step, (x, kept), part)
        start = stop
        if stop - 1 in features:
            found[stop - 1] = x
    return x, kept, found


def _put(kept: Float[Array, "L B H W D"], x: Float[Array, "B H W D"], place: Int[Array, ""]):
    """`kept` with `x` in a place that is written to once, or behind its end: then it lands in the last place, whose own
    tokens are still to come.

    Each place is read once in the backward pass, so that nothing needs to be taken out of the cotangent, which XLA may
    do in a copy of it. Of what `kept` holds before, which is replaced, the gradient is not to be asked.
    """

    def put(place, arrays):
        kept, x = arrays
        return jax.lax.dynamic_update_index_in_dim(kept, x, place, 0, allow_negative_indices=False)

    def take(place, cotangent):
        grad_x = jax.lax.dynamic_index_in_dim(cotangent, place, keepdims=False, allow_negative_indices=False)
        return cotangent, jnp.where(place < cotangent.shape[0], grad_x, 0)

    return linear_call(put, take, place, (kept, x))


def _forward(step: Callable, carry: Any, layers: Any, start: int, stop: int) -> Any:
    """The carry of `jax.lax.scan(step, carry, layers[start:stop])`, without a copy of that part of `layers`."""

    def turn(state):
        index, carry = state
        layer = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False, allow_negative_indices=False), layers
        )
        return index + 1, step(carry, layer)[0]

    return jax.lax.while_loop(lambda state: state[0] < stop, turn, (jnp.int32(start), carry))[1]
