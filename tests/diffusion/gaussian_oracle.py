"""Images whose values are independent N(mean, std^2): every conditional expectation and flow map in closed form.

Written from the definitions (a product loop, Bayes' rule for two Gaussians), not from the code under test.
"""

import jax
import jax.numpy as jnp
import numpy as np


def alphas_cumprod(timesteps: int) -> np.ndarray:
    """The linear schedule as a plain product."""
    first, last = 0.1 / timesteps, 20.0 / timesteps
    product, values = 1.0, []
    for t in range(timesteps):
        product *= 1.0 - (first + (last - first) * t / (timesteps - 1))
        values.append(product)
    return np.array(values)


def bayes_posterior(alphas_cumprod: float, previous: float) -> tuple[float, float, float]:
    """(coefficient of x_0, coefficient of x_t, variance) of q(x_{t-1} | x_t, x_0).

    The prior N(sqrt(previous) x_0, 1 - previous) times the likelihood of x_t = sqrt(a) x_{t-1} + sqrt(1-a) noise.
    """
    a = alphas_cumprod / previous
    if previous == 1.0:
        return 1.0, 0.0, 0.0
    prior_precision, likelihood_precision = 1.0 / (1.0 - previous), a / (1.0 - a)
    variance = 1.0 / (prior_precision + likelihood_precision)
    return variance * prior_precision * np.sqrt(previous), variance * np.sqrt(a) / (1.0 - a), variance


def expected_x0(x, signal, sigma, mean, std):
    """E[x_0 | x] where x = signal x_0 + sigma noise."""
    return mean + signal * std**2 / (signal**2 * std**2 + sigma**2) * (x - signal * mean)


def flow_map(x, start, end, mean, std):
    """Where the probability-flow ODE takes x from (signal, sigma) = start to end: the same quantile of both."""
    quantile = (x - start[0] * mean) / np.sqrt((start[0] * std) ** 2 + start[1] ** 2)
    return end[0] * mean + np.sqrt((end[0] * std) ** 2 + end[1] ** 2) * quantile


def log_snr(timesteps: int) -> np.ndarray:
    cumulative = alphas_cumprod(timesteps)
    return 0.5 * np.log(cumulative / (1.0 - cumulative))


def epsilon_denoiser(timesteps: int, means, std: float, ranges=None):
    """The optimal epsilon; `means` [classes]; log SNR is linear between timesteps. `ranges` [timesteps]: a channel."""
    levels = jnp.asarray(log_snr(timesteps), jnp.float32)
    means = jnp.asarray(means, jnp.float32)

    def denoise(x, t, y):
        level = jnp.interp(t, jnp.arange(timesteps, dtype=jnp.float32), levels)[:, None, None, None]
        signal2, sigma2 = jax.nn.sigmoid(2 * level), jax.nn.sigmoid(-2 * level)
        mean = means[y][:, None, None, None]
        # (x - signal E[x_0 | x]) / sigma with the fraction cancelled by hand, which float32 needs at t = 0.
        epsilon = jnp.sqrt(sigma2) / (signal2 * std**2 + sigma2) * (x - jnp.sqrt(signal2) * mean)
        if ranges is None:
            return epsilon
        channel = jnp.asarray(ranges, jnp.float32)[t.astype(jnp.int32)][:, None, None, None]
        return jnp.concatenate([epsilon, jnp.broadcast_to(channel, epsilon.shape)], axis=-1)

    return denoise


def velocity_denoiser(means, std: float):
    """The optimal velocity E[noise - x_0 | x_t] of the straight path; time comes as 1000 t."""
    means = jnp.asarray(means, jnp.float32)

    def denoise(x, time, y):
        t = time[:, None, None, None] / 1000.0
        mean = means[y][:, None, None, None]
        variance = (1.0 - t) ** 2 * std**2 + t**2
        # Both x_0 and the noise are jointly Gaussian with x_t: regress noise - x_0 on it.
        return -mean + (t - (1.0 - t) * std**2) / variance * (x - (1.0 - t) * mean)

    return denoise
