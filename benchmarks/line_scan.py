"""Times the operator against a vectorised line loop, and the depthwise convolution against XLA's grouped one.

    python benchmarks/line_scan.py [--backend scan] [--repeats 10] [--out results.json]

The line loop is what a short program in another library does: one direction after the other, a Python loop over lines,
each line vectorised over batch, positions and channels. It runs in PyTorch with autograd where PyTorch is installed
(on the GPU if JAX has one), else in NumPy with the adjoint loop. Both sides take turns in one process, and each gets
the best of `--repeats` runs; "gradients" times forward and backward together. A ratio above 1: this project is faster.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gspn_jax.kernels import available_backends, depthwise_conv, propagate

CASES = [
    # batch, height, width, channels, groups, chunk
    (8, 16, 16, 256, 256, None),
    (8, 16, 16, 256, 256, 2),
    (8, 16, 16, 256, 1, None),
    (2, 64, 64, 64, 64, None),
    (2, 32, 64, 64, 8, None),
]
CONVOLUTIONS = [
    # batch, height, width, channels, kernel size
    (8, 16, 16, 256, 7),
    (8, 16, 16, 256, 3),
    (64, 8, 8, 64, 7),
]


def best_ms(runs: list[Callable[[], None]], repeats: int) -> list[float]:
    """The shortest of `repeats` timed runs of each in milliseconds, taken in turns, after one that is not timed."""
    times = []
    for _ in range(repeats + 1):
        times.append([])
        for run in runs:
            start = time.perf_counter()
            run()
            times[-1].append(time.perf_counter() - start)
    return [min(column) * 1e3 for column in zip(*times[1:], strict=True)]


def random_inputs(batch, height, width, channels, groups) -> list[np.ndarray]:
    """x, gates, lam, out_gate, merge."""
    rng = np.random.default_rng(0)
    shapes = ((channels,), (4, 3, groups), (4, channels), (4, channels))
    arrays = [rng.standard_normal((batch, height, width, *shape), dtype=np.float32) for shape in shapes]
    return [*arrays, np.ones(4, np.float32)]


def jax_runs(function: Callable, arrays: list[np.ndarray]) -> tuple[Callable, Callable]:
    """(forward, forward and backward) of a jitted function."""
    arrays = [jnp.asarray(array) for array in arrays]
    forward = jax.jit(function)
    backward = jax.jit(jax.grad(lambda *a: (function(*a) ** 2).sum(), argnums=tuple(range(len(arrays)))))
    return lambda: jax.block_until_ready(forward(*arrays)), lambda: jax.block_until_ready(backward(*arrays))


def torch_runs(arrays: list[np.ndarray], chunk: int | None) -> tuple[Callable, Callable]:
    import torch
    from torch.nn.functional import pad

    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    tensors = [torch.from_numpy(array).to(device).requires_grad_() for array in arrays]
    channels = arrays[0].shape[3]

    def forward():
        x, gates, lam, out_gate, merge = tensors
        y = 0
        for k in range(4):

            def turn(a, k=k):  # lines first, in the order of the scan
                a = a.movedim(1 if k < 2 else 2, 0)
                return a.flip(0) if k % 2 else a

            drive, sigmoids = turn(lam[..., k, :] * x), torch.sigmoid(turn(gates[..., k, :, :]))
            exists = torch.ones(sigmoids.shape[2], 3, 1, device=device)
            exists[0, 0] = exists[-1, 2] = 0
            weights = sigmoids * exists
            weights = weights / weights.sum(-2, keepdim=True)
            weights = weights.unsqueeze(-1).expand(*weights.shape, channels // weights.shape[-1]).flatten(-2)
            lines = []
            for t, line in enumerate(drive):
                if t and not (chunk and t % chunk == 0):
                    h = pad(lines[-1], (0, 0, 1, 1))
                    left, center, right = weights[t].unbind(-2)
                    line = line + left * h[:, :-2] + center * h[:, 1:-1] + right * h[:, 2:]
                lines.append(line)
            h = torch.stack(lines)
            h = (h.flip(0) if k % 2 else h).movedim(0, 1 if k < 2 else 2)
            y = y + merge[k] * out_gate[..., k, :] * h
        return y

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def run_forward():
        with torch.no_grad():
            forward()
        wait()

    def run_backward():
        torch.autograd.grad((forward() ** 2).sum(), tensors)
        wait()

    return run_forward, run_backward


def numpy_runs(arrays: list[np.ndarray], chunk: int | None) -> tuple[Callable, Callable]:
    x, gates, lam, out_gate, merge = arrays
    channels, groups = x.shape[3], gates.shape[5]

    def shift(line, offset):
        shifted = np.zeros_like(line)
        if offset == 1:
            shifted[:, 1:] = line[:, :-1]
        else:
            shifted[:, :-1] = line[:, 1:]
        return shifted

    def scans():
        """For each direction (turned arrays and states; all views or copies with the lines first)."""
        for k in range(4):

            def turn(a, k=k):
                return np.moveaxis(a, 1 if k < 2 else 2, 0)[:: -1 if k % 2 else 1]

            sigmoids = 1 / (1 + np.exp(-turn(gates[..., k, :, :])))
            weights = sigmoids.copy()
            weights[:, :, 0, 0] = weights[:, :, -1, 2] = 0
            weights /= weights.sum(-2, keepdims=True)
            spread = np.repeat(weights, channels // groups, axis=-1)
            h = turn(lam[..., k, :]) * turn(x)
            for t in range(1, len(h)):
                if not (chunk and t % chunk == 0):
                    left, center, right = (spread[t, :, :, j] for j in range(3))
                    h[t] += left * shift(h[t - 1], 1) + center * h[t - 1] + right * shift(h[t - 1], -1)
            yield k, turn, sigmoids, weights, spread, h

    def forward():
        y = np.zeros_like(x)
        for k, turn, *_, h in scans():
            out = turn(y)
            out += merge[k] * turn(out_gate[..., k, :]) * h
        return y

    def backward():
        by_x, by_gates, by_lam, by_out = (np.zeros_like(a) for a in (x, gates, lam, out_gate))
        by_merge = np.zeros_like(merge)
        by_y = 2 * forward()
        for k, turn, sigmoids, weights, spread, h in scans():
            u, g = turn(out_gate[..., k, :]), turn(by_y)
            turn(by_out[..., k, :])[:] = merge[k] * h * g
            by_merge[k] = (u * h * g).sum()
            by_h, by_weights = merge[k] * u * g, np.zeros_like(weights)
            for t in range(len(h) - 1, 0, -1):
                if not (chunk and t % chunk == 0):
                    left, center, right = (spread[t, :, :, j] for j in range(3))
                    by_h[t - 1] += shift(left * by_h[t], -1) + center * by_h[t] + shift(right * by_h[t], 1)
                    for j, neighbour in enumerate((shift(h[t - 1], 1), h[t - 1], shift(h[t - 1], -1))):
                        product = by_h[t] * neighbour
                        by_weights[t, :, :, j] = product.reshape(*product.shape[:2], groups, -1).sum(-1)
            mean = (weights * by_weights).sum(-2, keepdims=True)
            turn(by_gates[..., k, :, :])[:] = weights * (1 - sigmoids) * (by_weights - mean)
            turn(by_lam[..., k, :])[:] = by_h * turn(x)
            out = turn(by_x)
            out += by_h * turn(lam[..., k, :])
        return by_x, by_gates, by_lam, by_out, by_merge

    return lambda: forward(), lambda: backward()


def grouped_convolution(x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        feature_group_count=x.shape[3],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def compare(name: str, ours: tuple, theirs: tuple, against: str, repeats: int) -> list[dict]:
    rows = []
    for what, *runs in zip(("forward", "gradients"), ours, theirs, strict=True):
        ours_ms, other_ms = best_ms(runs, repeats)
        rows.append(
            {
                "case": name,
                "pass": what,
                "ms": round(ours_ms, 3),
                "against": against,
                "against_ms": round(other_ms, 3),
                "ratio": round(other_ms / ours_ms, 2),
            }
        )
        print(f"{name:44s} {what:10s} {ours_ms:9.2f} {other_ms:9.2f} {other_ms / ours_ms:7.1f}x  {against}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default=None, choices=available_backends(), help="default: the best available")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    args = parser.parse_args()

    with_torch = importlib.util.find_spec("torch") is not None
    print(f"{'':44s} {'':10s} {'ms':>9s} {'other':>9s} {'ratio':>8s}")
    rows = []
    for *shape, chunk in CASES:
        arrays = random_inputs(*shape)
        name = "propagate " + "x".join(map(str, shape[:4])) + f" G={shape[4]} chunk={chunk}"
        ours = jax_runs(lambda *a, chunk=chunk: propagate(*a, chunk=chunk, backend=args.backend), arrays)
        theirs = torch_runs(arrays, chunk) if with_torch else numpy_runs(arrays, chunk)
        rows += compare(name, ours, theirs, "PyTorch line loop" if with_torch else "NumPy line loop", args.repeats)
    for *shape, size in CONVOLUTIONS:
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(s, dtype=np.float32) for s in (shape, (size, size, shape[3]))]
        name = "depthwise_conv " + "x".join(map(str, shape)) + f" {size}x{size}"
        rows += compare(
            name,
            jax_runs(depthwise_conv, arrays),
            jax_runs(grouped_convolution, arrays),
            "XLA grouped convolution",
            args.repeats,
        )

    if args.out:
        record = {
            "date": datetime.date.today().isoformat(),
            "device": jax.devices()[0].device_kind,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "jax": jax.__version__,
            "against": f"torch {importlib.metadata.version('torch')}" if with_torch else f"numpy {np.__version__}",
            "backend": args.backend or available_backends()[0],
            "repeats": args.repeats,
            "results": rows,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
