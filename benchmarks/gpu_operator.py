"""The GPU kernel on a GPU: how near it comes to the speed of memory, and what runs beside it in a block.

    python benchmarks/gpu_operator.py --out benchmarks/results/operator_gpu.json [--quick] [--tables operator ...]

Values and gradients are checked first (gpu_values.py; `--values` names its result if it was made before); nothing
is timed if one is wrong, unless `--anyway` asks for it. Then seven tables: (1) copy: the device's own bandwidth.
(2) products: the matrix products of a block of GSPN-XL/2, 1500 wide, against 1536. (3) convolutions: depthwise 7x7
and 3x3 by cuDNN, as sums of shifted products and by our kernel, in float32 and bfloat16. (4) operator: forward and
backward, milliseconds, share of the copy's bandwidth (each input read once, each output written once) and, without
`--quick`, the ratio to the scan backend compiled by XLA; overlapping slabs, maps that are filled up and weights
that are spread over channels have rows of their own, which is what they cost. (5) low_rank: the kernel that expands
the proxy by itself against XLA's product and the plain kernel, alone, and (6) blocks: within the mixer of a GSPN
block. (7) attention at equal tokens and width, 256 to 65,536 tokens, and where the lines cross;
only cuDNN's flash attention is compared with.

All sides of a ratio run in turns in this process; times are the best of `--repeats` of up to ten calls in a row.
Results are written after each row, and a table that fails does not stop the next. With another device than an NVIDIA
GPU of compute capability 8.0 or newer the script stops with a sentence; `--rehearse` interprets small cases on a CPU.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from gpu_record import Record
from gpu_values import low_rank_inputs, random_inputs
from jax import lax
from rehearsal import rehearsal, require_kernel

from gspn_jax import models
from gspn_jax.config import ModelConfig
from gspn_jax.kernels import api, depthwise_conv, depthwise_gpu, mosaic_gpu, propagate, propagate_low_rank
from gspn_jax.models import attention
from gspn_jax.models.mixers import GSPNMixer, GSPNOptions

Rows = Iterator[dict]

ALL_RIGHT = "all right"

SECONDS_A_ROW, SECONDS_A_REPEAT = 4.0, 0.1
"""Of what is slow; of what is not, a row takes less."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed. `against_scan`: also by the scan backend, compiled by XLA."""

    copied_values: int = 2**28
    calls: int = 10
    untimed: int = 2
    """Repeats before those that are timed."""
    rows: int = 8192
    widths: tuple = (1500, 1536)
    convolutions: tuple = ((64, 16, 16, 1536, 7), (64, 16, 16, 1536, 3), (64, 16, 16, 1200, 7), (64, 16, 16, 1200, 3))
    """batch, height, width, channels, side of the kernel"""
    operator: tuple = (
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
    )
    against_scan: bool = True
    low_rank: tuple = (
        (32, 16, 1500, 93, None),
        (64, 16, 1536, 93, 2),
        (32, 16, 1536, 96, None),
        (8, 32, 1200, 75, None),
        (4, 64, 1152, 72, None),
        (128, 14, 576, 16, None),
        (128, 28, 288, 16, None),
    )
    """batch, side, channels, rank, chunk"""
    blocks: tuple = (("GSPN-XL/2", 32, 16), ("GSPN-L/2", 32, 16), ("GSPN-XL/2", 8, 32))
    """preset, batch, side of the map of tokens"""
    attention: tuple = ((32, 16), (32, 32), (8, 64), (2, 128), (1, 256))
    """batch, side of the map of tokens"""
    width: int = 1152
    heads: int = 16


FULL = Sizes()
QUICK = dataclasses.replace(
    FULL,
    convolutions=FULL.convolutions[::3],
    operator=FULL.operator[:2] + FULL.operator[3:5],
    against_scan=False,
    low_rank=(*FULL.low_rank[:2], FULL.low_rank[-2]),
    blocks=FULL.blocks[:1],
    attention=FULL.attention[:2],
)
TINY = Sizes(
    copied_values=2**10,
    calls=1,
    untimed=0,
    rows=16,
    widths=(12, 16),
    convolutions=((1, 4, 4, 128, 3),),
    operator=((1, 4, 4, 64, 4, None),),
    low_rank=((2, 4, 64, 24, None),),
    blocks=(("GSPN-S/2", 2, 4),),
    attention=((1, 2), (1, 4)),
    width=64,
    heads=1,
)
"""What takes seconds in the interpreter; the model of a block is made smaller too (`block_mixer`)."""


def operator(backend: str | None, chunk: int | None = None) -> Callable:
    return lambda x, gates, lam, out_gate, merge, skip: propagate(
        x, gates, lam, out_gate, merge, skip=skip, chunk=chunk, backend=backend
    )


