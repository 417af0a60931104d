"""The GPU kernel on a GPU: first correctness against float64, then how near it comes to the speed of memory.

    python benchmarks/gpu_operator.py --out benchmarks/results/operator_gpu.json [--quick] [--tables operator ...]

Six tables: (1) errors of values and gradients against a float64 line loop in NumPy; nothing is timed if one is too
large. (2) Forward and backward: milliseconds, share of the device's own copy bandwidth (each input read once, each
output written once), and the ratio to the scan backend compiled by XLA; overlapping slabs, maps that are filled up and
weights that are spread over channels have rows of their own, which is what they cost. (3) The operator and
attention at equal tokens and width, 256 to 65,536 tokens, and where the lines cross; only cuDNN's flash attention is
compared with. (4) Depthwise convolutions: XLA's
grouped one against the sum of shifted products. (5) Terms of low rank: the kernel that expands the proxy by itself
against XLA's product and the plain kernel, alone and (6) within the mixer of a GSPN block.

Both sides of a ratio run in turns in this process; times are the best of `--repeats` of ten calls in a row. With
another device than an NVIDIA GPU of compute capability 9.0 the script stops with a sentence.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "kernels"))

import numpy_scan as truth

from gspn_jax import models
from gspn_jax.config import ModelConfig
from gspn_jax.models import attention
from gspn_jax.models.mixers import GSPNMixer
from kernels import api, available_backends, depthwise, propagate, propagate_low_rank

CORRECT = [
    # batch, height, width, channels, groups, skip, chunk
    (2, 16, 16, 96, 96, False, None),
    (2, 16, 16, 100, 100, True, 2),
    (2, 16, 16, 100, 1, False, None),
    (1, 32, 32, 64, 64, False, None),
    (1, 64, 64, 64, 64, False, None),
    (1, 20, 12, 72, 8, True, 3),
    (1, 128, 128, 8, 1, False, None),
]
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
CORRECT_LOW_RANK = [(4, 16, 96, 24), (3, 16, 100, 93), (2, 32, 64, 32), (1, 64, 64, 16)]
"""batch, side, channels, rank"""
BANDWIDTH = [
    # batch, height, width, channels, groups, chunk
    (64, 16, 16, 1536, 1536, None),
    (32, 32, 32, 1152, 1152, None),
    (16, 1024, 1024, 8, 8, None),
    (64, 16, 16, 1500, 1500, None),  # the last slab of 64 channels overlaps the one before it
    (64, 16, 16, 1536, 1536, 2),
    (8, 64, 64, 1152, 1152, None),
    (64, 14, 18, 1536, 1536, None),  # filled up to 16 x 20
    (64, 16, 16, 1536, 96, None),  # weights of 16 channels, spread over them by XLA
    (64, 16, 16, 1536, 1, None),  # and of all, spread on chip
]
COPIED_VALUES = 2**28
CALLS = 10
TOKENS = [(32, 16), (32, 32), (8, 64), (2, 128), (1, 256)]
CONVOLUTIONS = [(64, 16, 16, 1500, 7), (64, 16, 16, 1500, 3), (16, 32, 32, 1200, 7)]
WIDTH, HEADS = 1152, 16
LOW_RANK = [(32, 16, 1500, 93), (32, 16, 1536, 96), (8, 32, 1200, 75), (4, 64, 1152, 72)]
BLOCKS = [("GSPN-XL/2", 32, 16), ("GSPN-L/2", 32, 16), ("GSPN-XL/2", 8, 32)]
"""preset, batch, side of the map of tokens"""


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
    """Jitted forward pass, backward pass alone from saved residuals, and both in one program; compiled when called."""
    def both(*arrays):
        y, pull = jax.vjp(function, *arrays)
        return y, pull(y)

    @functools.cache
    def saved():
        return jax.jit(lambda *a: jax.vjp(function, *a))(*arrays)

    backward = jax.jit(lambda y, pull: pull(y))
    return {"forward": functools.partial(jax.jit(function), *arrays), "backward": lambda: backward(*saved()),
            "both": functools.partial(jax.jit(both), *arrays)}


def best_seconds(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """The shortest of the repeats of each, taken in turns after two that are not timed.

    A repeat is CALLS calls in a row: the device works on one while the host sends for the next.
    """
    times = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                result = run()
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - start) / CALLS)
    return {name: min(values[2:]) for name, values in times.items()}


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second, read and written, of a device copy of 1 GiB."""
    array = jnp.ones(COPIED_VALUES, jnp.float32)
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


