"""Coarse to fine again in float64 NumPy, as diffusers' Euler has its state: x = z0 + sigma noise, sigma up to 14.6."""

import math

import numpy as np


def levels(steps, kept):
    """(timesteps, sigmas with the 0 at the end) of the last `kept` of Euler's `steps`, leading, offset 1."""
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    alphas = np.cumprod(1 - betas)
    times = [i * (1000 // steps) + 1 for i in reversed(range(steps))][-kept:]
    return times, [math.sqrt((1 - alphas[t]) / alphas[t]) for t in times] + [0.0]


def refine(predict, z0, noise, steps, kept, *, kind="epsilon", ratio=2, sigma=1.0):
    """`predict(x as the network sees it, timestep, dilated)`; arrays [H, W, C]."""
    times, sigmas = levels(steps, kept)
    x = z0 + sigmas[0] * noise
    for t, now, then in zip(times, sigmas[:-1], sigmas[1:], strict=True):
        f = 0.5 * (1 + math.cos(math.pi * (1000 - t) / 1000))
        x = (1 - f**3) * x + f**3 * (z0 + now * noise)
        blurred = restored(blur(x, ratio, sigma * (0.99 * f + 0.01)), x)
        moved = []
        for seen, dilated in ((x, False), (blurred, True)):
            output = predict(seen / math.sqrt(now**2 + 1), t, dilated)
            if kind == "v_prediction":
                clean = x / (now**2 + 1) - output * now / math.sqrt(now**2 + 1)
                output = (x - clean) / now
            moved.append(x + (then - now) * output)
        x = (1 - f) * moved[0] + f * moved[1]
    return restored(x, z0)


def blur(x, ratio, sigma):
    """A square of (2 ratio - 1)^2 taps, tap by tap."""
    offsets = range(1 - ratio, ratio)
    kernel = np.array([[math.exp(-(i**2 + j**2) / (2 * sigma**2)) for j in offsets] for i in offsets])
    kernel /= kernel.sum()
    found = np.zeros_like(x)
    for i, j in np.ndindex(x.shape[:2]):
        for a, b in np.ndindex(kernel.shape):
            row, column = i + a - ratio + 1, j + b - ratio + 1
            if 0 <= row < x.shape[0] and 0 <= column < x.shape[1]:
                found[i, j] += kernel[a, b] * x[row, column]
    return found


def restored(x, like):
    return (x - x.mean((0, 1))) / x.std((0, 1), ddof=1) * like.std((0, 1), ddof=1) + like.mean((0, 1))
