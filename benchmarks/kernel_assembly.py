"""Assembles the GPU kernel for every generation of NVIDIA's GPUs that it is made for, on a machine without one.

    python benchmarks/kernel_assembly.py --table docs/kernel_code.md     # all of it: half an hour on two cores
    python benchmarks/kernel_assembly.py --devices 8.0 12.0 --cases line_scan

Prints registers of a thread, spilled bytes of a thread and shared memory of a block for each kernel, or the sentence
with which the backend refuses and says what runs instead. Results go to benchmarks/results/kernel_assembly.json, by
device; a call replaces those of its devices and cases. Exit code 1 if a kernel spills, has more shared memory than
there is, or does not assemble. Needs JAX 0.11.2 or newer with its CUDA plugin's compiler (see tests/ptx/toolchain.py).
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir
from jax.interpreters import mlir

from gspn_jax.files import replacing
from gspn_jax.kernels import (
    depthwise_conv,
    depthwise_gpu,
    devices,
    line_scan,
    mosaic_gpu,
    propagate,
    propagate_low_rank,
)
from tests.ptx import toolchain

RESULTS = pathlib.Path(__file__).parent / "results" / "kernel_assembly.json"
BATCH = 8
MARKS = "<!-- kernel_assembly: begin -->", "<!-- kernel_assembly: end -->"
"""Of the table in a Markdown file."""
RESERVED_BYTES = 1024
"""That `Device.shared_bytes` leaves."""


@dataclasses.dataclass(frozen=True)
class Case:
    operator: str
    height: int
    width: int
    channels: int
    dtype: str
    groups: int | None = None
    """Of channels that share weights; None: each has its own."""
    rank: int | None = None
    """Of the proxy."""
    chunk: int | None = None
    side: int | None = None
    """Of the kernel of a convolution."""
    squared_relu: bool = False

    def __str__(self) -> str:
        named = ("G", self.groups), ("d", self.rank), ("chunk", self.chunk), ("side", self.side)
        more = "".join(f" {name}={value}" for name, value in named if value)
        more += " squared_relu" * self.squared_relu
        return f"{self.operator} {self.height}x{self.width}x{self.channels}{more} {self.dtype}"

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of the operator's arrays."""
        pixel, channels, groups = (BATCH, self.height, self.width), self.channels, self.groups or self.channels
        if self.operator == "depthwise_conv":
            return [
                jax.ShapeDtypeStruct(shape, self.dtype)
                for shape in ((*pixel, channels), (self.side, self.side, channels))
            ]
        if self.operator == "line_scan":
            found = [(*pixel, channels), *[(*pixel, groups)] * 3]
        else:
            x, first = [(*pixel, channels)], pixel
            if self.operator == "propagate_low_rank":
                x, first = [*x, (*pixel, self.rank)], (self.rank,)
            found = [*x, (*first, 4, 3, groups), (*first, 4, channels), (*first, 4, channels)]
        merge = [] if self.operator == "line_scan" else [jax.ShapeDtypeStruct((4,), jnp.float32)]
        return [jax.ShapeDtypeStruct(shape, self.dtype) for shape in found] + merge

    def function(self) -> Callable:
        """The value, with states saved, and all gradients."""
        operator = {
            "line_scan": line_scan,
            "propagate": propagate,
            "propagate_low_rank": propagate_low_rank,
            "depthwise_conv": depthwise_conv,
        }
        options = {"backend": "mosaic_gpu", "chunk": self.chunk}
        if self.operator == "depthwise_conv":
            options = {"squared_relu": self.squared_relu}
        options |= {"direction": "down"} if self.operator == "line_scan" else {}

        def value_and_gradients(*arrays):
            y, pull = jax.vjp(lambda *arrays: operator[self.operator](*arrays, **options), *arrays)
            return y, pull(y)

        return value_and_gradients


