"""Every variant of the GPU kernel against float64, on a GPU: values, and gradients of a random cotangent.

    python benchmarks/gpu_values.py --out benchmarks/results/values_gpu.json [--processes 8] [--limit 120]

The truth is a loop over pixels in NumPy (tests/kernels/numpy_scan.py). Each case runs in a process of its own, several
side by side: what takes longest is the compiler, and a case that ends in a crash or hangs costs no other. The results
are written after each. Exit code 1 if a value is wrong or missing. With another device than an NVIDIA GPU of compute
capability 8.0 or newer the script stops with a sentence; `--rehearse` interprets small cases on a CPU.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpu_record import Record
from rehearsal import rehearsal, require_kernel

from gspn_jax.kernels import (
    depthwise_conv,
    devices,
    line_scan,
    mosaic_gpu,
    propagate,
    propagate_low_rank,
    stochastic_weights,
)
from tests.kernels import numpy_scan as truth
from tests.kernels.numpy_depthwise import loop, squared_relu_loop

LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest error allowed, relative to the largest value of its array."""


class Case(NamedTuple):
    """`shape` [B, H, W, C] of x, `groups` of weights or, of "low_rank", the width of the proxy, or, of
    "depthwise_conv", the side of the kernel."""

    operator: str
    shape: tuple[int, int, int, int]
    groups: int
    dtype: str
    skip: bool = False
    chunk: int | None = None
    direction: str = ""
    by_threads: bool = False
    """Whether an H100 or H200 runs what the other GPUs run for chunk=2."""

    def __str__(self) -> str:
        of_groups = {"low_rank": "rank", "depthwise_conv": "side"}.get(self.operator, "groups")
        return (
            " ".join(
                [
                    self.operator,
                    "x".join(map(str, self.shape)),
                    self.direction,
                    f"{of_groups} {self.groups}",
                    self.dtype,
                    "skip" * self.skip,
                    f"chunk {self.chunk}" if self.chunk else "",
                    "by threads" * self.by_threads,
                ]
            )
            .replace("  ", " ")
            .strip()
        )


def cases() -> list[Case]:
    """Those of one walk in shared memory first, then maps that do not meet on chip, then one direction alone."""
    both = [
        ((2, 16, 16, 96), 96, False, None),
        ((2, 16, 16, 100), 100, True, 2),  # the last slab overlaps
        ((1, 16, 16, 1500), 1500, False, 2),
        ((2, 16, 16, 100), 1, False, None),  # one set of weights for all
        ((1, 32, 32, 64), 64, False, None),
        ((2, 16, 16, 128), 2, True, None),  # and one for every 64 channels
        ((1, 20, 12, 72), 8, True, 3),  # filled up
        ((1, 64, 64, 64), 64, False, None),
        ((1, 64, 64, 64), 1, True, 2),
        ((1, 128, 128, 8), 1, False, None),
    ]
    found = [
        Case("propagate", shape, groups, dtype, skip, chunk) for shape, groups, skip, chunk in both for dtype in LIMITS
    ]
    found += [
        Case("low_rank", shape, rank, "bfloat16", skip, chunk)
        for shape, rank, skip, chunk in [
            ((4, 16, 16, 96), 24, False, None),
            ((3, 16, 16, 100), 93, True, 2),
            ((1, 16, 16, 1500), 93, False, 2),
            ((2, 16, 16, 1536), 93, False, 2),
            ((2, 16, 16, 1200), 75, False, 2),  # chunk=2 in a kernel of its own
            ((2, 32, 32, 1200), 75, False, 2),
            ((8, 16, 16, 72), 24, True, 2),
            ((2, 32, 32, 64), 32, False, None),
            ((1, 64, 64, 64), 24, True, None),
            ((1, 128, 128, 16), 24, False, None),
            ((2, 15, 15, 100), 40, True, 2),  # an odd number of lines
            ((3, 14, 14, 100), 16, False, None),  # factors in registers
            ((2, 28, 28, 96), 8, True, None),
        ]
    ]
    found += [
        Case("low_rank", shape, rank, "bfloat16", skip, 2, by_threads=True)
        for shape, rank, skip in [((2, 32, 32, 1200), 75, False), ((8, 16, 16, 72), 24, True)]
    ]
    found += [
        Case("line_scan", (2, 16, 16, 100), groups, dtype, False, chunk, direction)
        for direction, groups, dtype, chunk in [
            ("down", 100, "float32", None),
            ("up", 1, "bfloat16", 2),
            ("right", 1, "float32", 3),
            ("left", 100, "bfloat16", None),
        ]
    ]
    found += [
        Case("depthwise_conv", shape, side, dtype)
        for shape, side, dtype in [
            ((3, 16, 16, 1500), 7, "bfloat16"),
            ((3, 16, 16, 1200), 3, "bfloat16"),  # slabs overlap
            ((2, 20, 37, 260), 7, "float32"),
            ((2, 14, 18, 129), 3, "float32"),
        ]
    ]  # segments of a row too
    return found


