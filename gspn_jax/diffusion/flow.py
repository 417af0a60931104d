"""Flow matching on straight paths: x_t = (1 - t) x_0 + t noise, t from 0 (clean) to 1 (noise)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from gspn_jax.diffusion.ddpm import Denoise, Metrics, split_output

TIME_SCALE = 1000.0
"""Time is told to the denoiser as TIME_SCALE * t, in the units of DDPM's timesteps."""


def sample_times(
    key: Key[Array, ""],
    batch: int,
    distribution: Literal["logit_normal", "uniform"],
    mean: float = 0.0,
    std: float = 1.0,
) -> Float[Array, "B"]:
    """Times in [0, 1]: sigmoid of a normal (Esser et al. 2024, sec. 3.1), or uniform."""
    if distribution == "logit_normal":
        normal = jax.random.normal(key, (batch,), jnp.float32)
        return jax.nn.sigmoid(normal if (mean, std) == (0.0, 1.0) else mean + std * normal)
    return jax.random.uniform(key, (batch,), jnp.float32)


def noised(
    x0: Float[Array, "B H W C"], noise: Float[Array, "B H W C"], t: Float[Array, "B"]
) -> Float[Array, "B H W C"]:
    """Points of the straight paths from `x0` to `noise` at the times `t`."""
    time = t[:, None, None, None]
    return (1.0 - time) * x0 + time * noise


def training_loss(
    denoise: Denoise,
    x0: Float[Array, "B H W C"],
    condition: PyTree[Array],
    *,
    t: Float[Array, "B"],
    noise: Float[Array, "B H W C"],
) -> tuple[Float[Array, "B"], Metrics]:
    """Mean squared error of the velocity dx/dt = noise - x_0 for each image, float32. Metrics: "mse".

    A denoiser with 2C outputs has its first C trained.
    """
    x_t = noised(x0, noise, t)
    velocity, _ = split_output(denoise(x_t, TIME_SCALE * t, condition), x0.shape[-1])
    mse = jnp.mean(jnp.square(noise - x0 - velocity), axis=(1, 2, 3))
    return mse, {"mse": mse}


SMALLEST_TIME = 0.05
"""Least noise time that the velocity of a predicted x_0 is divided by: `t_eps` of JiT's released code."""


def velocity_of(
    x: Float[Array, "B H W C"], x0: Float[Array, "B H W C"], t: Float[Array, "..."]
) -> Float[Array, "B H W C"]:
    """Velocity at `x` that leads to `x0`: (x - x_0) / max(t, 0.05)."""
    return (x - x0) / jnp.maximum(t, SMALLEST_TIME)


def clean_loss(
    denoise: Denoise,
    x0: Float[Array, "B H W C"],
    condition: PyTree[Array],
    *,
    t: Float[Array, "B"],
    noise: Float[Array, "B H W C"],
) -> tuple[Float[Array, "B"], Metrics]:
    """Mean squared error of the velocity of a predicted x_0, |x_0 - prediction|^2 / max(t, 0.05)^2 (JiT, arXiv
    2511.13720, section 4), float32. Metrics: "mse" of the velocity and "clean_mse" of x_0.
    """
    x_t = noised(x0, noise, t)
    found, _ = split_output(denoise(x_t, TIME_SCALE * t, condition), x0.shape[-1])
    time = t[:, None, None, None]
    error = velocity_of(x_t, x0, time) - velocity_of(x_t, found, time)
    mse = jnp.mean(jnp.square(error), axis=(1, 2, 3))
    return mse, {"mse": mse, "clean_mse": jnp.mean(jnp.square(x0 - found), axis=(1, 2, 3))}


WEIGHT_OFFSET = 1e-3
"""Number beside the squared error in the weight of a mean flow's loss (arXiv 2505.13447, section 4.3)."""


def mean_loss(
    denoise: Denoise,
    x0: Float[Array, "B H W C"],
    condition: PyTree[Array],
    *,
    t: Float[Array, "B"],
    span: Float[Array, "B"],
    noise: Float[Array, "B H W C"],
) -> tuple[Float[Array, "B"], Metrics]:
    """Loss of the mean velocity u between the noise times t and t - span >= 0 (MeanFlow, arXiv 2505.13447), float32.

    The target is v - span du/dt with du/dt = v du/dx + du/dt along the path (equation 6), by one tangent, and is held
    constant; the error e of an image is weighted by 1 / (|e|^2 + 0.001), held constant too. The denoiser is told
    (t, span) as they are. Metrics: "mse" of an image's numbers, without the weight.
    """
    x_t = noised(x0, noise, t)
    velocity = noise - x0

    def mean_velocity(x, t, span):
        return split_output(denoise(x, jnp.stack([t, span], axis=-1), condition), x0.shape[-1])[0]

    found, slope = jax.jvp(mean_velocity, (x_t, t, span), (velocity, jnp.ones_like(t), jnp.ones_like(span)))
    target = jax.lax.stop_gradient(velocity - span[:, None, None, None] * slope)
    squares = jnp.square(found - target)
    total = jnp.sum(squares, axis=(1, 2, 3))
    return total / jax.lax.stop_gradient(total + WEIGHT_OFFSET), {"mse": jnp.mean(squares, axis=(1, 2, 3))}
