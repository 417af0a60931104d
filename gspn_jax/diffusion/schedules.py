"""Noise schedules of discrete diffusion, in float64 on the host; cast where they are used."""

import dataclasses
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int

from gspn_jax.config import ConfigError, DiffusionConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t), t = 0 .. T-1 (Ho et al. 2020).

    Everything else follows from `betas`. `timesteps` is what the denoiser is told at each t: 0 .. T-1 for the process
    that it was trained on, a selection of that for a respaced one.
    """

    betas: Float64[np.ndarray, "T"]
    timesteps: Int[np.ndarray, "T"]
    trained_timesteps: int
    """T of the process that the denoiser was trained on."""

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Float64[np.ndarray, "T"]:
        """x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise."""
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> Float64[np.ndarray, "T"]:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def posterior_variance(self) -> Float64[np.ndarray, "T"]:
        """Variance of q(x_{t-1} | x_t, x_0); 0 at t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> Float64[np.ndarray, "T"]:
        """Its logarithm, where t = 0 takes the value of t = 1 (the original's "clipped" log variance)."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1] if len(variance) > 1 else self.betas[0], variance[1:]))

    @cached_property
    def posterior_mean_x0(self) -> Float64[np.ndarray, "T"]:
        """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_xt(self) -> Float64[np.ndarray, "T"]:
        """Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)


def _trained(betas: Float64[np.ndarray, "T"]) -> Schedule:
    return Schedule(betas, np.arange(len(betas)), len(betas))


def linear_schedule(timesteps: int) -> Schedule:
    """Betas from 1e-4 to 0.02 at T = 1000, scaled by 1000/T for another T (iDDPM: Nichol and Dhariwal 2021).

    Raises ConfigError for T <= 20, where the last beta would reach 1.
    """
    if timesteps <= 20:
        raise ConfigError(f"diffusion.timesteps must be greater than 20 with the linear schedule, found {timesteps}")
    scale = 1000.0 / timesteps
    return _trained(np.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=np.float64))


def cosine_schedule(timesteps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """alphas_cumprod follows cos^2(pi/2 (t/T + s) / (1 + s)), with betas at most 0.999 (iDDPM, eq. 17)."""
    time = np.arange(timesteps + 1, dtype=np.float64) / timesteps
    signal = np.cos(0.5 * np.pi * (time + offset) / (1.0 + offset)) ** 2
    return _trained(np.minimum(1.0 - signal[1:] / signal[:-1], max_beta))


def make_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule that a run with this config trains on."""
    return {"linear": linear_schedule, "cosine": cosine_schedule}[config.beta_schedule](config.timesteps)


def space_timesteps(timesteps: int, steps: int) -> Int[np.ndarray, "steps"]:
    """`steps` of the timesteps 0 .. T-1, evenly spaced with both ends, rounded to the nearest (halves to even).

    The same selection as iDDPM's `space_timesteps(T, [steps])`, including how its stride accumulates, so that samples
    compare with published ones. A single step takes T-1 (the original takes 0, which no noise image belongs to).
    Raises ConfigError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= timesteps:
        raise ConfigError(f"sampler.steps must be between 1 and diffusion.timesteps ({timesteps}), found {steps}")
    if steps == 1:
        return np.array([timesteps - 1])
    strides = np.full(steps, (timesteps - 1) / (steps - 1))
    strides[0] = 0.0
    return np.round(np.add.accumulate(strides)).astype(np.int64)


def respace(schedule: Schedule, steps: int) -> Schedule:
    """The process that visits `steps` of the schedule's timesteps, with the same alphas_cumprod at each of them."""
    kept = space_timesteps(schedule.num_timesteps, steps)
    alphas_cumprod = schedule.alphas_cumprod[kept]
    betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return Schedule(betas, schedule.timesteps[kept], schedule.trained_timesteps)
