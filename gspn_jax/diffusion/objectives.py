"""Losses that training minimises, by objective, and what a denoiser that was trained so tells a sampler.

An objective is an object, a line of `tables.OBJECTIVES`. A condition is what a denoiser is told beside image and time:
a pytree of arrays [B, ...], such as labels; "no condition" (`null`) is one of the same structure without the axis B.
"""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from gspn_jax.config import DiffusionConfig
from gspn_jax.diffusion import ddpm, flow
from gspn_jax.diffusion.ddpm import Denoise, Metrics
from gspn_jax.diffusion.samplers import SamplerKind, Table
from gspn_jax.diffusion.schedules import make_schedule
from gspn_jax.tables import OBJECTIVES


class Objective(Protocol):
    """Training of a denoiser, and what its output means."""

    sampler: ClassVar[str]
    """The sampler that is taken when none is named."""
    learns_sigma: ClassVar[bool]
    """Whether it trains a second output per channel, the range of the variance, where the denoiser has one."""
    discrete: ClassVar[bool]
    """Whether there are `diffusion.timesteps` times, and no more steps of sampling than those."""
    spans: ClassVar[bool]
    """Whether the denoiser is told two numbers, noise time t and span down to a second time, both in 0..1; may be left
    out, which is False."""

    def fits(self, kind: SamplerKind) -> bool:
        """Tells whether images can be drawn by a kind of sampler."""
        ...

    def loss(
        self,
        config: DiffusionConfig,
        denoise: Denoise,
        x0: Float[Array, "B H W C"],
        condition: PyTree[Array],
        key: Key[Array, ""],
    ) -> tuple[Float[Array, "B"], Metrics]:
        """Loss and metrics of each image, float32, at times and with noise drawn from `key`.

        `denoise` gives its output, or with `features=(i, ...)` (output, {i: tokens after block i}).
        """
        ...

    def prediction(
        self, output: Float[Array, "N H W C"], x: Float[Array, "N H W C"], row: Table, clip: bool
    ) -> Float[Array, "N H W C"]:
        """x_0 or the velocity, whichever the samplers that fit move, from the output at `x`; with `clip` that of an
        x_0 in [-1, 1]. `row` has the scalars of this evaluation."""
        ...

    def describe(self, config: DiffusionConfig, learned_variance: bool) -> str:
        """A line for people."""
        ...


@dataclasses.dataclass(frozen=True)
class Epsilon:
    """iDDPM's: the noise, with a learned variance range where the denoiser has outputs for it."""

    sampler = "ddpm"
    learns_sigma = True
    discrete = True

    def fits(self, kind: SamplerKind) -> bool:
        return kind.moves == "x0"

    def loss(self, config, denoise, x0, condition, key):
        time_key, noise = _noise(key, x0)
        schedule = make_schedule(config)
        t = jax.random.randint(time_key, (x0.shape[0],), 0, schedule.num_timesteps)
        return ddpm.training_loss(denoise, schedule, x0, condition, t=t, noise=noise)

    def prediction(self, output, x, row, clip):
        x0 = (x - row.sigma * output) / row.signal
        return jnp.clip(x0, -1.0, 1.0) if clip else x0

    def describe(self, config, learned_variance):
        variance = "learned" if learned_variance else "fixed"
        return f"DDPM: epsilon, {config.timesteps:,} steps of {config.beta_schedule} betas, {variance} variance"


@dataclasses.dataclass(frozen=True)
class Velocity:
    """Flow matching's: noise - x_0 on straight paths."""

    sampler = "heun"
    learns_sigma = False
    discrete = False

    def fits(self, kind: SamplerKind) -> bool:
        return kind.moves == "velocity"

    def loss(self, config, denoise, x0, condition, key):
        time_key, noise = _noise(key, x0)
        return flow.training_loss(denoise, x0, condition, t=_times(config, time_key, x0.shape[0]), noise=noise)

    def prediction(self, output, x, row, clip):
        return (x - jnp.clip(x - row.sigma * output, -1.0, 1.0)) / row.sigma if clip else output

    def describe(self, config, learned_variance) -> str:
        return "flow matching (velocity)"


