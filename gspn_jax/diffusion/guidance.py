"""Classifier-free guidance (Ho and Salimans 2022) and autoguidance (Karras et al. 2024, arXiv 2406.02507), limited to
an interval of noise (Kynkaanniemi et al. 2024, arXiv 2404.07724)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from gspn_jax.config import ConfigError, SamplerConfig
from gspn_jax.diffusion.ddpm import Denoise


def guided_steps(
    config: SamplerConfig,
    noise_time: Float[np.ndarray, "S"],
    signal: Float[np.ndarray, "S"],
    sigma: Float[np.ndarray, "S"],
) -> Bool[np.ndarray, "S"]:
    """Network evaluations that are guided: those whose noise time (0 clean, 1 noise) is in the closed interval
    `guidance_interval`, or whose noise level sigma / signal is above the lower and up to the upper of
    `guidance_sigmas`. Raises ConfigError for a sampler that has no noise levels."""
    acts = config.guidance_scale != 1.0
    if config.guidance_sigmas is None:
        low, high = config.guidance_interval
        return (low <= noise_time) & (noise_time <= high) & acts
    if not (signal + sigma > 0).all():
        raise ConfigError("sampler.guidance_sigmas is for samplers with a noise level, found one that tells none")
    low, high = config.guidance_sigmas
    return (low * signal < sigma) & (sigma <= high * signal) & acts  # no signal is an infinite level


def guided(
    conditional: Float[Array, "N H W O"], other: Float[Array, "N H W P"], scale: float, channels: int
) -> Float[Array, "N H W O"]:
    """other + scale (conditional - other) in the first `channels`, where `other` is the prediction without a condition
    or that of a guide; further channels stay conditional.

    The others are the variance range, and with "first3" also the image channels from the fourth on.
    """
    low = other[..., :channels]
    return jnp.concatenate([low + scale * (conditional[..., :channels] - low), conditional[..., channels:]], axis=-1)


def guided_denoiser(
    config: SamplerConfig,
    denoise: Denoise,
    steps: Bool[np.ndarray, "S"],
    channels: int,
    null: PyTree[Array | int],
    guide: Denoise | None = None,
) -> Callable[[Bool[Array, ""], Float[Array, "N H W C"], Float[Array, "N"], PyTree[Array]], Float[Array, "N H W O"]]:
    """`(is_guided, x, time, condition) -> output`, where `is_guided` is this step's entry of `steps`, `guided_steps`.

    Guidance leads away from the prediction without a condition, or with `guide` from that model's for the same
    condition. The batch is doubled, or the guide evaluated, only where guidance acts: with scale 1 never, outside the
    interval not (one branch of a cond).
    """
    guided_channels = min(3, channels) if config.guidance_channels == "first3" else channels

    def paired(leaf, none):
        # The pair of one image stays together, so that a batch sharded over devices is doubled without moving.
        none = jnp.broadcast_to(jnp.asarray(none, leaf.dtype), leaf.shape)
        return jnp.stack([leaf, none], axis=1).reshape(-1, *leaf.shape[1:])

    def with_guidance(x, time, condition):
        if guide is not None:
            output, low = denoise(x, time, condition), guide(x, time, condition)
            return guided(output, low, config.guidance_scale, guided_channels)
        pairs = jax.tree.map(paired, condition, null)
        output = denoise(jnp.repeat(x, 2, axis=0), jnp.repeat(time, 2, axis=0), pairs)
        output = output.reshape(len(x), 2, *output.shape[1:])
        return guided(output[:, 0], output[:, 1], config.guidance_scale, guided_channels)

    if steps.all():
        return lambda is_guided, *inputs: with_guidance(*inputs)
    if not steps.any():
        return lambda is_guided, *inputs: denoise(*inputs)
    return lambda is_guided, *inputs: jax.lax.cond(is_guided, with_guidance, denoise, *inputs)
