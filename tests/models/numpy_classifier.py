"""The classification network in float64 NumPy loops, written from arXiv 2501.12381, figure 3, and our names."""

import numpy as np
from scipy.special import erf

from tests.models.numpy_gspn import DIRECTIONS, depthwise, linear, scan


def layer_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return p["scale"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + p["bias"]


def gelu(x):
    return x / 2 * (1 + erf(x / np.sqrt(2)))


def convolve(p, x):
    """3x3, stride 2, one pixel of zeros around."""
    height, width, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    y = np.zeros(((height + 1) // 2, (width + 1) // 2, len(p["bias"])))
    for i, j in np.ndindex(*y.shape[:2]):
        y[i, j] = np.tensordot(padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], p["kernel"], 3) + p["bias"]
    return y


def response_norm(p, x):
    energy = np.array([np.sqrt((x[..., c] ** 2).sum()) for c in range(x.shape[-1])])
    return p["gamma"] * x * energy / (energy.mean() + 1e-6) + p["beta"] + x


def mix(p, x, chunk, released):
    x = depthwise(linear(p["in_proj"], x), p["conv"]["kernel"])
    x = x / (1 + np.exp(-x))
    proxy, channels = linear(p["proxy"], x), x.shape[-1]
    start = 0 if released else 1
    gates = linear(p["gates"], proxy)
    gates = np.repeat(gates, channels // gates.shape[-1], axis=-1)
    y = np.zeros_like(x)
    for k, direction in enumerate(DIRECTIONS):
        lam, out_gate = (start + linear(p[name], proxy)[:, :, k] for name in ("lam", "out_gate"))
        term = out_gate * scan(lam * x, gates[:, :, 3 * k : 3 * k + 3], direction, chunk)
        if "skip" in p:
            term = term + linear(p["skip"], proxy)[:, :, k] * x
        y += p["merge"][k] * term
    return linear(p["out_proj"], response_norm(p["grn"], layer_norm(p["norm"], y)))


def classify(params, image, chunks, released):
    """(logits, maps of the stages) of one image [H, W, C]; `chunks` has a tuple of one entry a block a stage."""
    x, maps = image, []
    for number, blocks in enumerate(chunks, start=1):
        stage = params["backbone"][f"stage{number}"]
        down = stage["down"]
        if number == 1:
            x = gelu(layer_norm(down["norm1"], convolve(down["conv1"], x)))
            x = layer_norm(down["norm2"], convolve(down["conv2"], x))
        else:
            x = layer_norm(down["norm"], convolve(down["conv"], x))
        for i, chunk in enumerate(blocks):
            p = take(stage["blocks"], i)
            x = x + mix(p["mixer"], layer_norm(p["norm1"], x), chunk, released)
            x = x + linear(p["mlp"]["fc2"], gelu(linear(p["mlp"]["fc1"], layer_norm(p["norm2"], x))))
        maps.append(x)
    pooled = layer_norm(params["head"]["norm"], x).mean((0, 1))
    return linear(params["head"]["linear"], pooled), maps


def take(stack, index):
    return {name: take(value, index) if isinstance(value, dict) else value[index] for name, value in stack.items()}