QUICK = [
    Case("line_scan", 16, 16, 64, "bfloat16"),
    Case("propagate_low_rank", 16, 16, 64, "bfloat16", rank=32),
    Case("propagate_low_rank", 16, 16, 64, "bfloat16", rank=32, chunk=2),
    Case("depthwise_conv", 4, 4, 256, "bfloat16", side=3),
    Case("depthwise_conv", 4, 4, 256, "bfloat16", side=3, squared_relu=True),
]
"""That a test assembles for each device."""
CASES = [
    case
    for dtype in ("bfloat16", "float32")
    for case in (
        Case("line_scan", 16, 16, 1536, dtype),
        Case("propagate", 16, 16, 1536, dtype),
        Case("propagate", 32, 32, 1152, dtype),
        Case("propagate", 64, 64, 1152, dtype),
        Case("propagate", 1024, 1024, 8, dtype),
        Case("propagate", 7, 7, 1152, dtype),
        Case("propagate", 14, 14, 576, dtype),
        Case("propagate", 28, 28, 288, dtype),
        Case("propagate", 56, 56, 144, dtype),
        Case("propagate", 14, 14, 576, dtype, groups=1),
        Case("propagate", 28, 28, 288, dtype, groups=9),
        Case("propagate", 16, 16, 1536, dtype, groups=1),
        Case("propagate", 32, 32, 1152, dtype, groups=1),
        Case("propagate_low_rank", 16, 16, 1500, dtype, rank=93),
        Case("propagate_low_rank", 64, 64, 1152, dtype, rank=72),
        Case("propagate_low_rank", 128, 128, 640, dtype, rank=40),
        Case("propagate_low_rank", 16, 16, 1536, dtype, rank=93, chunk=2),
        Case("propagate_low_rank", 32, 32, 1200, dtype, rank=75, chunk=2),
        Case("propagate_low_rank", 7, 7, 1152, dtype, rank=16),
        Case("propagate_low_rank", 14, 14, 576, dtype, rank=16),
        Case("propagate_low_rank", 28, 28, 288, dtype, rank=16),
        Case("propagate_low_rank", 56, 56, 144, dtype, rank=16),
        Case("depthwise_conv", 16, 16, 1536, dtype, side=7),
        Case("depthwise_conv", 32, 32, 1200, dtype, side=7),
        Case("depthwise_conv", 16, 16, 1536, dtype, side=3),
        Case("depthwise_conv", 16, 16, 1536, dtype, side=3, squared_relu=True),
    )
]


