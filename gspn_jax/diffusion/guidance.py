"""Classifier-free guidance (Ho and Salimans 2022), limited to an interval of noise times (Kynkaanniemi et al. 2024)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from gspn_jax.config import SamplerConfig
from gspn_jax.diffusion.ddpm import Denoise


def guided_steps(config: SamplerConfig, noise_time: Float[np.ndarray, "S"]) -> Bool[np.ndarray, "S"]:
    """Network evaluations that are guided: those whose noise time (0 clean, 1 noise) is in the closed interval."""
    low, high = config.guidance_interval
    return (low <= noise_time) & (noise_time <= high) & (config.guidance_scale != 1.0)


def guide(
    conditional: Float[Array, "N H W O"], unconditional: Float[Array, "N H W O"], scale: float, channels: int
) -> Float[Array, "N H W O"]:
    """unconditional + scale (conditional - unconditional) in the first `channels`; the others stay conditional.

    The others are the variance range, and with "first3" also the image channels from the fourth on.
    """
    low = unconditional[..., :channels]
    return jnp.concatenate([low + scale * (conditional[..., :channels] - low), conditional[..., channels:]], axis=-1)


def guided_denoiser(
    config: SamplerConfig,
    denoise: Denoise,
    noise_time: Float[np.ndarray, "S"],
    channels: int,
    null: PyTree[Array | int],
) -> Callable[[Bool[Array, ""], Float[Array, "N H W C"], Float[Array, "N"], PyTree[Array]], Float[Array, "N H W O"]]:
    """`(is_guided, x, time, condition) -> output`, where `is_guided` is this step's entry of `guided_steps`.

    The batch is doubled only where guidance acts: with scale 1 never, outside the interval not (one branch of a cond).
    """
    steps = guided_steps(config, noise_time)
    guided_channels = min(3, channels) if config.guidance_channels == "first3" else channels

    def paired(leaf, none):
        # The pair of one image stays together, so that a batch sharded over devices is doubled without moving.
        none = jnp.broadcast_to(jnp.asarray(none, leaf.dtype), leaf.shape)
        return jnp.stack([leaf, none], axis=1).reshape(-1, *leaf.shape[1:])

    def with_guidance(x, time, condition):
        pairs = jax.tree.map(paired, condition, null)
        output = denoise(jnp.repeat(x, 2, axis=0), jnp.repeat(time, 2, axis=0), pairs)
        output = output.reshape(len(x), 2, *output.shape[1:])
        return guide(output[:, 0], output[:, 1], config.guidance_scale, guided_channels)

    if steps.all():
        return lambda is_guided, *inputs: with_guidance(*inputs)
    if not steps.any():
        return lambda is_guided, *inputs: denoise(*inputs)
    return lambda is_guided, *inputs: jax.lax.cond(is_guided, with_guidance, denoise, *inputs)
