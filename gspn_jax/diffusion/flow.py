"""Flow matching on straight paths: x_t = (1 - t) x_0 + t noise, t from 0 (clean) to 1 (noise)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from gspn_jax.diffusion.ddpm import Denoise, Metrics, split_output

TIME_SCALE = 1000.0
"""Time is told to the denoiser as TIME_SCALE * t, in the units of DDPM's timesteps."""


def sample_times(
    key: Key[Array, ""], batch: int, distribution: Literal["logit_normal", "uniform"]
) -> Float[Array, "B"]:
    """Times in [0, 1]: sigmoid of a standard normal (Esser et al. 2024, sec. 3.1), or uniform."""
    if distribution == "logit_normal":
        return jax.nn.sigmoid(jax.random.normal(key, (batch,), jnp.float32))
    return jax.random.uniform(key, (batch,), jnp.float32)


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
    time = t[:, None, None, None]
    x_t = (1.0 - time) * x0 + time * noise
    velocity, _ = split_output(denoise(x_t, TIME_SCALE * t, condition), x0.shape[-1])
    mse = jnp.mean(jnp.square(noise - x0 - velocity), axis=(1, 2, 3))
    return mse, {"mse": mse}