def assemble(case: Case, device: devices.Device | str) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a case, and one for a refusal."""
    device = devices.DEVICES[device] if isinstance(device, str) else device
    with toolchain.for_device(device) as device:
        about = {"case": str(case)}
        if reason := devices.missing() or _refusal(case):
            yield about | {"refused": reason}
            if "XLA expands" not in reason:
                return
        for module in toolchain.lower(case.function(), *case.shapes()):
            found = toolchain.assemble(module)
            yield about | {
                "kernel": re.search(r"\.entry (\w+?)_mosaic_gpu", found.ptx)[1],
                "target": re.search(r"\.target (\w+)", found.ptx)[1],
                "registers": found.registers,
                "spilled_bytes": found.spilled_bytes,
                "shared_bytes": dynamic_shared_bytes(module) + found.static_shared_bytes,
                "shared_bytes_there_are": device.shared_bytes + RESERVED_BYTES,
            }


def _refusal(case: Case) -> str | None:
    x, *others = case.shapes()
    if case.operator == "depthwise_conv":
        reason = depthwise_gpu.refuses(x, *others)
        return reason and f"{reason}: XLA convolves"
    if reason := mosaic_gpu.refuses(x, 1 if case.operator == "line_scan" else 4):
        return f"{reason}: 'scan' runs"
    if case.operator == "propagate_low_rank" and (reason := mosaic_gpu.refuses_low_rank(x, others[0], 5, case.chunk)):
        return f"{reason}: XLA expands the proxy, and the plain kernel scans"
    return None


def dynamic_shared_bytes(module: bytes) -> int:
    """What a block of the kernel asks for at its launch."""
    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    with context:
        toolchain.mosaic.dialect.register_dialect(context)
        text = str(ir.Module.parse(module))
    name = re.search(r'gpu\.launch"\([^)]*(%\d+)\)', text)[1]
    return int(re.search(rf'{name} = "stable_mosaic_gpu.arith.constant"\(\).*?(\d+) : i32', text)[1])


def wrong(row: dict[str, Any]) -> bool:
    return "refused" not in row and (
        "failed" in row or row["spilled_bytes"] > 0 or row["shared_bytes"] > row["shared_bytes_there_are"]
    )


def shown(row: dict[str, Any]) -> str:
    if "refused" in row or "failed" in row:
        return f"  {row['case']}: {row.get('refused') or row['failed']}"
    return (
        f"  {row['case']} {row['kernel']} ({row['target']}): {row['registers']} registers, "
        f"{row['spilled_bytes']} bytes spilled, {row['shared_bytes']} of {row['shared_bytes_there_are']} shared"
        + (" WRONG" if wrong(row) else "")
    )


def assemble_all(capability: str, case: Case) -> list[dict[str, Any]]:
    """The rows of `assemble`, printed as they come, and one for what does not assemble."""
    rows = []
    try:
        for row in assemble(case, capability):
            print(shown(row), flush=True)
            rows.append(row)
    except (toolchain.ToolchainError, ValueError, NotImplementedError) as error:
        rows.append({"case": str(case), "failed": f"{type(error).__name__}: {error}"})
        print(shown(rows[-1]), flush=True)
    return rows


def record(capability: str, rows: list[dict[str, Any]]) -> None:
    """Puts the rows of one case in the place of those of the same device and case in RESULTS."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    new = {row["case"] for row in rows}
    kept = [row for row in results.get(capability, {}).get("rows", []) if row["case"] not in new]
    known = [str(case) for case in CASES]
    rows = sorted((row for row in kept + rows if row["case"] in known), key=lambda row: known.index(row["case"]))
    results[capability] = {
        "examples": devices.DEVICES[capability].examples, "date": datetime.date.today().isoformat(),
        "jax": jax.__version__, "ptxas": toolchain.NVCC, "rows": rows,
    }  # fmt: skip
    results = {name: results[name] for name in devices.DEVICES if name in results}
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """Markdown: for each case and device registers of each kernel, and the most shared memory of a block."""
    lines = ["", "| case | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    sentences: list[str] = []
    for case in map(str, CASES):
        cells = [
            _cell([row for row in device["rows"] if row["case"] == case], sentences) for device in results.values()
        ]
        if any(cells):
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
    versions = sorted({f"JAX {device['jax']} ({device['ptxas']}, {device['date']})" for device in results.values()})
    return "\n".join(
        [
            f"Assembled with {'; '.join(versions)}.",
            *lines,
            "",
            *(f"{number}. The kernel {sentence}." for number, sentence in enumerate(sentences, start=1)),
        ]
    )


def _cell(rows: list[dict[str, Any]], sentences: list[str]) -> str:
    notes = ""
    for row in rows:
        if "refused" in row:
            sentence = re.sub(r"compute capability [\d.]+", "this compute capability", row["refused"])
            if sentence not in sentences:
                sentences.append(sentence)
            notes = f" [{sentences.index(sentence) + 1}]"
    kernels = [row for row in rows if "registers" in row]
    if any("failed" in row for row in rows):
        return "does not assemble"
    if not kernels:
        return notes.strip()
    spilled = sum(row["spilled_bytes"] for row in kernels)
    most = max(row["shared_bytes"] for row in kernels)
    return (
        ", ".join(str(row["registers"]) for row in kernels)
        + f"; {most / devices.KIB:.0f} KiB"
        + (f"; **{spilled} bytes spilled**" if spilled else "")
        + notes
    )


def write_table(path: pathlib.Path) -> None:
    before, _, rest = path.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    text = table(json.loads(RESULTS.read_text()))
    with replacing(path) as temporary:
        temporary.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", nargs="+", default=list(devices.DEVICES), choices=list(devices.DEVICES))
    parser.add_argument("--cases", default="", help="only those that have this in their name")
    parser.add_argument("--quick", action="store_true", help="small cases instead, that are not recorded")
    parser.add_argument("--table", type=pathlib.Path, help="Markdown file whose table is replaced")
    options = parser.parse_args()
    cases = [case for case in (QUICK if options.quick else CASES) if options.cases in str(case)]
    if len(options.devices) == 1:
        (capability,) = options.devices
        print(f"{capability} ({devices.DEVICES[capability].examples}), JAX {jax.__version__}:", flush=True)
        failed = False
        for case in cases:
            rows = assemble_all(capability, case)
            failed |= any(map(wrong, rows))
            if not options.quick:
                record(capability, rows)
    else:  # the compiler keeps the architecture of its first kernel
        command = [sys.executable, __file__, "--cases", options.cases, *["--quick"] * options.quick, "--devices"]
        failed = any([subprocess.run([*command, capability]).returncode for capability in options.devices])
    if options.table:
        write_table(options.table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
