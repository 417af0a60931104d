"""What is emulated: sizes of the operator, its values and gradients by the kernel, by the scan and in float64.

python -m tests.ptx.cases 1x16x16x64-bfloat16 8.0       # one case for GPUs of compute capability 8.0
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from gspn_jax.kernels import devices, mosaic_gpu, propagate, propagate_low_rank
from tests.kernels import numpy_scan
from tests.ptx import emulation, toolchain

NAMES = ("x", "gates", "lam", "out_gate", "merge", "skip")
RESULTS = pathlib.Path("build", "ptx", jax.__version__)
"""Where `Outcome.save` leaves what `table.py` prints."""
ROUNDINGS = 1.5
"""By how much the kernel's error may exceed what is expected: it rounds in other places than the scan."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `propagate`, or of `propagate_low_rank` if there is a rank."""

    batch: int
    height: int
    width: int
    channels: int
    dtype: str = "bfloat16"
    groups: int | None = None
    skip: bool = False
    chunk: int | None = None
    rank: int | None = None
    quick: bool = False

    def __str__(self) -> str:
        parts = [f"{self.batch}x{self.height}x{self.width}x{self.channels}", self.dtype]
        parts += [
            f"{name}{value}"
            for name, value in (("d", self.rank), ("groups", self.groups), ("chunk", self.chunk))
            if value
        ]
        parts += ["skip"] * self.skip
        return "-".join(parts)

    def arrays(self) -> dict[str, jax.Array]:
        """The arguments by name; terms of low rank have factors [d, ...] instead of maps."""
        rng, pixels = np.random.default_rng(0), (self.batch, self.height, self.width)
        before = (self.rank,) if self.rank else pixels
        shapes = {
            "x": (*pixels, self.channels),
            "gates": (*before, 4, 3, self.groups or self.channels),
            "lam": (*before, 4, self.channels),
            "out_gate": (*before, 4, self.channels),
            "merge": (4,),
        }
        if self.skip:
            shapes["skip"] = shapes["lam"]
        if self.rank:
            shapes["proxy"] = (*pixels, self.rank)
        found = {}
        for name, shape in shapes.items():
            is_factor = self.rank and name not in ("x", "proxy", "merge")
            values = rng.normal(size=shape) * (self.rank**-0.5 if is_factor else 1)
            found[name] = jnp.asarray(values, jnp.float32 if name == "merge" else self.dtype)
        return found