def passes(function: Callable, arrays: tuple) -> dict[str, Callable]:
    """Jitted forward pass, backward pass alone from saved residuals, and both in one program; compiled when called."""

    def both(*arrays):
        y, pull = jax.vjp(function, *arrays)
        return y, pull(y)

    @functools.cache
    def saved():
        return jax.jit(lambda *a: jax.vjp(function, *a))(*arrays)

    backward = jax.jit(lambda y, pull: pull(y))
    return {
        "forward": functools.partial(jax.jit(function), *arrays),
        "backward": lambda: backward(*saved()),
        "both": functools.partial(jax.jit(both), *arrays),
    }


def best_seconds(runs: dict[str, Callable], repeats: int, sizes: Sizes) -> dict[str, float]:
    """The shortest of the repeats of each, taken in turns after some that are not timed.

    A repeat is `sizes.calls` calls in a row: the device works on one while the host sends for the next. What is slow
    gets fewer calls and repeats, so that it does not cost the rows after it.
    """
    calls = {name: fitting_calls(run, sizes) for name, run in runs.items()}
    times, begun = {name: [] for name in runs}, time.perf_counter()
    for done in range(repeats + sizes.untimed):
        if done > sizes.untimed and time.perf_counter() - begun > SECONDS_A_ROW:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                result = run()
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: min(values[sizes.untimed :]) for name, values in times.items()}


def fitting_calls(run: Callable, sizes: Sizes) -> int:
    """`sizes.calls`, or as many as take SECONDS_A_REPEAT; compiles."""
    if sizes.calls == 1:
        return 1
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    return max(1, min(sizes.calls, int(SECONDS_A_REPEAT / (time.perf_counter() - start))))


def needed_bytes(arrays: tuple) -> dict[str, int]:
    """Each input read once and each output written once."""
    x, *rest = (a for a in arrays if a is not None)
    inputs = x.nbytes + sum(a.nbytes for a in rest)
    return {"forward": inputs + x.nbytes, "backward": inputs + x.nbytes + inputs}


def copy(sizes: Sizes, repeats: int) -> Rows:
    """Bytes per second, read and written, of a device copy of 1 GiB."""
    array = jnp.ones(sizes.copied_values, jnp.float32)
    run = jax.jit(lambda a: a + 1)
    seconds = best_seconds({"copy": lambda: run(array)}, repeats, sizes)["copy"]
    yield {"bytes": 2 * array.nbytes, "ms": seconds * 1e3, "bytes_per_second": 2 * array.nbytes / seconds}


def products(sizes: Sizes, repeats: int) -> Rows:
    """x w and its two gradients in bfloat16, of rows that are a whole number of tensor core tiles and of such that are
    not; `padded_ratio` is how many times as fast the first product of the last width is, its padding for nothing."""
    first = None
    for width in sizes.widths:
        x, g = (jax.random.normal(jax.random.key(n), (sizes.rows, width), jnp.bfloat16) for n in range(2))
        w = jax.random.normal(jax.random.key(2), (width, width), jnp.bfloat16)
        runs = {
            "forward": functools.partial(jax.jit(lambda x, w: x @ w), x, w),
            "by_x": functools.partial(jax.jit(lambda g, w: g @ w.T), g, w),
            "by_w": functools.partial(jax.jit(lambda x, g: x.T @ g), x, g),
        }
        seconds = best_seconds(runs, repeats, sizes)
        flops = 2 * sizes.rows * width**2
        first = first or sum(seconds.values())
        yield {
            "shape": [sizes.rows, width, width],
            **{f"{name}_ms": value * 1e3 for name, value in seconds.items()},
            "tflops": 3 * flops / sum(seconds.values()) / 1e12,
            "padded_ratio": first / sum(seconds.values()),
        }


def grouped(x, kernel, result):
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        feature_group_count=x.shape[3],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=result,
    )


