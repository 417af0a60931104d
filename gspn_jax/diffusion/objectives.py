"""What training minimises, for either objective, from one key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gspn_jax.config import DiffusionConfig
from gspn_jax.diffusion import ddpm, flow
from gspn_jax.diffusion.ddpm import Denoise, Metrics
from gspn_jax.diffusion.schedules import make_schedule


def loss(
    config: DiffusionConfig, denoise: Denoise, x0: Float[Array, "B H W C"], y: Int[Array, "B"], key: Key[Array, ""]
) -> tuple[Float[Array, "B"], Metrics]:
    """Loss and metrics of each image, float32, at times and with noise drawn from `key` for the whole batch.

    The draw depends on the global batch shape and the key only, not on how the batch is sharded.
    """
    time_key, noise_key = jax.random.split(key)
    x0 = x0.astype(jnp.float32)
    noise = jax.random.normal(noise_key, x0.shape, jnp.float32)
    if config.objective == "flow":
        t = flow.sample_times(time_key, x0.shape[0], config.time_distribution)
        return flow.training_loss(denoise, x0, y, t=t, noise=noise)
    schedule = make_schedule(config)
    t = jax.random.randint(time_key, (x0.shape[0],), 0, schedule.num_timesteps)
    return ddpm.training_loss(denoise, schedule, x0, y, t=t, noise=noise)


def drop_labels(key: Key[Array, ""], y: Int[Array, "B"], rate: float, null_class: int) -> Int[Array, "B"]:
    """Replaces each label by `null_class` with probability `rate`, so that guidance has a null class."""
    return jnp.where(jax.random.bernoulli(key, rate, y.shape), jnp.asarray(null_class, y.dtype), y)
