"""The iDDPM objective: epsilon prediction, with a learned variance range where the denoiser has outputs for it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, Int, PyTree

from gspn_jax.diffusion.schedules import Schedule

Denoise = Callable[..., Float[Array, "B H W O"]]
"""denoise(x_t, time, condition) -> output, as `gspn_jax.diffusion` says."""
Metrics = dict[str, Float[Array, "B"]]


def training_loss(
    denoise: Denoise,
    schedule: Schedule,
    x0: Float[Array, "B H W C"],
    condition: PyTree[Array],
    *,
    t: Int[Array, "B"],
    noise: Float[Array, "B H W C"],
) -> tuple[Float[Array, "B"], Metrics]:
    """Loss of each image at timestep t (0 .. T-1), float32.

    With C outputs: mean squared error of epsilon. With 2C outputs: that plus the variational bound in bits per
    dimension, in which the mean is detached so that it trains the variance only; the bound is not rescaled, as in
    DiT's training (iDDPM, Nichol and Dhariwal 2021, eq. 16). Metrics: "mse", and "vb" with 2C outputs.
    """
    signal = _at(np.sqrt(schedule.alphas_cumprod), t)
    sigma = _at(np.sqrt(1.0 - schedule.alphas_cumprod), t)
    x_t = signal * x0 + sigma * noise
    time = jnp.asarray(schedule.timesteps, jnp.float32)[t]
    epsilon, variance_range = split_output(denoise(x_t, time, condition), x0.shape[-1])

    mse = jnp.mean(jnp.square(noise - epsilon), axis=(1, 2, 3))
    if variance_range is None:
        return mse, {"mse": mse}
    vb = _variational_bound(schedule, x0, x_t, t, jax.lax.stop_gradient(epsilon), variance_range)
    return mse + vb, {"mse": mse, "vb": vb}


def split_output(
    output: Float[Array, "B H W O"], channels: int
) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W C"] | None]:
    """(prediction, variance range or None) in float32 from a denoiser's output with C or 2C channels.

    Raises ValueError for another number of channels.
    """
    output = output.astype(jnp.float32)
    if output.shape[-1] == channels:
        return output, None
    if output.shape[-1] == 2 * channels:
        return output[..., :channels], output[..., channels:]
    raise ValueError(
        f"the denoiser of {channels}-channel images must give {channels} or {2 * channels} channels, "
        f"found {output.shape[-1]}"
    )


def interpolate_log_variance(
    variance_range: Float[Array, "*shape"], log_posterior: Float[Array, "..."], log_beta: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """Log variance of the reverse step: range -1 is the posterior's, 1 is log beta (iDDPM, eq. 15)."""
    fraction = (variance_range + 1.0) / 2.0
    return fraction * log_beta + (1.0 - fraction) * log_posterior


def _variational_bound(
    schedule: Schedule,
    x0: Float[Array, "B H W C"],
    x_t: Float[Array, "B H W C"],
    t: Int[Array, "B"],
    epsilon: Float[Array, "B H W C"],
    variance_range: Float[Array, "B H W C"],
) -> Float[Array, "B"]:
    """Bits per dimension: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the decoder's -log p(x_0 | x_1)."""
    on_x0 = _at(schedule.posterior_mean_x0, t)
    # Both means share their x_t term, so their difference is that of the two x_0 (and exact when epsilon is).
    predicted_x0 = (x_t - _at(np.sqrt(1.0 - schedule.alphas_cumprod), t) * epsilon) / _at(
        np.sqrt(schedule.alphas_cumprod), t
    )
    mean = on_x0 * predicted_x0 + _at(schedule.posterior_mean_xt, t) * x_t
    log_posterior = _at(schedule.posterior_log_variance, t)
    log_variance = interpolate_log_variance(variance_range, log_posterior, _at(np.log(schedule.betas), t))

    kl = normal_kl(on_x0 * (x0 - predicted_x0), log_posterior, log_variance)
    nll = -discretized_normal_log_likelihood(x0, mean, 0.5 * log_variance)
    # The first timestep takes one, all others the other; both are finite everywhere, so neither spoils the gradient.
    nats = jnp.where((t == 0)[:, None, None, None], nll, kl)
    return jnp.mean(nats, axis=(1, 2, 3)) / np.log(2.0).astype(np.float32)


def normal_kl(
    mean_difference: Float[Array, "*shape"],
    log_variance: Float[Array, "..."],
    other_log_variance: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """KL(N(m1, v1) || N(m2, v2)) in nats, from m1 - m2 and the log variances."""
    return 0.5 * (
        other_log_variance
        - log_variance
        - 1.0
        + jnp.exp(log_variance - other_log_variance)
        + jnp.square(mean_difference) * jnp.exp(-other_log_variance)
    )


def discretized_normal_log_likelihood(
    x: Float[Array, "*shape"], mean: Float[Array, "*shape"], log_std: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Log probability (nats) of the 8-bit level x in [-1, 1] under a normal integrated over that level's bin.

    Bins are 2/255 wide; the first and the last one reach to infinity. A probability is at least 1e-12, as in iDDPM.
    """
    inverse_std = jnp.exp(-log_std)
    centered = x - mean
    upper = jnp.where(x > 0.999, jnp.inf, (centered + 1.0 / 255.0) * inverse_std)
    lower = jnp.where(x < -0.999, -jnp.inf, (centered - 1.0 / 255.0) * inverse_std)
    # P(lower < z < upper) from the lower tail on either side: far up, the two cdfs are both 1 in float32.
    right = centered > 0
    probability = ndtr(jnp.where(right, -lower, upper)) - ndtr(jnp.where(right, -upper, lower))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _at(values: np.ndarray, t: Int[Array, "B"]) -> Float[Array, "B 1 1 1"]:
    return jnp.asarray(values, jnp.float32)[t][:, None, None, None]