def shifts(x, kernel) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Each tap of the kernel and what it multiplies, in float32."""
    side, (height, width) = kernel.shape[0], x.shape[1:3]
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    for m, n in itertools.product(range(side), repeat=2):
        yield kernel[m, n].astype(jnp.float32), padded[:, m : m + height, n : n + width]


def shifted(x, kernel, result):
    return sum(tap * part for tap, part in shifts(x, kernel)).astype(result)


def shifted_by_kernel(x, kernel, cotangent):
    return jnp.stack([(part * cotangent.astype(jnp.float32)).sum((0, 1, 2)) for _, part in shifts(x, kernel)])


def convolutions(sizes: Sizes, repeats: int) -> Rows:
    """Forward, which is the gradient of x too, and the gradient of the kernel, for each type of x and of the result;
    our kernel gives that of x."""
    for *shape, side in sizes.convolutions:
        for dtype, result in ((jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
            x, cotangent = (jax.random.normal(jax.random.key(n), tuple(shape), dtype) for n in range(2))
            kernel = jax.random.normal(jax.random.key(2), (side, side, shape[3]), dtype)
            for which, functions in _convolutions(result, kernel, ours=dtype == result).items():
                last = kernel if which == "forward" else cotangent
                runs = {name: functools.partial(jax.jit(run), x, last) for name, run in functions.items()}
                seconds = best_seconds(runs, repeats, sizes)
                yield {
                    "shape": shape,
                    "kernel": side,
                    "dtype": jnp.dtype(dtype).name,
                    "result": jnp.dtype(result).name,
                    "pass": which,
                    **{f"{name}_ms": value * 1e3 for name, value in seconds.items()},
                    "ratio": seconds["grouped"] / seconds.get("kernel", seconds["shifted"]),
                }


def _convolutions(result, kernel, *, ours: bool) -> dict[str, dict[str, Callable]]:
    """The implementations of each pass, of x and the kernel or, for its gradient, x and the cotangent."""
    forward = {
        name: functools.partial(function, result=result)
        for name, function in (("grouped", grouped), ("shifted", shifted))
    }
    if not ours:
        return {"forward": forward}
    by_kernel = {
        "grouped": lambda x, g: jax.vjp(lambda kernel: grouped(x, kernel, result), kernel)[1](g),
        "shifted": lambda x, g: shifted_by_kernel(x, kernel, g),
        "kernel": lambda x, g: depthwise_gpu.kernel_gradient(x, g, kernel.shape[:2]),
    }
    return {"forward": forward | {"kernel": depthwise_conv}, "by_kernel": by_kernel}


def against_memory(sizes: Sizes, repeats: int) -> Rows:
    for *shape, groups, chunk in sizes.operator:
        arrays = random_inputs(*shape, groups, False, jnp.bfloat16)
        backends = ("mosaic_gpu", "scan") if sizes.against_scan else ("mosaic_gpu",)
        runs = {backend: passes(operator(backend, chunk), arrays) for backend in backends}
        for which, needed in needed_bytes(arrays).items():
            seconds = best_seconds({backend: run[which] for backend, run in runs.items()}, repeats, sizes)
            row = {
                "shape": shape,
                "groups": groups,
                "chunk": chunk,
                "pass": which,
                "ms": seconds["mosaic_gpu"] * 1e3,
                "bytes": needed,
            }
            if sizes.against_scan:
                row |= {"scan_ms": seconds["scan"] * 1e3, "ratio": seconds["scan"] / seconds["mosaic_gpu"]}
            yield row


@contextlib.contextmanager
def xla_expands() -> Iterator[None]:
    """Proxies are expanded by XLA in what is traced inside."""
    before = api._BACKENDS["mosaic_gpu"]
    api._BACKENDS["mosaic_gpu"] = before._replace(propagate_low_rank=None)
    try:
        yield
    finally:
        api._BACKENDS["mosaic_gpu"] = before


def fused_against_unfused(what: str, function: Callable, arrays: tuple, sizes: Sizes, repeats: int) -> Rows:
    """`function`, which calls `propagate_low_rank`, with the proxy expanded on chip and by XLA."""
    fused = passes(function, arrays)
    unfused = passes(lambda *a: function(*a), arrays)  # its own function, and so its own trace
    for which in ("forward", "both"):
        with xla_expands():
            unfused[which]()
        seconds = best_seconds({"fused": fused[which], "unfused": unfused[which]}, repeats, sizes)
        yield {
            "what": what,
            "pass": which,
            "fused_ms": seconds["fused"] * 1e3,
            "unfused_ms": seconds["unfused"] * 1e3,
            "ratio": seconds["unfused"] / seconds["fused"],
        }


def low_rank(sizes: Sizes, repeats: int) -> Rows:
    for *case, chunk in sizes.low_rank:

        def scans(*arrays, chunk=chunk):
            return propagate_low_rank(*arrays, chunk=chunk, backend="mosaic_gpu")

        what, arrays = f"low rank {tuple(case)}" + (f", chunk {chunk}" if chunk else ""), low_rank_inputs(*case)
        if mosaic_gpu.refuses_low_rank(*arrays[:2], 5, chunk):
            what += " (by XLA both times)"
        yield from fused_against_unfused(what, scans, arrays, sizes, repeats)


def block_mixer(preset: str, sizes: Sizes) -> tuple[GSPNMixer, int]:
    """The mixer of the preset's blocks, and its width."""
    arch = models.resolve(ModelConfig(preset=preset, backend="mosaic_gpu"))
    if sizes is TINY:
        options = GSPNOptions(groups=64, proxy=16, backend="mosaic_gpu")
        arch = dataclasses.replace(arch, hidden=64, options=options)
    return arch.options.build(arch.hidden, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), arch.hidden


