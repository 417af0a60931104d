"""The GPU kernel on a GPU: first correctness against float64, then how near it comes to the speed of memory.

    python benchmarks/gpu_operator.py [--repeats 20] [--quick] [--out benchmarks/results/operator_gpu.json]

Five tables: (1) errors of values and gradients against a float64 line loop in NumPy; nothing is timed if one is too
large. (2) Forward and backward at three shapes: milliseconds, share of the device's own copy bandwidth (each input read
once, each output written once; the backward pass also reads what the forward pass saved), and the ratio to the scan
backend compiled by XLA. (3) The operator and cuDNN attention at equal tokens and width, 256 to 65,536 tokens.
(4) Depthwise convolutions: XLA's grouped one against the sum of shifted products.
(5) Terms of low rank: the kernel that expands the proxy by itself against XLA's product and the plain kernel.

Both sides of a ratio run in turns in this process; times are the best of `--repeats` of a jitted call. With another
device than an NVIDIA GPU of compute capability 9.0 the script stops with a sentence.
"""

import argparse
import datetime
import json
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "kernels"))

import numpy_scan as truth

from kernels import available_backends, depthwise_conv, propagate, propagate_low_rank
from kernels.depthwise import _grouped, _shifted_products

CORRECT = [
    # batch, height, width, channels, groups, skip, chunk
    (2, 16, 16, 96, 96, False, None),
    (2, 16, 16, 100, 100, True, 2),
    (1, 32, 32, 64, 64, False, None),
    (1, 64, 64, 64, 64, False, None),
    (1, 20, 12, 72, 8, True, 3),
    (1, 128, 128, 8, 1, False, None),
]
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
BANDWIDTH = [(64, 16, 16, 1536, None), (64, 16, 16, 1500, 2), (32, 32, 32, 1152, None), (8, 64, 64, 1152, None),
             (16, 1024, 1024, 8, None)]
TOKENS = [(32, 16), (32, 32), (8, 64), (2, 128), (1, 256)]
CONVOLUTIONS = [(64, 16, 16, 1500, 7), (64, 16, 16, 1500, 3), (16, 32, 32, 1200, 7)]
WIDTH, HEADS = 1152, 16
LOW_RANK = [(32, 16, 1500, 93), (32, 16, 1536, 96), (8, 32, 1200, 75), (4, 64, 1152, 72)]


def random_inputs(batch, height, width, channels, groups, skip, dtype) -> tuple:
    """x, gates, lam, out_gate, merge, skip; made on the device."""
    pixels = (batch, height, width)
    shapes = [(*pixels, channels), (*pixels, 4, 3, groups), (*pixels, 4, channels), (*pixels, 4, channels)]
    shapes += [(*pixels, 4, channels)] * skip
    arrays = [jax.random.normal(jax.random.key(n), shape, dtype) for n, shape in enumerate(shapes)]
    return *arrays[:4], jnp.full((4,), 0.25), arrays[4] if skip else None


def operator(backend: str | None, chunk: int | None = None) -> Callable:
    return lambda x, gates, lam, out_gate, merge, skip: propagate(
        x, gates, lam, out_gate, merge, skip=skip, chunk=chunk, backend=backend)


def passes(function: Callable, arrays: tuple) -> dict[str, Callable]:
    """Jitted forward pass, and backward pass alone, from saved residuals."""
    forward = jax.jit(function)
    y, pull = jax.jit(lambda *a: jax.vjp(function, *a))(*arrays)
    backward = jax.jit(lambda pull, y: pull(y))
    return {"forward": lambda: forward(*arrays), "backward": lambda: backward(pull, y)}