@contextlib.contextmanager
def xla_expands() -> Iterator[None]:
    """Proxies are expanded by XLA in what is traced inside."""
    before = api._BACKENDS["mosaic_gpu"]
    api._BACKENDS["mosaic_gpu"] = before._replace(propagate_low_rank=None)
    try:
        yield
    finally:
        api._BACKENDS["mosaic_gpu"] = before


def fused_against_unfused(what: str, function: Callable, arrays: tuple, repeats: int) -> list[dict]:
    """`function`, which calls `propagate_low_rank`, with the proxy expanded on chip and by XLA."""
    rows, fused = [], passes(function, arrays)
    unfused = passes(lambda *a: function(*a), arrays)  # its own function, and so its own trace
    for which in ("forward", "both"):
        with xla_expands():
            unfused[which]()
        seconds = best_seconds({"fused": fused[which], "unfused": unfused[which]}, repeats)
        ratio = seconds["unfused"] / seconds["fused"]
        rows.append({"what": what, "pass": which, "fused_ms": seconds["fused"] * 1e3,
                     "unfused_ms": seconds["unfused"] * 1e3, "ratio": ratio})
        print(f"{what} {which:8s} {seconds['fused'] * 1e3:8.3f} ms, expanded by XLA "
              f"{seconds['unfused'] * 1e3:8.3f} ms, {ratio:5.2f}x", flush=True)
    return rows


def low_rank(repeats: int, quick: bool) -> list[dict]:
    rows = []
    for case in LOW_RANK[:1] if quick else LOW_RANK:
        rows += fused_against_unfused(f"low rank {case}", lambda *a: propagate_low_rank(*a, backend="mosaic_gpu"),
                                      low_rank_inputs(*case), repeats)
    return rows


def blocks(repeats: int, quick: bool) -> list[dict]:
    """The mixer of a block: linear, depthwise 7x7, proxy, propagation, linear; gradients of its weights too."""
    rows = []
    for preset, batch, side in BLOCKS[:1] if quick else BLOCKS:
        arch = models.resolve(ModelConfig(preset=preset, backend="mosaic_gpu"))
        graphdef, params = nnx.split(GSPNMixer(arch, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        x = jax.random.normal(jax.random.key(0), (batch, side, side, arch.hidden), jnp.bfloat16)
        rows += fused_against_unfused(f"mixer of {preset}, {batch}x{side}x{side}",
                                      lambda x, params, graphdef=graphdef: nnx.merge(graphdef, params)(x),
                                      (x, params), repeats)
    return rows


def check_low_rank() -> list[dict]:
    """Values and gradients against float64, the gradients of the products by the chain rule."""
    rows = []
    for case in CORRECT_LOW_RANK:
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
        rows.append({"shape": case, "low_rank": True, "largest_error": error,
                     "correct": bool(error < LIMITS["bfloat16"])})
        print(f"low rank {case!s:24s} error {error:.1e} {'ok' if rows[-1]['correct'] else 'WRONG'}", flush=True)
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
                         "correct": bool(max(errors) < LIMITS[name])})
            print(f"{shape!s:32s} skip={skip!s:5s} chunk={chunk!s:4s} {name:9s} error {max(errors):.1e} "
                  f"{'ok' if rows[-1]['correct'] else 'WRONG'}", flush=True)
    return rows


def against_memory(repeats: int, quick: bool) -> list[dict]:
    rows = []
    for *shape, groups, chunk in BANDWIDTH[:3] if quick else BANDWIDTH:
        arrays = random_inputs(*shape, groups, False, jnp.bfloat16)
        kernel, scan = (passes(operator(backend, chunk), arrays) for backend in ("mosaic_gpu", "scan"))
        for which, needed in needed_bytes(arrays).items():
            seconds = best_seconds({"kernel": kernel[which], "scan": scan[which]}, repeats)
            rows.append({"shape": shape, "groups": groups, "chunk": chunk, "pass": which,
                         "ms": seconds["kernel"] * 1e3, "bytes": needed, "scan_ms": seconds["scan"] * 1e3,
                         "ratio": seconds["scan"] / seconds["kernel"]})
            print(f"{shape!s:22s} groups={groups} chunk={chunk} {which:8s} {seconds['kernel'] * 1e3:8.3f} ms "
                  f"{needed / seconds['kernel'] / 1e12:5.2f} TB/s  {rows[-1]['ratio']:6.1f}x the scan", flush=True)
    return rows


