"""Residual blocks of the two layouts, and the scan that runs a stack of them."""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from gspn_jax.config import Remat
from gspn_jax.models.embeddings import XAVIER
from gspn_jax.models.mixers import MIXERS, DepthwiseConv, GSPNMixer
from gspn_jax.models.presets import Architecture

ZEROS = jax.nn.initializers.zeros
MLP_RATIO = 4
BRANCHES = 2
"""At most so many residual branches in a block."""
NORM_EPSILON = 1e-6

_POLICIES = {
    "none": lambda step: step,
    # Keeps the outputs of the linears; recomputes norms, gates, scans and attention scores.
    "dots": lambda step: jax.checkpoint(
        step, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False
    ),
    "full": lambda step: jax.checkpoint(step, prevent_cse=False),
}

_runner = contextvars.ContextVar("how a block is run", default=None)


@contextlib.contextmanager
def run_blocks_by(runner: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside, `run_stack` calls runner(apply) for every block in place of apply(params, x, *others): the parameters of
    one block as they are stored, and arrays (or None) with a leading batch axis; the result has it too.

    It is here that weights split over devices are gathered, one block at a time. They are gathered again for the
    backward pass, so that `remat` "none", which would keep them, becomes "dots".
    """
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


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
        """What it does to every branch of one block."""
        keep = 1 - self.rate
        kept = [jax.random.bernoulli(jax.random.fold_in(self.key, index), keep, (batch, 1, 1, 1))
                for index in range(BRANCHES)]
        return Drawn(jnp.where(jnp.stack(kept, axis=1), 1 / keep, 0.0))


class Drawn(NamedTuple):
    """Stochastic depth of one block, by the factor of each sample's branches: 0 leaves it out."""

    factor: Float[Array, "B n 1 1 1"]

    def __call__(self, branch: Float[Array, "B H W D"], index: int = 0) -> Float[Array, "B H W D"]:
        return branch * self.factor[:, index].astype(branch.dtype)


def layer_norm(x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
    """Zero mean and unit variance over D, without scale or bias, computed and returned in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + NORM_EPSILON)


def modulate(x: Float[Array, "B H W D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]):
    """x * (1 + scale) + shift, the same at every token (adaLN), in the type of x."""
    shift, scale = (v[:, None, None].astype(x.dtype) for v in (shift, scale))
    return x * (1 + scale) + shift


class Modulation(nnx.Module):
    """The adaLN vectors of a condition: SiLU, then a linear that starts at zero."""

    def __init__(self, hidden: int, vectors: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = nnx.LinearGeneral(hidden, (vectors, hidden), kernel_init=ZEROS, dtype=dtype, rngs=rngs)

    def __call__(self, condition: Float[Array, "B D"]) -> list[Float[Array, "B D"]]:
        vectors = self.linear(jax.nn.silu(condition))
        return [vectors[:, i] for i in range(vectors.shape[1])]


class Mlp(nnx.Module):
    """Two linears around a tanh-approximated GELU."""

    def __init__(self, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(hidden, MLP_RATIO * hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(MLP_RATIO * hidden, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class DiTBlock(nnx.Module):
    """adaLN-zero block of DiT (arXiv 2212.09748): mixer and MLP, each normalised, modulated and gated."""

    def __init__(self, arch: Architecture, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.modulation = Modulation(arch.hidden, 6, dtype=dtype, rngs=rngs)
        self.mixer = MIXERS[arch.mixer](arch, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(arch.hidden, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W D"], condition: Float[Array, "B D"], *,
        chunk: int | None, drop_path: DropPath | None = None, long_skip: None = None,
    ) -> Float[Array, "B H W D"]:  # fmt: skip
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        branches = (
            (lambda h: self.mixer(h, chunk=chunk), shift1, scale1, gate1),
            (self.mlp, shift2, scale2, gate2),
        )
        for index, (branch, shift, scale, gate) in enumerate(branches):
            y = gate[:, None, None] * branch(modulate(layer_norm(x), shift, scale))
            x = x + (y if drop_path is None else drop_path(y, index))
        return x


class GSPNBlock(nnx.Module):
    """Block of the paper layout: GSPN mixer, depthwise 3x3, y * relu(y), linear; no MLP and no modulation.

    With `long_skip` the tokens are first joined with those of an earlier block (concatenation, then a linear).
    """

    def __init__(self, arch: Architecture, *, long_skip: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden = arch.hidden
        self.join = nnx.Linear(2 * hidden, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs) if long_skip else None
        self.mixer = GSPNMixer(arch, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(3, hidden, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(hidden, hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W D"], condition: None = None, *,
        chunk: int | None, drop_path: DropPath | None = None, long_skip: Float[Array, "B H W D"] | None = None,
    ) -> Float[Array, "B H W D"]:  # fmt: skip
        if self.join is not None:
            x = self.join(jnp.concatenate([x, long_skip], axis=-1))
        y = self.conv(self.mixer(layer_norm(x), chunk=chunk))
        y = self.out_proj(y * jax.nn.relu(y))
        return x + (y if drop_path is None else drop_path(y))


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` blocks made by `make` as one module whose every parameter has a leading axis of that length.

    They are drawn one after the other: a vmap would compile several times longer.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    return nnx.merge(graphdef, jax.lax.map(lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)))), keys))


def run_stack(
    blocks: nnx.Module, x: Float[Array, "B H W D"], condition: Float[Array, "B D"] | None = None, *,
    chunks: tuple[int | None, ...], remat: Remat, drop_path: DropPath | None = None,
    long_skips: Float[Array, "L B H W D"] | None = None, keep: bool = False,
) -> tuple[Float[Array, "B H W D"], Float[Array, "L B H W D"] | None]:  # fmt: skip
    """Runs a stack of blocks by a scan over its leading axis, so that compile time does not depend on the depth.

    `chunks` (one entry a block) is static, so each stretch of equal entries is a scan of its own. `drop_path` and
    `long_skips` have one entry a block too. Returns the tokens and, with `keep`, those after every block.
    """
    graphdef, params = nnx.split(blocks)
    params = nnx.to_pure_dict(params)
    layers = (params, drop_path, long_skips)
    runner = _runner.get()
    policy = "dots" if runner and remat == "none" else remat
    kept = []
    start = 0
    for chunk, stretch in itertools.groupby(chunks):
        stop = start + len(list(stretch))

        def apply(params, x, condition, drop_path, long_skip, chunk=chunk):
            block = nnx.merge(graphdef, params)
            return block(x, condition, chunk=chunk, drop_path=drop_path, long_skip=long_skip)

        run = runner(apply) if runner else apply

        def step(x, layer, run=run):
            params, drop_path, long_skip = layer
            x = run(params, x, condition, drop_path and drop_path.draw(x.shape[0]), long_skip)
            return x, x if keep else None

        whole = stop - start == len(chunks)
        part = layers if whole else jax.tree.map(lambda a, start=start, stop=stop: a[start:stop], layers)
        x, outputs = jax.lax.scan(_POLICIES[policy](step), x, part)
        kept.append(outputs)
        start = stop
    return x, jnp.concatenate(kept) if keep else None
