"""Residual blocks of the two layouts, and the scan that runs a stack of them."""

import contextlib
import itertools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from gspn_jax.config import Remat
from gspn_jax.kernels.derivatives import linear_call
from gspn_jax.models.embeddings import XAVIER
from gspn_jax.models.mixers import DepthwiseConv
from gspn_jax.models.norms import RMSNorm
from gspn_jax.models.parameters import cast, logical, shapes_of
from gspn_jax.models.presets import Architecture
from gspn_jax.models.remat import checkpointed, named
from gspn_jax.models.width import pad_block

ZEROS = jax.nn.initializers.zeros
MLP_RATIO = 4
BRANCHES = 2
"""At most so many residual branches in a block."""
NORM_EPSILON = 1e-6


class Machine(NamedTuple):
    """Choices that depend on where blocks run: made by who compiles them, in no config and no checkpoint."""

    runner: Callable[[Callable, Any], Callable] | None = None
    """`run_stack` calls runner(apply, shapes) for every block in place of apply(params, x, *others): the parameters of
    one block as they are stored, and arrays (or None) with a leading batch axis; the result has it too. `shapes` has
    the `ParamShape` of each of them.

    It is here that weights split over devices are gathered, one block at a time. They are gathered again for the
    backward pass, so that `remat` "none", which would keep them, becomes "dots"."""
    tensor_cores: bool = False
    """Whether widths are padded for them (`width`), and tokens kept row by row between blocks: left to itself XLA:GPU
    turns them, and layer norms take three kernels."""
    forward_only: bool = False
    """Whether no gradient is taken. A stretch of blocks then reads its weights and long skips where they are; the
    gradient of that would add up whole stacks, so that they are sliced where there may be one."""


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


class DropPath(NamedTuple):
    """Stochastic depth (arXiv 1603.09382): a sample's branch is left out with probability `rate`.

    A leading axis on both fields makes it one entry a block.
    """

    key: Key[Array, "..."]
    rate: Float[Array, "..."]

    def __call__(self, branch: Float[Array, "B H W D"], index: int = 0) -> Float[Array, "B H W D"]:
        """Leaves out samples of `branch`, the one numbered `index` in its block, and scales the others up."""
        return self.draw(branch.shape[0])(branch, index)

    def draw(self, batch: int) -> "Drawn":
        """Draws the factor of every branch of one block."""
        keep = 1 - self.rate
        kept = [
            jax.random.bernoulli(jax.random.fold_in(self.key, index), keep, (batch, 1, 1, 1))
            for index in range(BRANCHES)
        ]
        return Drawn(jnp.where(jnp.stack(kept, axis=1), 1 / keep, 0.0))


class Drawn(NamedTuple):
    """Stochastic depth of one block, by the factor of each sample's branches: 0 leaves it out."""

    factor: Float[Array, "B n 1 1 1"]

    def __call__(self, branch: Float[Array, "B H W D"], index: int = 0) -> Float[Array, "B H W D"]:
        return branch * self.factor[:, index].astype(branch.dtype)


def layer_norm(x: Float[Array, "B H W D"], width: int | None = None) -> Float[Array, "B H W D"]:
    """Zero mean and unit variance over D, without scale or bias, computed and returned in float32.

    With `width` over the first so many channels; the others must be zero, and come out as anything.
    """
    x = x.astype(jnp.float32)
    added = 0 if width is None else x.shape[-1] - width
    if not added:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + NORM_EPSILON)
    mean = x.sum(-1, keepdims=True) / width
    x = x - mean  # a mask would be kept, as large as x, for all blocks: what was added is taken off the sum instead
    variance = (jnp.square(x).sum(-1, keepdims=True) - added * jnp.square(mean)) / width
    return x * jax.lax.rsqrt(variance + NORM_EPSILON)


def norm_of(arch: Architecture, *, rngs: nnx.Rngs) -> Callable[[Float[Array, "B H W D"]], Float[Array, "B H W D"]]:
    """The norm of the DiT layout, a function or a module; float32."""
    return RMSNorm(arch.hidden, rngs=rngs) if arch.norm == "rms" else layer_norm