def blocks(sizes: Sizes, repeats: int) -> Rows:
    """The mixer of a block: linear, depthwise 7x7, proxy, propagation, linear; gradients of its weights too."""
    for preset, batch, side in sizes.blocks:
        mixer, hidden = block_mixer(preset, sizes)
        graphdef, params = nnx.split(mixer)
        x = jax.random.normal(jax.random.key(0), (batch, side, side, hidden), jnp.bfloat16)
        yield from fused_against_unfused(
            f"mixer of {preset}, {batch}x{side}x{side}",
            lambda x, params, graphdef=graphdef: nnx.merge(graphdef, params)(x),
            (x, params),
            sizes,
            repeats,
        )


def against_attention(sizes: Sizes, repeats: int) -> Rows:
    """The models' own attention; where that is not flash attention its time is recorded, and no ratio."""
    for batch, side in sizes.attention:
        arrays = random_inputs(batch, side, side, sizes.width, sizes.width, False, jnp.bfloat16)
        qkv = jax.random.normal(
            jax.random.key(5), (3, batch, side * side, sizes.heads, sizes.width // sizes.heads), jnp.bfloat16
        )
        choice = attention.choose(qkv.shape[1:], qkv.dtype)
        ours, theirs = passes(operator("mosaic_gpu"), arrays), passes(attention.attention, tuple(qkv))
        for which in ("forward", "backward"):
            seconds = best_seconds({"kernel": ours[which], "attention": theirs[which]}, repeats, sizes)
            ratio = seconds["attention"] / seconds["kernel"] if choice.fair else None
            yield {
                "tokens": side * side,
                "batch": batch,
                "width": sizes.width,
                "pass": which,
                "ms": seconds["kernel"] * 1e3,
                "attention_ms": seconds["attention"] * 1e3,
                "implementation": choice.implementation,
                "reason": choice.reason,
                "ratio": ratio,
            }


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


TABLES = {
    "copy": copy,
    "products": products,
    "convolutions": convolutions,
    "operator": against_memory,
    "low_rank": low_rank,
    "attention": against_attention,
    "blocks": blocks,
}


def shown(row: dict) -> str:
    parts = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()]
    return ", ".join(parts)


def fill(name: str, sizes: Sizes, repeats: int, record: Record) -> None:
    """Fills the table of that name, row by row."""
    record[name] = rows = []
    for row in TABLES[name](sizes, repeats):
        if name == "operator" and record.get("copy"):
            row["share_of_copy"] = row["bytes"] / row["ms"] * 1e3 / record["copy"][0]["bytes_per_second"]
        rows.append(row)
        record.write()
        print(f"{name}: {shown(row)}", flush=True)
    if name == "attention":
        record["as_fast_as_attention_from_tokens"] = {
            which: crossing([row for row in rows if row["pass"] == which]) for which in ("forward", "backward")
        }
        record.write()


def right_values(path: pathlib.Path | None, rehearse: bool) -> str:
    """ALL_RIGHT, "24 of 29 right" or "not checked"; found now, or in a file that gpu_values.py wrote."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = pathlib.Path(folder, "values.json")
            script = pathlib.Path(__file__).with_name("gpu_values.py")
            subprocess.run([sys.executable, script, "--out", path] + ["--rehearse"] * rehearse, check=False)
        if not path.exists():
            return "not checked"
        cases = json.loads(path.read_text())["cases"]
    right = sum(row["correct"] is True for row in cases)
    return ALL_RIGHT if right == len(cases) else f"{right} of {len(cases)} right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a few cases of each table")
    parser.add_argument("--rehearse", action="store_true", help="small cases, interpreted on a CPU")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=[*TABLES], help="those to time; all by default")
    parser.add_argument("--values", type=pathlib.Path, help="what gpu_values.py has found; it is run if not given")
    parser.add_argument("--anyway", action="store_true", help="time the kernel although its values are wrong")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results, written after each row")
    args = parser.parse_args()
    sizes = TINY if args.rehearse else QUICK if args.quick else FULL
    failed = []
    with rehearsal(args.rehearse):
        require_kernel("gpu_operator.py")
        right = right_values(args.values, args.rehearse)
        if right != ALL_RIGHT and not args.anyway:
            sys.exit(f"The values of the kernel must be right on this device, found {right}: nothing was timed.")
        record = Record(args.out, values=right)
        for name in args.tables:
            try:
                fill(name, sizes, args.repeats, record)
            except Exception:  # of any kind: the other tables are worth having
                failed.append(name)
                record[f"{name}_error"] = traceback.format_exc(limit=-3)
                record.write()
                print(f"{name}: {record[f'{name}_error']}", file=sys.stderr, flush=True)
    sys.exit(f"these tables have an error: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