@dataclasses.dataclass(frozen=True)
class Clean(Velocity):
    """JiT's: x_0 on straight paths, with the loss of the velocity that leads to it (arXiv 2511.13720)."""

    def loss(self, config, denoise, x0, condition, key):
        time_key, noise = _noise(key, x0)
        return flow.clean_loss(denoise, x0, condition, t=_times(config, time_key, x0.shape[0]), noise=noise)

    def prediction(self, output, x, row, clip):
        return flow.velocity_of(x, jnp.clip(output, -1.0, 1.0) if clip else output, row.sigma)

    def describe(self, config, learned_variance) -> str:
        return "x prediction with the loss of the velocity"


@dataclasses.dataclass(frozen=True)
class MeanVelocity:
    """MeanFlow's: the mean velocity between two times, which a sampler of few evaluations moves by (arXiv 2505.13447).

    With a span of 0 it is the velocity itself, so that the samplers of flow matching fit too.
    """

    sampler = "mean_flow"
    learns_sigma = False
    discrete = False
    spans = True

    def fits(self, kind: SamplerKind) -> bool:
        return kind.moves in ("mean_velocity", "velocity")

    def loss(self, config, denoise, x0, condition, key):
        time_key, noise = _noise(key, x0)
        keys, batch = jax.random.split(time_key, 3), x0.shape[0]
        one, other = (_times(config, key, batch) for key in keys[:2])
        apart = jax.random.bernoulli(keys[2], config.span_share, (batch,))
        span = jnp.where(apart, jnp.abs(one - other), 0.0)
        return flow.mean_loss(denoise, x0, condition, t=jnp.maximum(one, other), span=span, noise=noise)

    def prediction(self, output, x, row, clip):
        if not clip:
            return output
        # the x_0 of a mean velocity is where it would lead from here to time 0, as that of a velocity is
        return (x - jnp.clip(x - row.sigma * output, -1.0, 1.0)) / row.sigma

    def describe(self, config, learned_variance):
        return f"mean flow (mean velocity), {config.span_share:.0%} of images with two times"


EPSILON, VELOCITY, CLEAN, MEAN_VELOCITY = Epsilon(), Velocity(), Clean(), MeanVelocity()


def _times(config: DiffusionConfig, key: Key[Array, ""], batch: int) -> Float[Array, "B"]:
    return flow.sample_times(key, batch, config.time_distribution, config.time_mean, config.time_std)


def _noise(key: Key[Array, ""], x0: Float[Array, "B H W C"]) -> tuple[Key[Array, ""], Float[Array, "B H W C"]]:
    """(a key for times, noise like `x0`)."""
    time_key, noise_key = jax.random.split(key)
    return time_key, jax.random.normal(noise_key, x0.shape, jnp.float32)


def loss(
    config: DiffusionConfig,
    denoise: Denoise,
    x0: Float[Array, "B H W C"],
    condition: PyTree[Array],
    key: Key[Array, ""],
) -> tuple[Float[Array, "B"], Metrics]:
    """Loss and metrics of each image, float32, at times and with noise drawn from `key` for the whole batch.

    The draw depends on the global batch shape and the key only, not on how the batch is sharded.
    """
    return OBJECTIVES[config.objective].loss(config, denoise, x0.astype(jnp.float32), condition, key)


def drop_condition(
    key: Key[Array, ""], condition: PyTree[Array], rate: float, null: PyTree[Array | int]
) -> PyTree[Array]:
    """Replaces the condition of an image by `null` with probability `rate`, so that guidance has what to lead away
    from."""
    leaves = jax.tree.leaves(condition)
    dropped = jax.random.bernoulli(key, rate, leaves[0].shape[:1])

    def one(leaf: Array, none: Array | int) -> Array:
        which = dropped.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(which, jnp.asarray(none, leaf.dtype), leaf)

    return jax.tree.map(one, condition, null)
