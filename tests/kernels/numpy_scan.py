"""The operator once more in float64 NumPy, pixel by pixel, with gradients as reverse loops: the truth in tests."""

import numpy as np

DIRECTIONS = ("down", "up", "right", "left")


def pixel(direction, t, i, height, width):
    """(row, column) of position i on the t-th line that a scan visits."""
    return {"down": (t, i), "up": (height - 1 - t, i), "right": (i, t), "left": (i, width - 1 - t)}[direction]


def visits(x, direction, chunk):
    """Yields (pixel, [(which weight, neighbouring pixel on the line before)]) in the order of a scan."""
    height, width = x.shape[1:3]
    lines, length = (height, width) if direction in ("down", "up") else (width, height)
    for t in range(lines):
        starts = t == 0 or (chunk is not None and t % chunk == 0)
        for i in range(length):
            neighbours = [] if starts else [(j, i + j - 1) for j in range(3) if 0 <= i + j - 1 < length]
            yield (
                pixel(direction, t, i, height, width),
                [(j, pixel(direction, t - 1, n, height, width)) for j, n in neighbours],
            )


def line_scan(x, left, center, right, direction, chunk=None):
    weights = spread(np.stack([left, center, right]), x.shape[3])
    h = np.zeros(x.shape)
    for (row, column), neighbours in visits(x, direction, chunk):
        h[:, row, column] = x[:, row, column]
        for j, (r, c) in neighbours:
            h[:, row, column] += weights[j, :, row, column] * h[:, r, c]
    return h


def line_scan_gradients(x, left, center, right, direction, chunk, cotangent):
    """Cotangents of (x, left, center, right)."""
    groups = left.shape[3]
    weights = spread(np.stack([left, center, right]), x.shape[3])
    h = line_scan(x, left, center, right, direction, chunk)
    by_h, by_weights = cotangent.copy(), np.zeros(weights.shape)
    for (row, column), neighbours in reversed(list(visits(x, direction, chunk))):
        for j, (r, c) in neighbours:
            by_weights[j, :, row, column] = by_h[:, row, column] * h[:, r, c]
            by_h[:, r, c] += weights[j, :, row, column] * by_h[:, row, column]
    return (by_h, *by_weights.reshape(*by_weights.shape[:-1], groups, -1).sum(-1))


def spread(weights, channels):
    return np.repeat(weights, channels // weights.shape[-1], axis=-1)


def stochastic_weights(gates, direction):
    """[B, H, W, 3, G] -> three [B, H, W, G], and the Jacobian [j, i, B, H, W, G] of weight j by logit i."""
    sigmoids = np.moveaxis(1 / (1 + np.exp(-gates)), 3, 0)
    slopes = sigmoids * (1 - sigmoids)
    first, last = (np.s_[:, :, 0], np.s_[:, :, -1]) if direction in ("down", "up") else (np.s_[:, 0], np.s_[:, -1])
    for array in (sigmoids, slopes):
        array[0][first] = 0
        array[2][last] = 0
    total = sigmoids.sum(0)
    jacobian = (np.einsum("ji,...->ji...", np.eye(3), total) - sigmoids[:, None]) / total**2 * slopes[None]
    return sigmoids / total, jacobian


def propagate(x, gates, lam, out_gate, merge, skip=None, chunk=None):
    y = np.zeros(x.shape)
    for k, direction in enumerate(DIRECTIONS):
        weights, _ = stochastic_weights(gates[:, :, :, k], direction)
        y += merge[k] * out_gate[:, :, :, k] * line_scan(lam[:, :, :, k] * x, *weights, direction, chunk)
        if skip is not None:
            y += merge[k] * skip[:, :, :, k] * x
    return y


def propagate_gradients(x, gates, lam, out_gate, merge, skip, chunk, cotangent):
    """Cotangents of (x, gates, lam, out_gate, merge, skip)."""
    by_x, by_gates, by_lam, by_out, by_skip = (np.zeros(a.shape) for a in (x, gates, lam, out_gate, lam))
    by_merge = np.zeros(merge.shape)
    reduce = (lambda a: a.sum()) if merge.ndim == 1 else (lambda a: a.sum((0, 1, 2)))
    for k, direction in enumerate(DIRECTIONS):
        at = np.s_[:, :, :, k]
        weights, jacobian = stochastic_weights(gates[at], direction)
        drive = lam[at] * x
        h = line_scan(drive, *weights, direction, chunk)
        by_drive, *by_weights = line_scan_gradients(
            drive, *weights, direction, chunk, merge[k] * out_gate[at] * cotangent
        )
        by_gates[at] = np.einsum("j...,ji...->...i", np.stack(by_weights), jacobian).swapaxes(-1, -2)
        by_lam[at], by_x = by_drive * x, by_x + by_drive * lam[at]
        by_out[at] = merge[k] * h * cotangent
        by_merge[k] = reduce(out_gate[at] * h * cotangent)
        if skip is not None:
            by_skip[at] = merge[k] * x * cotangent
            by_x = by_x + merge[k] * skip[at] * cotangent
            by_merge[k] += reduce(skip[at] * x * cotangent)
    return by_x, by_gates, by_lam, by_out, by_merge, by_skip


def relative_error(found, expected):
    """Largest difference over the largest expected magnitude."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape and np.isfinite(found).all()
    scale = np.abs(expected).max()
    return np.abs(found - expected).max() / (scale if scale > 0 else 1.0)