def takes_long(case: Case) -> bool:
    """Whether the compiler takes over half a minute for it, on an H100's host: maps that are filled up, low rank."""
    return case.operator == "low_rank" or case.shape[1] != case.shape[2]


def small_cases() -> list[Case]:
    """Of each operator one, for the interpreter."""
    return [
        Case("propagate", (1, 4, 4, 64), 64, "float32", True, 2),
        Case("low_rank", (2, 4, 4, 64), 24, "bfloat16"),
        Case("low_rank", (1, 16, 16, 16), 16, "bfloat16", chunk=2, by_threads=True),
        Case("line_scan", (1, 4, 4, 64), 64, "bfloat16", direction="up"),
        Case("depthwise_conv", (1, 4, 4, 128), 3, "bfloat16"),
    ]


def random_inputs(batch, height, width, channels, groups, skip, dtype) -> tuple:
    """x, gates, lam, out_gate, merge, skip of `propagate`; made on the device."""
    pixels = (batch, height, width)
    shapes = [(*pixels, channels), (*pixels, 4, 3, groups), (*pixels, 4, channels), (*pixels, 4, channels)]
    shapes += [(*pixels, 4, channels)] * skip
    arrays = [jax.random.normal(jax.random.key(n), shape, dtype) for n, shape in enumerate(shapes)]
    return *arrays[:4], jnp.full((4,), 0.25), arrays[4] if skip else None


def low_rank_inputs(batch: int, size: int, channels: int, rank: int, skip: bool = False) -> tuple:
    """x, proxy, gates, lam, out_gate, merge of `propagate_low_rank`, and skip if there is one."""
    shapes = [
        (batch, size, size, channels),
        (batch, size, size, rank),
        (rank, 4, 3, channels),
        (rank, 4, channels),
        (rank, 4, channels),
    ] + [(rank, 4, channels)] * skip
    x, proxy, *factors = [jax.random.normal(jax.random.key(n), shape, jnp.bfloat16) for n, shape in enumerate(shapes)]
    factors = [a * rank**-0.5 for a in factors]
    return x, proxy, *factors[:3], jnp.full((4,), 0.25), *factors[3:]


def exact_low_rank(x, proxy, gates, lam, out_gate, merge, skip, chunk, cotangent) -> list[np.ndarray]:
    """The value and the gradients of the arguments, those of the products by the chain rule."""
    factors = [gates, lam, out_gate] + [skip] * (skip is not None)
    terms = [np.tensordot(proxy, factor, 1) + one for factor, one in zip(factors, (0, 1, 1, 0), strict=False)]
    arguments = (x, *terms[:3], merge, terms[3] if skip is not None else None, chunk)
    y = truth.propagate(*arguments)
    by_x, *by_terms, by_merge, by_skip = truth.propagate_gradients(*arguments, cotangent)
    by_terms += [by_skip] * (skip is not None)
    flat = [
        (by.reshape(-1, factor[0].size), factor.reshape(len(factor), -1))
        for by, factor in zip(by_terms, factors, strict=True)
    ]
    by_proxy = sum(by @ factor.T for by, factor in flat).reshape(proxy.shape)
    by_factors = [
        (proxy.reshape(-1, proxy.shape[-1]).T @ by).reshape(factor.shape)
        for (by, _), factor in zip(flat, factors, strict=True)
    ]
    return [y, by_x, by_proxy, *by_factors[:3], by_merge, *by_factors[3:]]


def build(case: Case) -> tuple[Callable, tuple, Callable]:
    """The operator of the case on the GPU kernel, its arguments, and the truth as a function of those and a cotangent,
    in float64, which gives the value and the gradient of each argument."""
    chosen = {"chunk": case.chunk, "backend": "mosaic_gpu"}
    if case.operator == "propagate":
        *arrays, skip = random_inputs(*case.shape, case.groups, case.skip, case.dtype)
        arrays += [skip] * case.skip

        def exact(*arrays):
            *arguments, cotangent = arrays
            arguments += [None] * (not case.skip)
            gradients = truth.propagate_gradients(*arguments, case.chunk, cotangent)
            return [truth.propagate(*arguments, case.chunk), *gradients[: 5 + case.skip]]

        return (lambda *a: propagate(*a[:5], skip=a[5] if case.skip else None, **chosen)), tuple(arrays), exact
    if case.operator == "low_rank":
        arrays = low_rank_inputs(case.shape[0], case.shape[1], case.shape[3], case.groups, case.skip)

        def exact(*arrays):
            *arguments, cotangent = arrays
            arguments += [None] * (not case.skip)
            return exact_low_rank(*arguments, case.chunk, cotangent)

        return (lambda *a: propagate_low_rank(*a[:6], skip=a[6] if case.skip else None, **chosen)), arrays, exact
    if case.operator == "depthwise_conv":
        shapes = case.shape, (case.groups, case.groups, case.shape[3])
        arrays = tuple(jax.random.normal(jax.random.key(n), shape, case.dtype) for n, shape in enumerate(shapes))
        squared_relu = case.groups == 3  # as in a block of the paper
        exact_loop = squared_relu_loop if squared_relu else loop
        return (
            lambda *a: depthwise_conv(*a, squared_relu=squared_relu),
            arrays,
            lambda x, kernel, cotangent: exact_loop(x, kernel, 0.0, cotangent)[:3],
        )
    x, gates = random_inputs(*case.shape, case.groups, False, case.dtype)[:2]
    weights = stochastic_weights(gates[:, :, :, 0].astype(jnp.float32), direction=case.direction)
    arrays = (x, *(w.astype(case.dtype) for w in weights))

    def exact(*arrays):
        *arguments, cotangent = arrays
        return [
            truth.line_scan(*arguments, case.direction, case.chunk),
            *truth.line_scan_gradients(*arguments, case.direction, case.chunk, cotangent),
        ]

    return (lambda *a: line_scan(*a, direction=case.direction, **chosen)), arrays, exact


