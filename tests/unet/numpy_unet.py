"""The U-Net again, in float64 NumPy on one [C, H, W], with weights as PyTorch lays them out; and random weights."""

import math

import numpy as np

from gspn_jax.unet import UNetConfig, expected_shapes

CONVOLUTIONS = UNetConfig(
    channels=(8, 16, 16), layers=2, depths=(1, 1, 0), middle_depth=2, heads=(2, 4, 4), context_width=12, groups=4
)
"""As Stable Diffusion 1: the last level has no transformers, projections are convolutions."""
LINEAR = UNetConfig(
    channels=(8, 16),
    layers=1,
    depths=(0, 2),
    middle_depth=2,
    heads=(2, 1),
    context_width=20,
    groups=2,
    linear_projection=True,
    in_channels=3,
    out_channels=5,
    added_width=10 + 6 * 8,
    added_size_width=8,
)
"""As SDXL: the first level has no transformers, several blocks in one, pooled text and sizes."""


def random_state_dict(config: UNetConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights under which no layer is negligible: normalisations away from 1 and 0, biases too; sharp attention."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        value = rng.standard_normal(shape)
        if len(shape) > 1:
            value *= (2 if name.endswith(("to_q.weight", "to_k.weight")) else 1) / math.sqrt(np.prod(shape[1:]))
        else:
            value = 0.3 * value + name.endswith("weight")
        weights[name] = value.astype(np.float32)
    return weights


def apply(weights, config, x, timestep, context, pooled=None, sizes=None, dilation=1):
    net = _Network(weights, config)
    net.dilation = dilation
    net.time, net.context = net.embed(timestep, pooled, sizes), context
    last = len(config.channels) - 1
    skips = [x := net.conv("conv_in", x)]
    for level in range(last + 1):
        for layer in range(config.layers):
            x = net.layer(f"down_blocks.{level}", layer, x, config.depths[level], config.heads[level])
            skips.append(x)
        if level < last:
            skips.append(x := net.conv(f"down_blocks.{level}.downsamplers.0.conv", x, stride=2))
    x = net.residual("mid_block.resnets.0", x)
    x = net.transformer("mid_block.attentions.0", x, config.middle_depth, config.heads[-1])
    x = net.residual("mid_block.resnets.1", x)
    for i, level in enumerate(reversed(range(last + 1))):
        for layer in range(config.layers + 1):
            joined = np.concatenate([x, skips.pop()])
            x = net.layer(f"up_blocks.{i}", layer, joined, config.depths[level], config.heads[level])
        if level:
            rows, columns = (np.arange(size) // 2 for size in skips[-1].shape[1:])
            x = net.conv(f"up_blocks.{i}.upsamplers.0.conv", x[:, rows][:, :, columns])
    return net.conv("conv_out", silu(net.group_norm("conv_norm_out", x, 1e-5)))


def silu(x):
    return x / (1 + np.exp(-x))


def sinusoids(values, width):
    angles = np.outer(values, 10000.0 ** (-np.arange(width // 2) / (width // 2)))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).reshape(-1)


class _Network:
    def __init__(self, weights, config):
        self.weights, self.config = {name: value.astype(np.float64) for name, value in weights.items()}, config

    def embed(self, timestep, pooled, sizes):
        def embedded(name, values):
            return self.linear(f"{name}.linear_2", silu(self.linear(f"{name}.linear_1", values)))

        time = embedded("time_embedding", sinusoids([timestep], self.config.channels[0]))
        if pooled is not None:
            time = time + embedded(
                "add_embedding", np.concatenate([pooled, sinusoids(sizes, self.config.added_size_width)])
            )
        return silu(time)

    def layer(self, block, layer, x, depth, heads):
        x = self.residual(f"{block}.resnets.{layer}", x)
        return self.transformer(f"{block}.attentions.{layer}", x, depth, heads) if depth else x

    def residual(self, name, x):
        y = self.conv(f"{name}.conv1", silu(self.group_norm(f"{name}.norm1", x, 1e-5)))
        y = y + self.linear(f"{name}.time_emb_proj", self.time)[:, None, None]
        y = self.conv(f"{name}.conv2", silu(self.group_norm(f"{name}.norm2", y, 1e-5)))
        return y + (self.conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in self.weights else x)

    def transformer(self, name, x, depth, heads):
        y = self.linear(f"{name}.proj_in", self.group_norm(f"{name}.norm", x, 1e-6).reshape(len(x), -1).T)
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            seen = self.layer_norm(f"{block}.norm1", y)
            y = y + self.attention(f"{block}.attn1", seen, seen, heads)
            y = y + self.attention(f"{block}.attn2", self.layer_norm(f"{block}.norm2", y), self.context, heads)
            hidden = self.linear(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", y))
            value, gate = np.split(hidden, 2, axis=1)
            gelu = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
            y = y + self.linear(f"{block}.ff.net.2", value * gelu)
        return x + self.linear(f"{name}.proj_out", y).T.reshape(x.shape)

    def attention(self, name, x, context, heads):
        q, k, v = x, context, context
        q, k, v = (self.linear(f"{name}.to_{part}", value) for part, value in (("q", q), ("k", k), ("v", v)))
        mixed, size = np.empty_like(q), q.shape[1] // heads
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for i, query in enumerate(q[:, part]):
                scores = k[:, part] @ query / math.sqrt(size)
                shares = np.exp(scores - scores.max())
                mixed[i, part] = shares @ v[:, part] / shares.sum()
        return self.linear(f"{name}.to_out.0", mixed)

    def conv(self, name, x, stride=1):
        weight = self.weights[f"{name}.weight"]
        half = self.dilation * (weight.shape[2] // 2)
        x = np.pad(x, ((0, 0), (half, half), (half, half)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (2 * half + 1,) * 2, axis=(1, 2))[:, ::stride, ::stride]
        windows = windows[..., :: self.dilation, :: self.dilation]
        out = np.einsum("ihwkl,oikl->ohw", windows, weight, optimize=True)
        return out + self.weights[f"{name}.bias"][:, None, None]

    def linear(self, name, x):
        weight = self.weights[f"{name}.weight"]
        return x @ weight.reshape(weight.shape[:2]).T + self.weights.get(f"{name}.bias", 0)

    def group_norm(self, name, x, epsilon):
        split = x.reshape(self.config.groups, -1)
        normal = (split - split.mean(1, keepdims=True)) / np.sqrt(split.var(1, keepdims=True) + epsilon)
        weight, bias = (self.weights[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return normal.reshape(x.shape) * weight + bias

    def layer_norm(self, name, x):
        normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return normal * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
