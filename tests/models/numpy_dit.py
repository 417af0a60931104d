"""DiT with attention in float64 NumPy, written from arXiv 2212.09748 and the names of the original's state_dict."""

import math

import numpy as np


def random_state_dict(
    *, hidden: int, depth: int, patch: int, channels: int, out_channels: int, num_classes: int, grid: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random weights under the original's names and in its shapes."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x_embedder.proj": (hidden, channels, patch, patch),
        "t_embedder.mlp.0": (hidden, 256),
        "t_embedder.mlp.2": (hidden, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
        "final_layer.linear": (patch * patch * out_channels, hidden),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * hidden, hidden),
            f"blocks.{i}.attn.proj": (hidden, hidden),
            f"blocks.{i}.mlp.fc1": (4 * hidden, hidden),
            f"blocks.{i}.mlp.fc2": (hidden, 4 * hidden),
            f"blocks.{i}.adaLN_modulation.1": (6 * hidden, hidden),
        }
    state_dict = {}
    for name, shape in shapes.items():
        state_dict[f"{name}.weight"] = rng.standard_normal(shape) / math.sqrt(np.prod(shape[1:]))
        state_dict[f"{name}.bias"] = 0.2 * rng.standard_normal(shape[0])
    state_dict["y_embedder.embedding_table.weight"] = rng.standard_normal((num_classes + 1, hidden))
    state_dict = {name: value.astype(np.float32) for name, value in state_dict.items()}
    return state_dict | {"pos_embed": positions(grid, grid, hidden)[None].astype(np.float32)}


def positions(rows: int, columns: int, hidden: int) -> np.ndarray:
    """[rows * columns, hidden], one token at a time."""
    quarter = hidden // 4
    table = np.zeros((rows * columns, hidden))
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                rate = 1 / 10000 ** (i / quarter)
                token = table[row * columns + column]
                token[i], token[quarter + i] = math.sin(column * rate), math.cos(column * rate)
                token[2 * quarter + i], token[3 * quarter + i] = math.sin(row * rate), math.cos(row * rate)
    return table


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def time_features(t: float) -> np.ndarray:
    rates = [math.exp(-math.log(10000) * i / 128) for i in range(128)]
    return np.array([math.cos(t * rate) for rate in rates] + [math.sin(t * rate) for rate in rates])


def denoise(state_dict, image, t, y, *, heads: int, patch: int) -> np.ndarray:
    """One image [C, H, W], as PyTorch lays it out, to [O, H, W]."""
    weights = {name: np.asarray(value, np.float64) for name, value in state_dict.items()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    _, height, width = image.shape
    rows, columns = height // patch, width // patch
    conv = weights["x_embedder.proj.weight"]
    hidden = conv.shape[0]
    tokens = np.zeros((rows * columns, hidden))
    for r in range(rows):
        for c in range(columns):
            window = image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].astype(np.float64)
            tokens[r * columns + c] = (conv * window).sum((1, 2, 3)) + weights["x_embedder.proj.bias"]
    x = tokens + positions(rows, columns, hidden)

    condition = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", time_features(float(t)))))
    condition = condition + weights["y_embedder.embedding_table.weight"][y]
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    size = hidden // heads
    for i in range(depth):
        modulation = linear(f"blocks.{i}.adaLN_modulation.1", silu(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(modulation, 6)
        q, k, v = np.split(linear(f"blocks.{i}.attn.qkv", layer_norm(x) * (1 + scale1) + shift1), 3, axis=1)
        mixed = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            mixed[:, part] = scores / scores.sum(1, keepdims=True) @ v[:, part]
        x = x + gate1 * linear(f"blocks.{i}.attn.proj", mixed)
        inner = linear(f"blocks.{i}.mlp.fc1", layer_norm(x) * (1 + scale2) + shift2)
        inner = 0.5 * inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + gate2 * linear(f"blocks.{i}.mlp.fc2", inner)

    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(condition)), 2)
    x = linear("final_layer.linear", layer_norm(x) * (1 + scale) + shift)
    out_channels = x.shape[1] // patch**2
    image = np.zeros((out_channels, height, width))
    for r in range(rows):
        for c in range(columns):
            values = x[r * columns + c].reshape(patch, patch, out_channels)
            image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = values.transpose(2, 0, 1)
    return image
