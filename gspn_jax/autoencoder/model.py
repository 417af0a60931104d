"""The network as pure functions of its weights, by the names of diffusers' `AutoencoderKL` ("decoder.conv_in.weight").

Weights are laid out for NHWC: convolutions [kh, kw, in, out], linears [in, out]. Everything is float32 at full
precision: a decoder at lower precision changes FID.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LATENT_SCALE = 0.18215
"""Brings latents of Stable Diffusion 1 and 2 to about unit variance (CompVis/latent-diffusion, arXiv 2112.10752)."""

_EPSILON = 1e-6

Params = Mapping[str, Float[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The defaults are those of Stable Diffusion 1 and 2: 83,653,863 parameters."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each level; between levels the image is halved. Of no levels the latents are the pixels (`PIXELS`)."""
    layers: int = 2
    """Residual blocks of each level of the encoder; the decoder has one more."""
    latent_channels: int = 4
    image_channels: int = 3
    groups: int = 32
    """Number of groups of every group normalisation."""
    scaling_factor: float = LATENT_SCALE
    shift_factor: float = 0.0
    """Latents are trained on as (latent - shift_factor) * scaling_factor."""

    @property
    def factor(self) -> int:
        """Side of the image over the side of the latent."""
        return 2 ** max(len(self.channels) - 1, 0)


PIXELS = AutoencoderConfig(channels=(), latent_channels=3, scaling_factor=1.0)
"""No autoencoder, for models of pixels in [-1, 1]: without weights, its posterior is the image."""

_CERTAIN = -30.0
"""Least log-variance that the posterior is clipped to (CompVis/latent-diffusion)."""


def encode(params: Params, config: AutoencoderConfig, images: Float[Array, "B H W C"]) -> Float[Array, "B h w moments"]:
    """The posterior's mean and log-variance (not clipped, not scaled) of images in [-1, 1], H = factor * h."""
    _check(images, "images", config.image_channels, config.factor)
    if not config.channels:
        return jnp.concatenate([images, jnp.full_like(images, _CERTAIN)], axis=-1)
    x = _conv(params, "encoder.conv_in", images)
    for level in range(len(config.channels)):
        block = f"encoder.down_blocks.{level}"
        for layer in range(config.layers):
            x = _residual(params, f"{block}.resnets.{layer}", x, config.groups)
        if level < len(config.channels) - 1:
            # padded at the bottom and at the right only
            x = _conv(params, f"{block}.downsamplers.0.conv", x, stride=2, padding=((0, 1), (0, 1)))
    x = _middle(params, "encoder.mid_block", x, config.groups)
    x = jax.nn.silu(_group_norm(params, "encoder.conv_norm_out", x, config.groups))
    return _conv(params, "quant_conv", _conv(params, "encoder.conv_out", x))


def decode(params: Params, config: AutoencoderConfig, latents: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
    """The images, about [-1, 1], of unscaled latents (a sample of the posterior, neither shifted nor scaled)."""
    _check(latents, "latents", config.latent_channels, 1)
    if not config.channels:
        return latents
    x = _conv(params, "decoder.conv_in", _conv(params, "post_quant_conv", latents))
    x = _middle(params, "decoder.mid_block", x, config.groups)
    for level in range(len(config.channels)):
        block = f"decoder.up_blocks.{level}"
        for layer in range(config.layers + 1):
            x = _residual(params, f"{block}.resnets.{layer}", x, config.groups)
        if level < len(config.channels) - 1:
            x = _conv(params, f"{block}.upsamplers.0.conv", x.repeat(2, axis=1).repeat(2, axis=2))
    x = jax.nn.silu(_group_norm(params, "decoder.conv_norm_out", x, config.groups))
    return _conv(params, "decoder.conv_out", x)


def _check(x: jax.Array, name: str, channels: int, factor: int) -> None:
    if x.ndim != 4 or x.shape[3] != channels or x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"{name} must be [B, H, W, {channels}] with H and W multiples of {factor}, found {list(x.shape)}"
        )


def _conv(
    params: Params,
    name: str,
    x: Float[Array, "B H W C"],
    *,
    stride: int = 1,
    padding: tuple[tuple[int, int], ...] | None = None,
) -> Float[Array, "B h w D"]:
    kernel = params[f"{name}.weight"]
    out = jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding="SAME" if padding is None else padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return out + params[f"{name}.bias"]


def _linear(params: Params, name: str, x: Float[Array, "B N C"]) -> Float[Array, "B N D"]:
    return jnp.matmul(x, params[f"{name}.weight"], precision=jax.lax.Precision.HIGHEST) + params[f"{name}.bias"]


def _group_norm(params: Params, name: str, x: Float[Array, "B H W C"], groups: int) -> Float[Array, "B H W C"]:
    split = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean = split.mean((1, 3), keepdims=True)
    variance = jnp.square(split - mean).mean((1, 3), keepdims=True)
    normal = ((split - mean) * jax.lax.rsqrt(variance + _EPSILON)).reshape(x.shape)
    return normal * params[f"{name}.weight"] + params[f"{name}.bias"]


def _residual(params: Params, name: str, x: Float[Array, "B H W C"], groups: int) -> Float[Array, "B H W D"]:
    y = _conv(params, f"{name}.conv1", jax.nn.silu(_group_norm(params, f"{name}.norm1", x, groups)))
    y = _conv(params, f"{name}.conv2", jax.nn.silu(_group_norm(params, f"{name}.norm2", y, groups)))
    return y + (_conv(params, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in params else x)


def _middle(params: Params, name: str, x: Float[Array, "B H W C"], groups: int) -> Float[Array, "B H W C"]:
    x = _residual(params, f"{name}.resnets.0", x, groups)
    x = _attention(params, f"{name}.attentions.0", x, groups)
    return _residual(params, f"{name}.resnets.1", x, groups)


def _attention(params: Params, name: str, x: Float[Array, "B H W C"], groups: int) -> Float[Array, "B H W C"]:
    """Self-attention over all pixels, with a single head."""
    tokens = _group_norm(params, f"{name}.group_norm", x, groups).reshape(x.shape[0], -1, x.shape[-1])
    q, k, v = (_linear(params, f"{name}.{part}", tokens) for part in ("to_q", "to_k", "to_v"))
    scores = jnp.einsum("bnc,bmc->bnm", q, k, precision=jax.lax.Precision.HIGHEST) / math.sqrt(x.shape[-1])
    mixed = jnp.einsum("bnm,bmc->bnc", jax.nn.softmax(scores), v, precision=jax.lax.Precision.HIGHEST)
    return x + _linear(params, f"{name}.to_out.0", mixed).reshape(x.shape)
