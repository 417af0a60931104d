"""The truth of the depthwise convolution: a loop in float64."""

import numpy as np


def loop(x, kernel, bias, cotangent):
    """(y, cotangents of x, kernel and bias), one tap of one pixel at a time."""
    height, width = x.shape[1:3]
    rows, columns = kernel.shape[:2]
    y = np.zeros(x.shape) + bias
    by_x, by_kernel = np.zeros(x.shape), np.zeros(kernel.shape)
    for i in range(height):
        for j in range(width):
            for m in range(rows):
                for n in range(columns):
                    r, c = i + m - rows // 2, j + n - columns // 2
                    if 0 <= r < height and 0 <= c < width:
                        y[:, i, j] += kernel[m, n] * x[:, r, c]
                        by_x[:, r, c] += kernel[m, n] * cotangent[:, i, j]
                        by_kernel[m, n] += (cotangent[:, i, j] * x[:, r, c]).sum(0)
    return y, by_x, by_kernel, cotangent.sum((0, 1, 2))


def inputs(size, kernel):
    rng = np.random.default_rng(0)
    return rng.normal(size=size), rng.normal(size=kernel), rng.normal(size=size[3:]), rng.normal(size=size)


def squared_relu_loop(x, kernel, bias, cotangent):
    """The same of y * relu(y)."""
    positive = np.maximum(loop(x, kernel, bias, cotangent)[0], 0)
    return positive**2, *loop(x, kernel, bias, 2 * positive * cotangent)[1:]
