"""The autoencoder again, in float64 NumPy on [C, H, W] with weights as PyTorch lays them out; and random weights."""

import numpy as np

from gspn_jax.autoencoder import AutoencoderConfig, expected_shapes

TINY = AutoencoderConfig(channels=(32, 64), layers=1, latent_channels=4)


def random_state_dict(config: AutoencoderConfig = TINY, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights under which no layer is negligible: normalisations away from 1 and 0, biases too."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        value = rng.standard_normal(shape)
        if len(shape) > 1:
            value /= np.sqrt(np.prod(shape[1:]))
        elif name.endswith("weight"):
            value = 1 + 0.3 * value
        else:
            value *= 0.3
        weights[name] = value.astype(np.float32)
    return weights


def encode(weights, config, image):
    x = conv(weights, "encoder.conv_in", image, pad=(1, 1))
    for level in range(len(config.channels)):
        for layer in range(config.layers):
            x = residual(weights, f"encoder.down_blocks.{level}.resnets.{layer}", x, config.groups)
        if level < len(config.channels) - 1:
            x = conv(weights, f"encoder.down_blocks.{level}.downsamplers.0.conv", x, pad=(0, 1), stride=2)
    x = middle(weights, "encoder.mid_block", x, config.groups)
    x = conv(weights, "encoder.conv_out", silu(norm(weights, "encoder.conv_norm_out", x, config.groups)), pad=(1, 1))
    return conv(weights, "quant_conv", x)


def decode(weights, config, latent):
    x = conv(weights, "decoder.conv_in", conv(weights, "post_quant_conv", latent), pad=(1, 1))
    x = middle(weights, "decoder.mid_block", x, config.groups)
    for level in range(len(config.channels)):
        for layer in range(config.layers + 1):
            x = residual(weights, f"decoder.up_blocks.{level}.resnets.{layer}", x, config.groups)
        if level < len(config.channels) - 1:
            x = np.kron(x, np.ones((1, 2, 2)))
            x = conv(weights, f"decoder.up_blocks.{level}.upsamplers.0.conv", x, pad=(1, 1))
    return conv(weights, "decoder.conv_out", silu(norm(weights, "decoder.conv_norm_out", x, config.groups)), pad=(1, 1))


def conv(weights, name, x, pad=(0, 0), stride=1):
    weight, bias = weights[f"{name}.weight"].astype(np.float64), weights[f"{name}.bias"].astype(np.float64)
    x = np.pad(x, ((0, 0), pad, pad))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("ihwkl,oikl->ohw", windows, weight, optimize=True) + bias[:, None, None]


def norm(weights, name, x, groups):
    split = x.reshape(groups, -1)
    normal = (split - split.mean(1, keepdims=True)) / np.sqrt(split.var(1, keepdims=True) + 1e-6)
    weight, bias = weights[f"{name}.weight"][:, None, None], weights[f"{name}.bias"][:, None, None]
    return normal.reshape(x.shape) * weight + bias


def silu(x):
    return x / (1 + np.exp(-x))


def residual(weights, name, x, groups):
    y = conv(weights, f"{name}.conv1", silu(norm(weights, f"{name}.norm1", x, groups)), pad=(1, 1))
    y = conv(weights, f"{name}.conv2", silu(norm(weights, f"{name}.norm2", y, groups)), pad=(1, 1))
    return y + (conv(weights, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in weights else x)


def middle(weights, name, x, groups):
    x = residual(weights, f"{name}.resnets.0", x, groups)
    at = f"{name}.attentions.0"
    tokens = norm(weights, f"{at}.group_norm", x, groups).reshape(len(x), -1).T
    q, k, v = (linear(weights, f"{at}.{part}", tokens) for part in ("to_q", "to_k", "to_v"))
    mixed = np.empty_like(v)
    for i, query in enumerate(q):
        scores = np.exp(k @ query / np.sqrt(len(query)))
        mixed[i] = scores @ v / scores.sum()
    x = x + linear(weights, f"{at}.to_out.0", mixed).T.reshape(x.shape)
    return residual(weights, f"{name}.resnets.1", x, groups)


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].astype(np.float64).T + weights[f"{name}.bias"]