@contextlib.contextmanager
def tuned(case: Case) -> Iterator[None]:
    """Kernels traced inside are made as the case wants them."""
    if not case.by_threads:
        yield
        return
    with devices.for_device(dataclasses.replace(devices.current(), local=devices.Local())):
        yield


def check(case: Case) -> dict[str, Any]:
    """The largest error of the value, made with and without what the backward pass saves, and of the gradients."""
    start = time.perf_counter()
    function, arrays, exact = build(case)
    forward = jax.jit(function)(*arrays)
    y, pull = jax.jit(lambda *a: jax.vjp(function, *a))(*arrays)
    cotangent = jax.random.normal(jax.random.key(9), y.shape, y.dtype)
    gradients = jax.block_until_ready(jax.jit(lambda pull, cotangent: pull(cotangent))(pull, cotangent))
    seconds = time.perf_counter() - start
    expected = exact(*(np.asarray(a, np.float64) for a in (*arrays, cotangent)))
    errors = {
        "forward": truth.relative_error(forward, expected[0]),
        "saving": truth.relative_error(y, expected[0]),
        "backward": max(map(truth.relative_error, gradients, expected[1:])),
    }
    row = {
        "errors": {name: float(error) for name, error in errors.items()},
        "seconds": seconds,
        "correct": bool(max(errors.values()) < LIMITS[case.dtype]),
    }
    if case.operator == "low_rank":  # None where the kernel expands the proxy by itself
        row["expanded_by_xla"] = mosaic_gpu.refuses_low_rank(*arrays[:2], 5 + case.skip, case.chunk)
    return row


def check_apart(number: int, case: Case, small: bool) -> tuple[int, dict[str, Any]]:
    """What a process runs; an error is part of the result."""
    try:
        with rehearsal(small), tuned(case):
            return number, check(case)
    except Exception as error:  # of any kind: what became of the other cases is worth having
        return number, {"correct": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--limit", type=float, default=600, help="seconds for all cases; what has not ended is missing")
    parser.add_argument("--cases", default="", help='only those whose name holds this, "low_rank 1x64x64x64"')
    parser.add_argument("--rehearse", action="store_true", help="small cases, interpreted on a CPU")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results, written after each case")
    args = parser.parse_args()
    # before JAX looks for devices: a process takes the memory that it needs, not three quarters of the GPU
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with rehearsal(args.rehearse):
        require_kernel("gpu_values.py")
        by_copies = devices.current().local.by_copies  # else cases by threads are others once more
    todo = [case for case in (small_cases() if args.rehearse else cases()) if args.cases in str(case)]
    todo = [case for case in todo if by_copies or not case.by_threads]
    todo.sort(key=takes_long, reverse=True)
    if not todo:
        parser.error(f"--cases must be part of the name of a case, found {args.cases!r}")
    record = Record(args.out, cases=[{"case": str(case), "correct": None} for case in todo])
    end = time.monotonic() + args.limit
    with multiprocessing.get_context("spawn").Pool(args.processes, maxtasksperchild=1) as pool:
        waiting = [pool.apply_async(check_apart, (n, case, args.rehearse)) for n, case in enumerate(todo)]
        for result, case in zip(waiting, todo, strict=True):
            try:
                number, found = result.get(max(0.1, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                print(f"{case!s:60s} no answer", flush=True)
                continue
            record["cases"][number] |= found
            record.write()
            said = found.get("error") or " ".join(f"{name} {error:.1e}" for name, error in found["errors"].items())
            print(f"{case!s:60s} {said} {'ok' if found['correct'] else 'WRONG'}", flush=True)
    right = sum(row["correct"] is True for row in record["cases"])
    print(f"{right} of {len(todo)} cases are right")
    sys.exit(right < len(todo))


if __name__ == "__main__":
    main()