def best_seconds(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """The shortest run of each, taken in turns after two that are not timed."""
    times = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: min(values[2:]) for name, values in times.items()}


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second, read and written, of a device copy of 1 GiB."""
    array = jnp.ones(2**28, jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    return 2 * array.nbytes / best_seconds({"copy": lambda: copy(array)}, repeats)["copy"]


def needed_bytes(arrays: tuple) -> dict[str, int]:
    """Each input read once and each output written once."""
    x, *rest = (a for a in arrays if a is not None)
    inputs = x.nbytes + sum(a.nbytes for a in rest)
    return {"forward": inputs + x.nbytes, "backward": inputs + x.nbytes + inputs}


def low_rank_inputs(batch: int, size: int, channels: int, rank: int) -> tuple:
    """x, proxy, gates, lam, out_gate, merge."""
    shapes = [(batch, size, size, channels), (batch, size, size, rank), (rank, 4, 3, channels), (rank, 4, channels),
              (rank, 4, channels)]
    arrays = [jax.random.normal(jax.random.key(n), shape, jnp.bfloat16) for n, shape in enumerate(shapes)]
    return *arrays[:2], *(a * rank**-0.5 for a in arrays[2:]), jnp.full((4,), 0.25)


def expanded_by_xla(x, proxy, gates, lam, out_gate, merge):
    gates, lam, out_gate = (jnp.tensordot(proxy, factor, 1) for factor in (gates, lam, out_gate))
    return propagate(x, gates, 1 + lam, 1 + out_gate, merge, backend="mosaic_gpu")


def check_low_rank() -> list[dict]:
    """Values and gradients against float64, the gradients of the products by the chain rule."""
    rows = []
    for case in [(4, 16, 96, 24), (3, 16, 100, 93), (2, 32, 64, 32), (1, 64, 64, 16)]:
        arrays = low_rank_inputs(*case)
        y, pull = jax.jit(lambda *a: jax.vjp(lambda *a: propagate_low_rank(*a, backend="mosaic_gpu"), *a))(*arrays)
        cotangent = jax.random.normal(jax.random.key(9), y.shape, y.dtype)
        x, proxy, *factors, merge = (np.asarray(a, np.float64) for a in arrays)
        terms = [np.tensordot(proxy, factor, 1) + one for factor, one in zip(factors, (0, 1, 1), strict=True)]
        exact = (x, *terms, merge, None)
        by_x, *by_terms, by_merge = truth.propagate_gradients(*exact, None, np.asarray(cotangent, np.float64))[:5]
        flat = [(by.reshape(-1, factor[0].size), factor.reshape(len(factor), -1))
                for by, factor in zip(by_terms, factors, strict=True)]
        by_proxy = sum(by @ factor.T for by, factor in flat).reshape(proxy.shape)
        by_factors = [(proxy.reshape(-1, proxy.shape[-1]).T @ by).reshape(factor.shape)
                      for (by, _), factor in zip(flat, factors, strict=True)]
        expected = (truth.propagate(*exact, None), by_x, by_proxy, *by_factors, by_merge)
        error = max(truth.relative_error(a, b) for a, b in zip((y, *pull(cotangent)), expected, strict=True))
        rows.append({"shape": case, "low_rank": True, "largest_error": error, "correct": error < LIMITS["bfloat16"]})
        print(f"low rank {case!s:24s} error {error:.1e} {'ok' if rows[-1]['correct'] else 'WRONG'}", flush=True)
    return rows


def low_rank(repeats: int, quick: bool) -> list[dict]:
    rows = []
    for case in LOW_RANK[:1] if quick else LOW_RANK:
        arrays = low_rank_inputs(*case)
        ours = passes(lambda *a: propagate_low_rank(*a, backend="mosaic_gpu"), arrays)
        theirs = passes(expanded_by_xla, arrays)
        for which in ours:
            seconds = best_seconds({"kernel": ours[which], "xla": theirs[which]}, repeats)
            rows.append({"shape": case, "pass": which, "ms": seconds["kernel"] * 1e3,
                         "expanded_by_xla_ms": seconds["xla"] * 1e3, "ratio": seconds["xla"] / seconds["kernel"]})
            print(f"low rank {case} {which:8s} {seconds['kernel'] * 1e3:8.3f} ms, expanded by XLA "
                  f"{seconds['xla'] * 1e3:8.3f} ms, {rows[-1]['ratio']:5.2f}x", flush=True)
    return rows


def check(quick: bool) -> list[dict]:
    rows = []
    for *shape, skip, chunk in CORRECT[:3] if quick else CORRECT:
        for dtype in (jnp.float32, jnp.bfloat16):
            arrays = random_inputs(*shape, skip, dtype)
            y, pull = jax.jit(lambda *a, chunk=chunk: jax.vjp(operator("mosaic_gpu", chunk), *a))(*arrays)
            cotangent = jax.random.normal(jax.random.key(9), y.shape, y.dtype)
            found = (y, *pull(cotangent))
            exact = [None if a is None else np.asarray(a, np.float64) for a in arrays]
            expected = (truth.propagate(*exact, chunk),
                        *truth.propagate_gradients(*exact, chunk, np.asarray(cotangent, np.float64)))
            errors = [truth.relative_error(a, b) for a, b in zip(found, expected, strict=False) if a is not None]
            name = jnp.dtype(dtype).name
            rows.append({"shape": shape, "skip": skip, "chunk": chunk, "dtype": name, "largest_error": max(errors),
                         "correct": max(errors) < LIMITS[name]})
            print(f"{shape!s:32s} skip={skip!s:5s} chunk={chunk!s:4s} {name:9s} error {max(errors):.1e} "
                  f"{'ok' if rows[-1]['correct'] else 'WRONG'}", flush=True)
    return rows


def against_memory(bandwidth: float, repeats: int, quick: bool) -> list[dict]:
    rows = []
    for batch, height, width, channels, chunk in BANDWIDTH[:2] if quick else BANDWIDTH:
        arrays = random_inputs(batch, height, width, channels, channels, False, jnp.bfloat16)
        kernel, scan = (passes(operator(backend, chunk), arrays) for backend in ("mosaic_gpu", "scan"))
        for which, needed in needed_bytes(arrays).items():
            seconds = best_seconds({"kernel": kernel[which], "scan": scan[which]}, repeats)
            share = needed / seconds["kernel"] / bandwidth
            rows.append({"shape": [batch, height, width, channels], "chunk": chunk, "pass": which,
                         "ms": seconds["kernel"] * 1e3, "share_of_copy": share, "scan_ms": seconds["scan"] * 1e3,
                         "ratio": seconds["scan"] / seconds["kernel"]})
            print(f"{batch}x{height}x{width}x{channels} chunk={chunk} {which:8s} {seconds['kernel'] * 1e3:8.3f} ms "
                  f"{share:6.1%} of copy  {rows[-1]['ratio']:6.1f}x the scan", flush=True)
    return rows


def against_attention(repeats: int, quick: bool) -> list[dict]:
    rows = []
    for batch, side in TOKENS[:2] if quick else TOKENS:
        arrays = random_inputs(batch, side, side, WIDTH, WIDTH, False, jnp.bfloat16)
        qkv = jax.random.normal(jax.random.key(5), (3, batch, side * side, HEADS, WIDTH // HEADS), jnp.bfloat16)

        def attention(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

        ours, theirs = passes(operator("mosaic_gpu"), arrays), passes(attention, tuple(qkv))
        for which in ours:
            seconds = best_seconds({"kernel": ours[which], "attention": theirs[which]}, repeats)
            rows.append({"tokens": side * side, "batch": batch, "width": WIDTH, "pass": which,
                         "ms": seconds["kernel"] * 1e3, "attention_ms": seconds["attention"] * 1e3,
                         "ratio": seconds["attention"] / seconds["kernel"]})
            print(f"{side * side:6d} tokens {which:8s} {seconds['kernel'] * 1e3:8.3f} ms, attention "
                  f"{seconds['attention'] * 1e3:8.3f} ms, {rows[-1]['ratio']:5.2f}x", flush=True)
    return rows


def convolutions(repeats: int) -> list[dict]:
    rows = []
    for *shape, size in CONVOLUTIONS:
        x = jax.random.normal(jax.random.key(0), tuple(shape), jnp.bfloat16)
        kernel = jax.random.normal(jax.random.key(1), (size, size, shape[3]), jnp.bfloat16)
        names = {"ours": lambda x, k: depthwise_conv(x, k, None), "grouped": _grouped, "shifted": _shifted_products}
        runs = {name: passes(function, (x, kernel)) for name, function in names.items()}
        for which in ("forward", "backward"):
            seconds = best_seconds({name: run[which] for name, run in runs.items()}, repeats)
            rows.append({"shape": shape, "kernel": size, "pass": which,
                         **{f"{name}_ms": value * 1e3 for name, value in seconds.items()}})
            print(f"{shape} {size}x{size} {which:8s} " +
                  ", ".join(f"{name} {value * 1e3:.3f} ms" for name, value in seconds.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a few cases of each table")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    args = parser.parse_args()
    if "mosaic_gpu" not in available_backends():
        sys.exit("gpu_operator.py needs an NVIDIA GPU of compute capability 9.0 or newer, found "
                 f"{jax.devices()[0].device_kind!r}.")

    record = {"date": datetime.date.today().isoformat(), "device": jax.devices()[0].device_kind,
              "jax": jax.__version__, "correctness": check(args.quick) + check_low_rank()}
    if not all(row["correct"] for row in record["correctness"]):
        sys.exit("The kernel is wrong on this device: nothing was timed.")
    record["copy_bytes_per_second"] = copy_bandwidth(args.repeats)
    print(f"copy {record['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    record["operator"] = against_memory(record["copy_bytes_per_second"], args.repeats, args.quick)
    record["attention"] = against_attention(args.repeats, args.quick)
    record["low_rank"] = low_rank(args.repeats, args.quick)
    record["convolutions"] = convolutions(args.repeats)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
