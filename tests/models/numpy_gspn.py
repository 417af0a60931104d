"""The paper layout in float64 NumPy loops, written from arXiv 2501.12381 and the names of our parameters."""

import numpy as np

from tests.models.numpy_dit import layer_norm, silu, time_features

DIRECTIONS = ("down", "up", "right", "left")


def scan(x, logits, direction, chunk):
    """One direction, pixel by pixel: x [H, W, C], logits [H, W, 3, C] of the left, centre and right neighbour."""
    if direction == "up":
        return scan(x[::-1], logits[::-1], "down", chunk)[::-1]
    if direction in ("right", "left"):
        turned = scan(x.swapaxes(0, 1), logits.swapaxes(0, 1), {"right": "down", "left": "up"}[direction], chunk)
        return turned.swapaxes(0, 1)
    height, width, _ = x.shape
    h = np.array(x)
    for t in range(1, height):
        if chunk is not None and t % chunk == 0:
            continue
        for i in range(width):
            near = [n for n in (0, 1, 2) if 0 <= i + n - 1 < width]
            opened = {n: 1 / (1 + np.exp(-logits[t, i, n])) for n in near}
            for n in near:
                h[t, i] += opened[n] / sum(opened.values()) * h[t - 1, i + n - 1]
    return h


def depthwise(x, kernel):
    height, width, _ = x.shape
    half = kernel.shape[0] // 2
    y = np.zeros_like(x)
    for i, j, m, n in np.ndindex(height, width, *kernel.shape[:2]):
        if 0 <= i + m - half < height and 0 <= j + n - half < width:
            y[i, j] += kernel[m, n] * x[i + m - half, j + n - half]
    return y


def linear(p, x):
    return np.tensordot(x, p["kernel"], axes=(-1, 0)) + p.get("bias", 0.0)


def mix(p, x, chunk):
    x = depthwise(linear(p["in_proj"], x), p["conv"]["kernel"])
    return linear(p["out_proj"], propagate(p, x, linear(p["proxy"], x), chunk))


def propagate(p, x, proxy, chunk):
    gates, lam, out_gate = linear(p["gates"], proxy), 1 + linear(p["lam"], proxy), 1 + linear(p["out_gate"], proxy)
    channels = x.shape[-1]
    gates = np.repeat(gates, channels // gates.shape[-1], axis=-1)  # consecutive channels share a group
    y = np.zeros_like(x)
    for k, direction in enumerate(DIRECTIONS):
        h = scan(lam[:, :, k] * x, gates[:, :, 3 * k : 3 * k + 3], direction, chunk)
        y += p["merge"][k] * out_gate[:, :, k] * h
        if "skip" in p:
            y += p["merge"][k] * linear(p["skip"], proxy)[:, :, k] * x
    return y


def block(p, x, chunk):
    y = depthwise(mix(p["mixer"], layer_norm(x), chunk), p["conv"]["kernel"])
    return x + linear(p["out_proj"], y * np.maximum(y, 0))


def denoise(params, image, t, y, *, patch: int, chunks) -> np.ndarray:
    """One image [H, W, C] to [H, W, O]."""
    height, width, _ = image.shape
    rows, columns = height // patch, width // patch
    p = params
    condition = linear(p["time_embed"]["fc2"], silu(linear(p["time_embed"]["fc1"], time_features(float(t)))))
    condition = condition + p["label_embed"]["embedding"][y]
    x = np.zeros((rows, columns, condition.size))
    for r, c in np.ndindex(rows, columns):
        window = image[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
        x[r, c] = linear(p["patch_embed"]["proj"], window.ravel()) + condition

    def layer(stack, index):
        return {name: layer(value, index) if isinstance(value, dict) else value[index] for name, value in stack.items()}

    half = len(chunks) // 2
    earlier = []
    for i in range(half):
        x = block(layer(p["trunk"]["in_blocks"], i), x, chunks[i])
        earlier.append(x)
    x = block(layer(p["trunk"]["in_blocks"], half), x, chunks[half])
    for i in range(half):
        weights = layer(p["trunk"]["out_blocks"], i)
        x = linear(weights["join"], np.concatenate([x, earlier.pop()], axis=-1))
        x = block(weights, x, chunks[half + 1 + i])

    shift, scale = linear(p["final"]["modulation"]["linear"], silu(condition))
    x = linear(p["final"]["linear"], layer_norm(x) * (1 + scale) + shift)
    out_channels = x.shape[-1] // patch**2
    output = np.zeros((height, width, out_channels))
    for r, c in np.ndindex(rows, columns):
        output[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = x[r, c].reshape(patch, patch, out_channels)
    return output
