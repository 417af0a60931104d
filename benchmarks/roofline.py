"""Least times of a compiled program's kernels on a GPU, by kind of work, and what runs while collectives do.

A kernel takes at least as long as its bytes at 85 % of the memory bandwidth, and a matrix product at least as long as
its operations at 700 TFLOP/s, about what large bfloat16 products reach on Hopper, or at an RTX 4090's peak. Launches,
the latency of scans and slow convolutions are left out, so that a real run takes longer.
"""

import collections
from typing import NamedTuple

from benchmarks.hlo import ASYNC_STARTS, FREE, Instruction, Program, arrays, nbytes

BANDWIDTH = {"h100": 3.35e12, "h200": 4.8e12, "rtx4090": 1.008e12}
"""Bytes a second, from the data sheets, of SXM modules for the first two."""
EFFICIENCY = 0.85
"""The part of it that a copy reaches."""
PRODUCTS = {"h100": 700e12, "h200": 700e12, "rtx4090": 165e12}
"""Operations a second of large bfloat16 products; of an RTX 4090 the peak with sums in float32, by NVIDIA's white
paper."""
BLOCK = "jit(block)"
"""In JAX's names of operations: a block that the program has outside of loops (`gspn_jax.models.stack`)."""
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)


class Kernel(NamedTuple):
    """One kernel of a loop or of the entry; numbers are of one time that it runs."""

    loop: str
    times: int
    instruction: Instruction
    kind: str
    read: int
    written: int
    operations: int

    def seconds(self, gpu: str) -> float:
        """The bound of one time on a GPU of BANDWIDTH."""
        moving = (self.read + self.written) / (BANDWIDTH[gpu] * EFFICIENCY)
        return max(moving, self.operations / PRODUCTS[gpu]) if self.kind == "products" else moving


def kernels(program: Program) -> list[Kernel]:
    """All kernels of a program, in the order of the schedule of each loop."""
    found = []
    for loop, computation, times in program.runs():
        for instruction in program.kernels(computation):
            read, written = program.traffic(computation, instruction)
            kind = _kind(program, instruction, outside=loop == "entry" and BLOCK not in instruction.source)
            operations = program.operations(computation, instruction)
            found.append(Kernel(loop, times, instruction, kind, read, written, operations))
    return found


def _library(program: Program, kernel: Instruction) -> str | None:
    """The kind of a library call, a kernel of ours or a collective, wherever it is inside a fusion."""
    for part in program.inside(kernel):
        if part.target.startswith("mosaic") and "/depthwise_" in (part.source or kernel.source):
            return "convolutions"
        if part.opcode == "dot":
            return "products"
        if part.opcode.startswith(COLLECTIVES):
            return "collectives"
        for name, kind in (
            ("conv", "convolutions"),
            ("gemm", "products"),
            ("matmul", "products"),
            ("mosaic", "scans"),
            ("fmha", "attention"),
        ):
            if part.opcode == "custom-call" and name in part.target:
                return kind
    return None


def _kind(program: Program, kernel: Instruction, *, outside: bool) -> str:
    """`outside` of all blocks: the optimizer, the embeddings and the last layer, the filling of what loops stack."""
    library = _library(program, kernel)
    if library:
        return library
    where = program.where(kernel)
    if outside:
        fills = {part.opcode for part in program.inside(kernel)} <= {*FREE, "broadcast", "copy"}
        return "zero-filling" if fills else "outside of blocks"
    if any(file.startswith("gspn_jax/kernels/depthwise") for file, _ in where[:2]):
        return "around convolutions"
    if any(file.startswith("gspn_jax/kernels/") for file, _ in where):
        return "around scans"
    if any(file == "gspn_jax/models/norms.py" or function.endswith("modulate") for file, function in where[:2]):
        return "norms"
    opcodes = {part.opcode for part in program.inside(kernel)}
    if "dynamic-update-slice" in opcodes:
        return "stacking"
    return "elementwise"


def bounds(found: list[Kernel], gpu: str) -> dict[str, dict[str, float]]:
    """{kind: {"ms", "gigabytes", "teraflop", "launches"}} of a whole run, the longest first."""
    total: dict[str, dict[str, float]] = collections.defaultdict(
        lambda: dict.fromkeys(("ms", "gigabytes", "teraflop", "launches"), 0.0)
    )
    for kernel in found:
        row = total[kernel.kind]
        row["ms"] += 1e3 * kernel.times * kernel.seconds(gpu)
        row["gigabytes"] += 1e-9 * kernel.times * (kernel.read + kernel.written)
        row["teraflop"] += 1e-12 * kernel.times * kernel.operations
        row["launches"] += kernel.times
    return dict(sorted(total.items(), key=lambda item: -item[1]["ms"]))


class Exchange(NamedTuple):
    """A collective as it is scheduled; numbers are of one time that it runs."""

    loop: str
    times: int
    kind: str
    asynchronous: bool
    operands: int
    megabytes: float
    types: tuple[str, ...]
    overlapped_us: float
    """Bound of the kernels that run between its start and its end."""


def exchanges(program: Program, gpu: str) -> list[Exchange]:
    """The collectives of a program, of every loop."""
    found = []
    by_loop = collections.defaultdict(list)
    for kernel in kernels(program):
        by_loop[kernel.loop].append(kernel)
    for loop, computation, times in program.runs():
        order = by_loop[loop]
        for position, kernel in enumerate(order):
            kind = _collective(program, kernel.instruction)
            if kind is None:
                continue
            body = program.computations[computation]
            shapes = [body[name].shape for name in kernel.instruction.operands if name in body]
            done = next(
                (
                    i
                    for i, other in enumerate(order)
                    if other.instruction.opcode.endswith("-done")
                    and kernel.instruction.name in other.instruction.operands
                ),
                None,
            )
            between = order[position + 1 : done] if done else []
            found.append(
                Exchange(
                    loop,
                    times,
                    kind,
                    done is not None,
                    len(shapes),
                    sum(map(nbytes, shapes)) / 1e6,
                    tuple(sorted({dtype for shape in shapes for dtype, _ in arrays(shape)})),
                    1e6 * sum(other.seconds(gpu) for other in between if other.kind != "collectives"),
                )
            )
    return found


def _collective(program: Program, kernel: Instruction) -> str | None:
    if kernel.opcode.endswith("-done"):
        return None
    parts = program.inside(kernel) if kernel.opcode in ASYNC_STARTS else [kernel]
    return next((name for part in parts for name in COLLECTIVES if part.opcode.startswith(name)), None)
