"""DiT with the options of LightningDiT and JiT in float64 NumPy, one image at a time: written from their papers (arXiv
2501.01423, 2511.13720) and from those of SwiGLU (2002.05202), RMS norm (1910.07467) and rotary positions (2104.09864).

`params` are ours; rotations are products of complex numbers.
"""

import math

import numpy as np

from tests.models.numpy_dit import layer_norm, positions, silu, time_features


def linear(params, x):
    return x @ params["kernel"].reshape(len(params["kernel"]), -1) + params.get("bias", np.zeros(1)).reshape(-1)


def rms_norm(params, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["scale"]


def norm(params, name, x):
    return rms_norm(params[name], x) if name in params else layer_norm(x)


def rotated(head, rows, columns):
    """[rows * columns, size]: pairs of neighbours are complex numbers, the first half turned by the row."""
    numbers = head[:, 0::2] + 1j * head[:, 1::2]
    half = numbers.shape[1] // 2
    for token in range(rows * columns):
        for i in range(2 * half):
            place = token // columns if i < half else token % columns
            numbers[token, i] *= np.exp(1j * place * 10000.0 ** (-(i % half) / half))
    return np.stack([numbers.real, numbers.imag], axis=-1).reshape(head.shape)


def attend(params, x, heads, grid, rope):
    size = x.shape[1] // heads
    q, k, v = np.split(linear(params["qkv"], x), 3, axis=1)
    mixed = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        queries, keys = q[:, part], k[:, part]
        if "q_norm" in params:
            queries, keys = rms_norm(params["q_norm"], queries), rms_norm(params["k_norm"], keys)
        if rope:
            queries, keys = rotated(queries, *grid), rotated(keys, *grid)
        scores = np.exp(queries @ keys.T / math.sqrt(size))
        mixed[:, part] = scores / scores.sum(1, keepdims=True) @ v[:, part]
    return linear(params["proj"], mixed)


def feed_forward(params, x, swiglu):
    inner = linear(params["fc1"], x)
    if swiglu:
        gate, value = np.split(inner, 2, axis=1)
        return linear(params["fc2"], silu(gate) * value)
    inner = 0.5 * inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return linear(params["fc2"], inner)


def denoise(params, image, t, y, *, heads, patch, rope, swiglu):
    """[H, W, C] to [H, W, O]."""
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    cut = [
        (slice(r * patch, (r + 1) * patch), slice(c * patch, (c + 1) * patch))
        for r in range(rows)
        for c in range(columns)
    ]
    x = np.stack([image[place].reshape(-1) for place in cut])
    if "narrow" in params["patch_embed"]:
        x = x @ params["patch_embed"]["narrow"]["kernel"]
    x = linear(params["patch_embed"]["proj"], x)
    x = x + positions(rows, columns, x.shape[1])
    condition = linear(params["time_embed"]["fc2"], silu(linear(params["time_embed"]["fc1"], time_features(float(t)))))
    condition = silu(condition + params["label_embed"]["embedding"][y])

    stack = params["trunk"]["blocks"]
    for layer in range(len(stack["modulation"]["linear"]["kernel"])):
        block = pick(stack, layer)
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(block["modulation"]["linear"], condition), 6)
        mixed = attend(block["mixer"], norm(block, "norm1", x) * (1 + scale1) + shift1, heads, (rows, columns), rope)
        x = x + gate1 * mixed
        x = x + gate2 * feed_forward(block["mlp"], norm(block, "norm2", x) * (1 + scale2) + shift2, swiglu)

    shift, scale = np.split(linear(params["final"]["modulation"]["linear"], condition), 2)
    x = linear(params["final"]["linear"], norm(params["final"], "norm", x) * (1 + scale) + shift)
    output = np.zeros((*image.shape[:2], x.shape[1] // patch**2))
    for place, token in zip(cut, x, strict=True):
        output[place] = token.reshape(patch, patch, -1)
    return output


def pick(tree, layer):
    return {name: pick(leaf, layer) if isinstance(leaf, dict) else leaf[layer] for name, leaf in tree.items()}