def against_attention(repeats: int, quick: bool) -> list[dict]:
    """The models' own attention; where that is not flash attention its time is recorded, and no ratio."""
    rows = []
    for batch, side in TOKENS[:2] if quick else TOKENS:
        arrays = random_inputs(batch, side, side, WIDTH, WIDTH, False, jnp.bfloat16)
        qkv = jax.random.normal(jax.random.key(5), (3, batch, side * side, HEADS, WIDTH // HEADS), jnp.bfloat16)
        choice = attention.choose(qkv.shape[1:], qkv.dtype)
        ours, theirs = passes(operator("mosaic_gpu"), arrays), passes(attention.attention, tuple(qkv))
        for which in ("forward", "backward"):
            seconds = best_seconds({"kernel": ours[which], "attention": theirs[which]}, repeats)
            ratio = seconds["attention"] / seconds["kernel"] if choice.fair else None
            rows.append({"tokens": side * side, "batch": batch, "width": WIDTH, "pass": which,
                         "ms": seconds["kernel"] * 1e3, "attention_ms": seconds["attention"] * 1e3,
                         "implementation": choice.implementation, "ratio": ratio})
            shown = f"{ratio:5.2f}x" if choice.fair else f"no ratio: cuDNN's flash attention {choice.reason}"
            print(f"{side * side:6d} tokens {which:8s} {seconds['kernel'] * 1e3:8.3f} ms, attention "
                  f"({choice.implementation}) {seconds['attention'] * 1e3:8.3f} ms, {shown}", flush=True)
    return rows


def crossing(rows: list[dict]) -> float | None:
    """The tokens from which the kernel is the faster one, on straight lines between logarithms; None for nowhere, or
    if a row has no ratio."""
    if any(row["ratio"] is None for row in rows):
        return None
    rows = sorted(rows, key=lambda row: row["tokens"])
    if rows[0]["ratio"] >= 1:
        return rows[0]["tokens"]
    for one, other in itertools.pairwise(rows):
        if one["ratio"] < 1 <= other["ratio"]:
            low, high = math.log(one["ratio"]), math.log(other["ratio"])
            return one["tokens"] * (other["tokens"] / one["tokens"]) ** (low / (low - high))
    return None


def convolutions(repeats: int, quick: bool) -> list[dict]:
    """XLA's grouped convolution and the sum of shifted products: forward, which is the gradient of x too, and the
    gradient of the kernel."""
    rows = []
    for *shape, size in CONVOLUTIONS[:1] if quick else CONVOLUTIONS:
        x, cotangent = (jax.random.normal(jax.random.key(n), tuple(shape), jnp.bfloat16) for n in range(2))
        kernel = jax.random.normal(jax.random.key(2), (size, size, shape[3]), jnp.bfloat16)
        for which, arrays, functions in (
            ("forward", (x, kernel), {"grouped": depthwise._grouped, "shifted": depthwise._shifted_products}),
            ("by_kernel", (x, kernel, cotangent.astype(jnp.float32)), {
                "grouped": lambda *a: depthwise._grouped_gradients(*a)[1],
                "shifted": lambda *a: depthwise._shifted_gradients(*a)[1]}),
        ):  # fmt: skip
            compiled = {name: jax.jit(function) for name, function in functions.items()}
            seconds = best_seconds({name: functools.partial(run, *arrays) for name, run in compiled.items()}, repeats)
            rows.append({"shape": shape, "kernel": size, "pass": which,
                         **{f"{name}_ms": value * 1e3 for name, value in seconds.items()}})
            print(f"{shape} {size}x{size} {which:9s} " +
                  ", ".join(f"{name} {value * 1e3:.3f} ms" for name, value in seconds.items()), flush=True)
    return rows


TABLES = {"operator": against_memory, "attention": against_attention, "low_rank": low_rank, "blocks": blocks,
          "convolutions": convolutions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a few cases of each table")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=[*TABLES], help="those to time; all by default")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results, written after each table")
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
    for name in args.tables:
        rows = record[name] = TABLES[name](args.repeats, args.quick)
        if name == "operator":
            for row in rows:
                row["share_of_copy"] = row["bytes"] / row["ms"] * 1e3 / record["copy_bytes_per_second"]
                print(f"{row['shape']} {row['pass']:8s} {row['share_of_copy']:6.1%} of copy")
        if name == "attention":
            record["as_fast_as_attention_from_tokens"] = {
                which: crossing([row for row in rows if row["pass"] == which]) for which in ("forward", "backward")}
            print("as fast as attention from tokens:", record["as_fast_as_attention_from_tokens"])
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