CASES = [
    Case(1, 16, 16, 64, "float32", quick=True),
    Case(1, 16, 16, 64, quick=True),
    Case(1, 64, 64, 16, quick=True),  # does not meet on chip
    Case(1, 16, 16, 64, groups=1, skip=True, quick=True),
    Case(1, 16, 16, 16, groups=2, quick=True),  # XLA spreads the weights, and sums their gradients
    Case(4, 16, 16, 64, rank=24, quick=True),
    Case(2, 16, 16, 40, rank=24, chunk=2),  # slabs that overlap
    Case(1, 28, 26, 24, rank=24, chunk=2, quick=True),  # four pieces, three of which are filled up
    Case(1, 14, 14, 64, rank=16, quick=True),  # a proxy that is expanded in registers, tiles that overlap
    Case(2, 7, 7, 100, rank=8, skip=True),
    Case(2, 6, 7, 72, rank=5, chunk=3),  # filled up, and begun anew
    Case(1, 28, 26, 32, rank=12),
    Case(1, 32, 32, 32, rank=16, skip=True),
    Case(1, 56, 20, 64, rank=16, chunk=3),
    Case(1, 7, 5, 64, quick=True),  # tiles that overlap
    Case(1, 7, 7, 64, "float32", chunk=2),
    Case(2, 7, 7, 100, skip=True),
    Case(1, 14, 14, 64, "float32", skip=True),
    Case(1, 14, 14, 64, chunk=2),
    Case(1, 14, 9, 64, "float32"),
    Case(1, 28, 28, 64, "float32"),
    Case(1, 28, 28, 64, chunk=2),
    Case(1, 56, 56, 64, "float32", chunk=2),  # overlap in each warpgroup's part of a line
    Case(1, 56, 56, 64),
    Case(1, 28, 20, 64, groups=2),  # slabs as narrow as a group
    Case(1, 32, 32, 64, "float32", groups=4),
    Case(1, 32, 32, 16, groups=2, chunk=2),
    Case(1, 16, 24, 8, skip=True),
    Case(1, 16, 16, 64, groups=4),
    Case(1, 14, 14, 64, groups=1, skip=True),
    Case(1, 16, 16, 96, "float32"),
    Case(2, 16, 16, 96),
    Case(1, 16, 16, 100, "float32", skip=True, chunk=2),
    Case(1, 16, 16, 100, skip=True, chunk=2),
    Case(1, 32, 32, 64, "float32"),
    Case(1, 32, 32, 64),
    Case(1, 64, 64, 64, "float32"),
    Case(1, 64, 64, 64, skip=True, chunk=2),
    Case(1, 128, 128, 8),
    Case(1, 64, 600, 4),
    Case(1, 16, 16, 100, "float32", groups=1),
    Case(1, 64, 64, 128, groups=2, chunk=3),
    Case(1, 20, 12, 72, "float32", groups=8, skip=True, chunk=3),
    Case(1, 16, 16, 1500),
    Case(4, 16, 16, 100, rank=93, skip=True),
    Case(8, 16, 16, 96, rank=96, chunk=2),
    Case(2, 32, 48, 32, rank=96, chunk=2),
    Case(3, 48, 16, 16, rank=32, skip=True, chunk=2),
    Case(2, 14, 14, 64, rank=16, chunk=2),
    Case(5, 16, 16, 64, rank=32, skip=True, chunk=2),
    Case(8, 16, 16, 96, rank=128, chunk=2),  # has no room in the kernel of its own
    Case(2, 32, 32, 64, rank=32),
    Case(1, 64, 64, 64, rank=24),
    Case(1, 128, 20, 16, rank=24, skip=True),
    Case(1, 32, 256, 16, rank=144, chunk=4),  # too wide to be loaded two tiles ahead
    Case(2, 15, 16, 64, rank=40, chunk=2),  # an odd number of lines
    Case(1, 9, 40, 64, rank=20, chunk=3),
    Case(1, 16, 8, 64, rank=24, quick=True),  # tiles of two products
    Case(4, 16, 16, 64, rank=128),
]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was found: for each name norm errors relative to float64, and what ran."""

    case: Case
    kernel: dict[str, float]
    scan: dict[str, float]
    states: dict[str, float]
    """Of float64 with states rounded to bfloat16, as the forward pass saves them and the scan does not."""
    runs: list[emulation.Run]

    @property
    def faults(self) -> list[str]:
        return [f"{run.program}: {fault}" for run in self.runs for fault in run.faults]

    def expected(self, name: str) -> float:
        """Norm error of rounding: the scan's in the same type, where a gradient that it sums in float32 counts as
        rounded once, like y; that of the states; and for `merge` that of a float32 sum of n terms of random signs, one
        a line, sqrt(n / 6) times the unit relative to their norm."""
        summed = 2.0**-24 * (max(self.case.height, self.case.width) / 6) ** 0.5 if name == "merge" else 0
        return float(np.linalg.norm([max(self.scan[name], self.scan["y"]), self.states.get(name, 0), summed]))

    def wrong(self) -> list[str]:
        """Faults, and errors that are not of rounding."""
        errors = [
            f"{self.case}: the norm error of {name} is {error:.1e}, of rounding {self.expected(name):.1e}"
            for name, error in self.kernel.items()
            if not error < ROUNDINGS * self.expected(name)
        ]  # or NaN
        return self.faults + errors

    def save(self, capability: str = devices.DEFAULT) -> None:
        folder = RESULTS / capability
        folder.mkdir(parents=True, exist_ok=True)
        found = {
            "case": str(self.case),
            "errors": self.kernel,
            "faults": self.faults,
            "launches": len(self.runs),
            "expected": {name: self.expected(name) for name in self.kernel},
            "instructions": sum(run.instructions for run in self.runs),
        }
        (folder / f"{self.case}.json").write_text(json.dumps(found, indent=1))


def run(case: Case, **options: Any) -> Outcome:
    """Emulates a case forward and backward; `options` are those of `emulation.emulated`."""
    arrays = case.arrays()
    cotangent = np.asarray(jnp.asarray(np.random.default_rng(1).normal(size=arrays["x"].shape), case.dtype), np.float64)
    with emulation.emulated(**options) as runs:
        kernel = _values(_by_kernel(case), arrays, cotangent)
    scan = _values(_by_scan(case), arrays, cotangent)
    wide = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    expand = _low_rank_truth if case.rank else _truth
    truth = list(expand(case, wide, cotangent))
    states = {}
    if case.dtype == "bfloat16":
        with mock.patch.object(numpy_scan, "line_scan", _rounded(numpy_scan.line_scan)):
            states = {name: gradient for name, gradient, _ in expand(case, wide, cotangent) if name != "y"}
    return Outcome(case, *(_errors(found, truth) for found in (kernel, scan, states)), runs)


def norm_error(found: Any, truth: np.ndarray, scale: float | None = None) -> float:
    """Norm of the difference over the norm of the truth, or over `scale`; NaN if there is one."""
    difference = np.linalg.norm(np.asarray(found, np.float64) - truth)
    return float(difference / (np.linalg.norm(truth) if scale is None else scale))


def _errors(found: dict[str, Any], truth: list[tuple[str, np.ndarray, float]]) -> dict[str, float]:
    return {name: norm_error(found[name], value, scale) for name, value, scale in truth if name in found}


def _rounded(function: Callable) -> Callable:
    """Its results as bfloat16 holds them."""
    return lambda *arguments: function(*arguments).astype(jnp.bfloat16).astype(np.float64)


def _values(function: Callable, arrays: dict[str, jax.Array], cotangent: np.ndarray) -> dict[str, jax.Array]:
    """y and the gradient of every argument, eagerly."""
    y, pull = jax.vjp(lambda arrays: function(**arrays), arrays)
    return {"y": y} | pull(jnp.asarray(cotangent, y.dtype))[0]


def _by_kernel(case: Case) -> Callable:
    """Without the checks of the machine that `propagate` makes."""

    def call(skip=None, **arrays):
        if case.rank:
            names = ("x", "proxy", "gates", "lam", "out_gate", "merge")
            return mosaic_gpu.propagate_low_rank(*(arrays[name] for name in names), skip, case.chunk)
        return mosaic_gpu.propagate(*(arrays[name] for name in NAMES[:5]), skip, case.chunk)

    return call


def _by_scan(case: Case) -> Callable:
    operator = propagate_low_rank if case.rank else propagate
    return lambda **arrays: operator(**arrays, chunk=case.chunk, backend="scan")


Truth = Iterator[tuple[str, np.ndarray, float]]
"""(name, y or gradient in float64, what its error is relative to)"""


def _truth(case: Case, arrays: dict[str, np.ndarray], cotangent: np.ndarray) -> Truth:
    """Errors are relative to the norm, that of `merge` to the norm of what is summed: the sum may nearly cancel."""
    x, gates, *others = (arrays.get(name) for name in NAMES)
    gates = numpy_scan.spread(gates, case.channels)
    y = numpy_scan.propagate(x, gates, *others, chunk=case.chunk)
    yield "y", y, np.linalg.norm(y)
    gradients = dict(zip(NAMES, numpy_scan.propagate_gradients(x, gates, *others, case.chunk, cotangent), strict=True))
    if case.groups:
        by_gates = gradients["gates"]
        gradients["gates"] = by_gates.reshape(*by_gates.shape[:-1], case.groups, -1).sum(-1)
    summed = sum(gradients[name] * arrays[name] for name in ("out_gate", "skip") if name in arrays)
    summed = summed / arrays["merge"][:, None]
    for name, gradient in gradients.items():
        if name in arrays:
            yield name, gradient, np.linalg.norm(summed if name == "merge" else gradient)


def _low_rank_truth(case: Case, arrays: dict[str, np.ndarray], cotangent: np.ndarray) -> Truth:
    """The same of products of proxy and factors; lam and out_gate are 1 more."""
    proxy, factors = arrays["proxy"], [name for name in ("gates", "lam", "out_gate", "skip") if name in arrays]
    terms = arrays | {name: np.tensordot(proxy, arrays[name], 1) + (name in ("lam", "out_gate")) for name in factors}
    by_proxy = np.zeros_like(proxy)
    for name, value, scale in _truth(case, terms, cotangent):
        if name in factors:
            by_proxy += np.tensordot(value, arrays[name], [range(3, value.ndim), range(1, value.ndim - 2)])
            value = np.tensordot(proxy, value, [range(3), range(3)])
            scale = np.linalg.norm(value)
        yield name, value, scale
    yield "proxy", by_proxy, np.linalg.norm(by_proxy)


def main(name: str, capability: str) -> None:
    (case,) = (case for case in CASES if str(case) == name)
    with toolchain.for_device(capability):
        outcome = run(case)
    outcome.save(capability)
    print(*outcome.runs, sep="\n")
    sys.exit("\n".join(outcome.wrong()) or None)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(*sys.argv[1:])
