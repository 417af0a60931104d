"""Coarse to fine: an image that was drawn small is enlarged, noised in part, and denoised again at the larger size.

Facts are those of LinFusion's pipeline for SDXL (Huage001/LinFusion 62ef289, after DemoFusion, arXiv 2311.16973, and
SDEdit, arXiv 2108.01073). At timestep t of T, with f = (1 + cos(pi (T - t) / T)) / 2, which falls from 1 to 0, and z0
the latents of the enlarged image with one noise n for all steps:

    x <- (1 - f^3) x + f^3 (signal z0 + sigma n)
    a is a step of the sampler from x with the prediction for x
    b is a step from x with the prediction for a blurred x, by the network with dilated convolutions
    x <- (1 - f) a + f b

At the end x gets the mean and deviation of z0, by channel. Here signal^2 + sigma^2 = 1 throughout, where diffusers'
Euler has x / signal: all of this is linear, so the images are the same.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gspn_jax.config import ConfigError
from gspn_jax.diffusion.samplers import Table
from gspn_jax.diffusion.scheduler_config import SchedulerConfig
from gspn_jax.diffusion.stable_diffusion import Sampler, clean, make_table

Predict = Callable[[Float[Array, "N H W C"], float, bool], Float[Array, "N H W C"]]
"""(x, timestep, whether convolutions are dilated) -> the guided output of the network."""


def rows(sampler: Sampler, scheduler: SchedulerConfig, steps: int, strength: float) -> Table:
    """The last min(ceil(steps x strength), steps) rows of a sampler's table.

    Raises ConfigError for a strength outside (0, 1] and a method that remembers earlier steps, as each timestep has two
    predictions here; and as `make_table`.
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"the strength of coarse to fine must be in (0, 1], found {strength:g}")
    table = make_table(sampler, scheduler, steps)
    if not isinstance(table, Table) or sampler.moves != "x0" or np.any(table.on_previous):
        raise ConfigError(
            "--sampler must be euler or ddim for coarse to fine, which needs a method of one step, found another"
        )
    kept = min(math.ceil(steps * strength), steps)
    return jax.tree.map(lambda column: column[steps - kept :], table)


def refine(
    sampler: Sampler,
    scheduler: SchedulerConfig,
    table: Table,
    predict: Predict,
    z0: Float[Array, "N H W C"],
    noise: Float[Array, "N H W C"],
    *,
    ratio: int = 2,
    sigma: float = 1.0,
    done: Callable[[int], None] = lambda steps: None,
) -> Float[Array, "N H W C"]:
    """Latents refined from `z0` over the `table` of `rows`, float32; `done` is called after each step.

    `ratio` is that of the sizes, by which convolutions are dilated; `sigma` the deviation of the blur in latents, which
    is narrowed to a hundredth of it as noise goes. Two calls of `predict` a step.
    """
    z0, noise = jnp.asarray(z0, jnp.float32), jnp.asarray(noise, jnp.float32)
    x = z0
    for i in range(len(table.time)):
        row = jax.tree.map(lambda column, i=i: np.float32(column[i]), table)
        share = np.float32(cosine_factor(table.time[i], scheduler.timesteps))
        x, blurred = _anchored(x, z0, noise, row, share if i else np.float32(1.0), share, ratio=ratio, sigma=sigma)
        plain, dilated = predict(x, float(row.time), False), predict(blurred, float(row.time), True)
        x = _stepped(x, plain, dilated, row, share, sampler=sampler, kind=scheduler.prediction)
        done(i + 1)
    return _restored(x, z0)


def cosine_factor(time: float, timesteps: int) -> float:
    """f of timestep `time`: 1 at `timesteps`, 0 at 0."""
    return (1 + math.cos(math.pi * (timesteps - time) / timesteps)) / 2


def blur(x: Float[Array, "N H W C"], ratio: int, sigma: Float[Array, ""] | float) -> Float[Array, "N H W C"]:
    """Gaussian blur of 2 ratio - 1 taps a side, zeros beyond the map."""
    offsets = jnp.arange(1 - ratio, ratio, dtype=jnp.float32)
    taps = jnp.exp(-(offsets**2) / (2 * sigma**2))
    taps /= taps.sum()
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (ratio - 1, ratio - 1)
        padded, length = jnp.pad(x, pad), x.shape[axis]
        x = sum(taps[i] * jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(2 * ratio - 1))
    return x


def like(x: Float[Array, "N H W C"], other: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
    """`x` shifted and scaled to the mean and deviation of `other`, by image and channel."""
    mean, wanted = other.mean((1, 2), keepdims=True), other.std((1, 2), keepdims=True)
    return (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True) * wanted + mean


_restored = jax.jit(like)


@functools.partial(jax.jit, static_argnames=("ratio", "sigma"))
def _anchored(
    x: Array, z0: Array, noise: Array, row: Any, share: Array, factor: Array, *, ratio: int, sigma: float
) -> tuple[Array, Array]:
    """x drawn to the noised z0 (all of it at first, where `share` is 1), and that blurred."""
    x = (1 - share**3) * x + share**3 * (row.signal * z0 + row.sigma * noise)
    return x, like(blur(x, ratio, sigma * (0.99 * factor + 0.01)), x)


@functools.partial(jax.jit, static_argnames=("sampler", "kind"))
def _stepped(x: Array, plain: Array, dilated: Array, row: Any, share: Array, *, sampler: Sampler, kind: str) -> Array:
    """The mean of a step with each of both predictions, by f."""
    a, b = (
        sampler.move(x, clean(kind, output, x, row.signal, row.sigma), jnp.zeros_like(x), row)
        for output in (plain, dilated)
    )
    return (1 - share) * a + share * b