def modulate(x: Float[Array, "B H W D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]):
    """x * (1 + scale) + shift, the same at every token (adaLN), in the type of x."""
    shift, scale = (v[:, None, None].astype(x.dtype) for v in (shift, scale))
    return x * (1 + scale) + shift


class Modulation(nnx.Module):
    """The adaLN vectors of a condition: SiLU, then a linear that starts at zero."""

    def __init__(self, hidden: int, vectors: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = nnx.LinearGeneral(
            hidden,
            (vectors, hidden),
            kernel_init=ZEROS,
            dtype=dtype,
            rngs=rngs,
            kernel_metadata=logical("embed", None, None),
            bias_metadata=logical(),
        )

    def __call__(self, condition: Float[Array, "B D"]) -> list[Float[Array, "B D"]]:
        vectors = self.linear(jax.nn.silu(condition))
        return [vectors[:, i] for i in range(vectors.shape[1])]


class Mlp(nnx.Module):
    """Two linears around a tanh-approximated GELU."""

    def __init__(self, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        wide, into, out = MLP_RATIO * hidden, logical("embed", "mlp"), logical("mlp", "embed")
        self.fc1 = nnx.Linear(hidden, wide, kernel_init=XAVIER, dtype=dtype, rngs=rngs, kernel_metadata=into)
        self.fc2 = nnx.Linear(wide, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs, kernel_metadata=out)

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        return self.fc2(jax.nn.gelu(named(self.fc1(x), "fc1"), approximate=True))


def swiglu_width(hidden: int) -> int:
    """Width of SwiGLU with the parameters of an MLP: two thirds of its, rounded down as LightningDiT and JiT do."""
    return 2 * MLP_RATIO * hidden // 3


class SwiGLU(nnx.Module):
    """A linear of SiLU(first) * second, which are two linears (arXiv 2002.05202)."""

    def __init__(self, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        wide = swiglu_width(hidden)
        self.fc1 = nnx.LinearGeneral(
            hidden,
            (2, wide),
            kernel_init=XAVIER,
            dtype=dtype,
            rngs=rngs,
            kernel_metadata=logical("embed", None, "mlp"),
            bias_metadata=logical(),
        )
        self.fc2 = nnx.Linear(
            wide, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs, kernel_metadata=logical("mlp", "embed")
        )

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        both = named(self.fc1(x), "fc1")
        return self.fc2(jax.nn.silu(both[..., 0, :]) * both[..., 1, :])


class DiTBlock(nnx.Module):
    """adaLN-zero block of DiT (arXiv 2212.09748): mixer and MLP, each normalised, modulated and gated.

    With SwiGLU and RMS norm it is the block of LightningDiT and JiT (arXiv 2501.01423, 2511.13720).
    """

    def __init__(self, arch: Architecture, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.modulation = Modulation(arch.hidden, 6, dtype=dtype, rngs=rngs)
        self.mixer = arch.options.build(arch.hidden, dtype=dtype, rngs=rngs)
        self.mlp = {"gelu": Mlp, "swiglu": SwiGLU}[arch.mlp](arch.hidden, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2 = (norm_of(arch, rngs=rngs) for _ in range(BRANCHES))

    def __call__(
        self, x: Float[Array, "B H W D"], condition: Float[Array, "B D"], *,
        chunk: int | None, drop_path: DropPath | None = None, long_skip: None = None,
    ) -> Float[Array, "B H W D"]:  # fmt: skip
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        branches = (
            (self.norm1, lambda h: self.mixer(h, chunk=chunk), shift1, scale1, gate1),
            (self.norm2, self.mlp, shift2, scale2, gate2),
        )
        for index, (norm, branch, shift, scale, gate) in enumerate(branches):
            y = gate[:, None, None] * branch(modulate(norm(x), shift, scale))
            x = x + (y if drop_path is None else drop_path(y, index))
        return x


class GSPNBlock(nnx.Module):
    """Block of the paper layout: mixer, depthwise 3x3, y * relu(y), linear; no MLP and no modulation.

    With `long_skip` the tokens are first joined with those of an earlier block (concatenation, then a linear).
    """

    def __init__(self, arch: Architecture, *, long_skip: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.hidden = hidden = arch.hidden
        self.join = nnx.Linear(2 * hidden, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs) if long_skip else None
        self.mixer = arch.options.build(hidden, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(3, hidden, squared_relu=True, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(hidden, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W D"], condition: None = None, *,
        chunk: int | None, drop_path: DropPath | None = None, long_skip: Float[Array, "B H W D"] | None = None,
    ) -> Float[Array, "B H W D"]:  # fmt: skip
        if self.join is not None:
            x = named(self._joined(x, long_skip), "join")
        if tensor_cores():
            x = with_layout_constraint(x, Layout((0, 1, 2, 3)))
        y = self.out_proj(self.conv(self.mixer(layer_norm(x, self.hidden), chunk=chunk)))
        return x + (y if drop_path is None else drop_path(y))

    def _joined(self, x: Float[Array, "B H W D"], long_skip: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        """The linear of both side by side; tensor cores add two products, so that nothing is put together first."""
        if not tensor_cores():
            return self.join(jnp.concatenate([x, long_skip], axis=-1))
        upper, lower = jnp.split(self.join.kernel[...].astype(x.dtype), 2)
        # without the barrier XLA merges the gradients of the two products, and puts their arguments together after all
        return x @ upper + jax.lax.optimization_barrier(long_skip @ lower) + self.join.bias[...].astype(x.dtype)


def prepared(params: Any, shapes: Any, arch: Architecture, dtype: DTypeLike) -> Any:
    """Parameters of a block, or of a stack of them, as blocks compute with them: in `dtype`, but for those that stay
    float32, and on a machine with tensor cores in the widths that those take."""
    params = cast(params, shapes, dtype)
    return pad_block(params, arch) if tensor_cores() and arch.layout == "paper" else params


def prepared_stack(params: Any, shapes: Any, arch: Architecture, dtype: DTypeLike) -> Any:
    """Part of `prepared` that can be done for all blocks at once; the cast, where parameters are split over devices."""
    return cast(params, shapes, dtype) if _machine.value.runner else prepared(params, shapes, arch, dtype)


def run_stack(
    blocks: nnx.Module, x: Float[Array, "B H W D"], condition: Float[Array, "B D"] | None = None, *,
    chunks: tuple[int | None, ...], remat: Remat, drop_path: DropPath | None = None,
    long_skips: Float[Array, "L B H W D"] | None = None, keep: bool = False,
    prepare: Callable[[Any, Any], Any] = lambda params, shapes: params, features: Collection[int] = (),
) -> tuple[
    Float[Array, "B H W D"], Float[Array, "skips B H W D"] | None, dict[int, Float[Array, "B H W D"]]
]:  # fmt: skip
    """Runs a stack of blocks by a scan over its leading axis, so that compile time does not depend on the depth.

    `chunks` (one entry a block) is static, so each stretch of equal entries is a scan of its own. `drop_path` and
    `long_skips` have one entry a block too. `prepare` makes what is computed with of parameters and their
    `ParamShape`s, of a block or of all.
    Returns the tokens; with `keep` those between the blocks, the last first: the order of those that read them; and
    those after the blocks that `features` numbers, by their number. After each of these a scan ends.
    """
    graphdef, state = nnx.split(blocks)
    params = nnx.to_pure_dict(state)
    shapes = shapes_of(state)
    layer = jax.tree.map(lambda own: own.layer, shapes)
    machine = _machine.value
    runner = machine.runner
    layers = (jnp.arange(len(chunks)), params if runner else prepare(params, shapes), drop_path, long_skips)
    policy = "dots" if runner and remat == "none" else remat
    kept = jnp.zeros((len(chunks) - 1, *x.shape), x.dtype) if keep else None
    start, found = 0, {}
    parts = [(chunk, sum(feature < i for feature in features)) for i, chunk in enumerate(chunks)]
    for (chunk, _), stretch in itertools.groupby(parts):
        stop = start + len(list(stretch))

        def apply(params, x, condition, drop_path, long_skip, chunk=chunk):
            block = nnx.merge(graphdef, prepare(params, layer) if runner else params)
            return block(x, condition, chunk=chunk, drop_path=drop_path, long_skip=long_skip)

        run = runner(apply, layer) if runner else apply

        def one(x, params, drop_path, long_skip, run=run):
            return run(params, x, condition, drop_path and drop_path.draw(x.shape[0]), long_skip)

        one = checkpointed(one, policy)

        def step(carry, layer, one=one):
            x, kept = carry
            index, *others = layer
            if keep:
                kept = _put(kept, x, len(chunks) - 1 - index)
            return (one(x, *others), kept), None

        whole = stop - start == len(chunks)
        if machine.forward_only and not whole:
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
