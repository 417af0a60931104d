"""Mixers in float64 NumPy, one token at a time: written from the papers that their modules name, and the names of our
parameters. One map [H, W, D] to [H, W, D]."""

import math

import numpy as np

from tests.models import numpy_gspn
from tests.models.numpy_dit import silu
from tests.models.numpy_gspn import depthwise, linear
from tests.models.numpy_modern import rms_norm


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def convolution(p, x):
    y = gelu(depthwise(linear(p["in_proj"], x), p["conv"]["kernel"]))
    return linear(p["out_proj"], y * sigmoid(linear(p["scale"], y.mean((0, 1)))))


def linear_attention(p, x, heads):
    tokens = x.reshape(-1, x.shape[-1])
    size, mixed = tokens.shape[1] // heads, np.zeros_like(tokens)
    q, k, v = np.moveaxis(linear(p["qkv"], tokens), 1, 0)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i, query in enumerate(np.maximum(q[:, part], 0)):
            weights = np.array([query @ np.maximum(key, 0) for key in k[:, part]])
            mixed[i, part] = weights @ v[:, part] / (weights.sum() + 1e-6 * len(tokens))
    return linear(p["proj"], mixed).reshape(x.shape)


def gated_linear_attention(p, x, heads):
    height, width, hidden = x.shape
    keys, values = hidden // 2 // heads, hidden // heads
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    orders = [rows, rows[::-1], columns, columns[::-1]]
    q, k, v, gate, logits = (linear(p[name], x) for name in ("q", "k", "v", "gate", "decay"))
    y = np.zeros_like(x)
    for head in range(heads):
        narrow, wide = slice(head * keys, (head + 1) * keys), slice(head * values, (head + 1) * values)
        state = np.zeros((keys, values))
        for place in orders[head * 4 // heads]:
            state = sigmoid(logits[place][head]) ** (1 / 16) * state + np.outer(k[place][narrow], v[place][wide])
            y[place][wide] = rms_norm(p["norm"], q[place][narrow] / math.sqrt(keys) @ state)
    return linear(p["proj"], y * silu(gate))


def compressed_gspn(p, x, chunk):
    x = depthwise(linear(p["in_proj"], x), p["conv"]["kernel"])
    narrow = linear(p["compress"], x)
    y = numpy_gspn.propagate(p, narrow, linear(p["proxy"], x), chunk)
    return linear(p["out_proj"], x + linear(p["expand"], y))


def gspn(p, x, chunk):
    return numpy_gspn.mix(p, x, chunk)
