"""Denoisers: `create` builds one from a config; `split`, `apply`, `init` and `abstract` serve training and sampling."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from gspn_jax.config import Config, ConfigError
from gspn_jax.models import blocks
from gspn_jax.models.denoisers import Denoiser
from gspn_jax.models.embeddings import LabelEmbed
from gspn_jax.models.flops import forward_flops
from gspn_jax.models.parameters import abstract_of, rngs_of
from gspn_jax.models.presets import PRESETS, Architecture, Preset, resolve
from gspn_jax.tables import OBJECTIVES

__all__ = [
    "PRESETS", "Architecture", "Denoiser", "Preset", "abstract", "abstract_of", "apply", "count_parameters", "create",
    "forward_flops", "init", "learns_sigma", "prepared", "resolve", "split",
]  # fmt: skip

Params = dict[str, Any]
"""Parameters as nested dicts of arrays, by the names of the modules."""


def learns_sigma(config: Config) -> bool:
    """Tells whether the denoiser also predicts the range of the variance: as set, else if the objective trains it."""
    learn_sigma = config.model.learn_sigma
    return OBJECTIVES[config.diffusion.objective].learns_sigma if learn_sigma is None else learn_sigma


def spans(config: Config) -> bool:
    """Tells whether the denoiser is told two times: if the objective is one between them."""
    return getattr(OBJECTIVES[config.diffusion.objective], "spans", False)


Embedder = Callable[..., nnx.Module]
"""embedder(hidden, rngs=rngs) -> a module that maps a condition, a tree of arrays [B, ...], to [B, hidden]."""


def create(config: Config, *, rngs: nnx.Rngs, embedder: Embedder | None = None) -> Denoiser:
    """Builds the denoiser of a config, which is told a class or what `embedder` embeds.

    Raises ConfigError for settings that do not fit together.
    """
    return Denoiser(**_arguments(config, embedder), rngs=rngs)


def _arguments(config: Config, embedder: Embedder | None) -> dict[str, Any]:
    arch = resolve(config.model)
    if config.data.image_size % arch.patch:
        raise ConfigError(
            f"model.patch must be a divisor of data.image_size ({config.data.image_size}), found {arch.patch}"
        )
    return {
        "arch": arch,
        "channels": config.data.channels,
        "embedder": embedder or functools.partial(LabelEmbed, config.data.num_classes),
        "learn_sigma": learns_sigma(config),
        "spans": spans(config),
        "dtype": config.train.compute,
    }


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The model as its static part and its parameters, a nested dict of arrays."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def apply(
    graphdef: nnx.GraphDef, params: Params, x: Float[Array, "B H W C"],
    t: Float[Array, "B"] | Float[Array, "B 2"], y: PyTree[Array], *,
    drop_path_key: Key[Array, ""] | None = None, features: tuple[int, ...] = (),
) -> Float[Array, "B H W O"] | tuple[Float[Array, "B H W O"], dict[int, Float[Array, "B h w D"]]]:  # fmt: skip
    """Calls the denoiser that `split` took apart; see `Denoiser.__call__`."""
    return nnx.merge(graphdef, params)(x, t, y, drop_path_key=drop_path_key, features=features)


def prepared(config: Config, params: Params) -> Params:
    """Parameters for a program that evaluates the denoiser many times: what blocks cast, they find cast.

    Of those that are split over devices (`stack.Machine.runner`) a block still has more to do.
    """
    arch, shapes = resolve(config.model), abstract(config)[1]["trunk"]
    trunk = {
        name: blocks.prepared_stack(stack, shapes[name], arch, config.train.compute)
        for name, stack in params["trunk"].items()
    }
    return params | {"trunk": trunk}


def init(config: Config, seed: int | Key[Array, ""], *, embedder: Embedder | None = None) -> Params:
    """Fresh parameters from a seed or a key. Can be jitted with `config` static, to be born sharded."""
    is_key = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    rngs = rngs_of(seed if is_key else jax.random.key(seed))
    return split(create(config, rngs=rngs, embedder=embedder))[1]


def abstract(config: Config, *, embedder: Embedder | None = None) -> tuple[nnx.GraphDef, Params]:
    """Result of `split`, with the `ParamShape` of each parameter in its place; allocates nothing."""
    arguments = _arguments(config, embedder)  # outside of the trace, where JAX would add a note to an error
    return abstract_of(lambda rngs: Denoiser(**arguments, rngs=rngs))


def count_parameters(config: Config) -> int:
    """The number of parameters, without allocating them."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)[1]))
