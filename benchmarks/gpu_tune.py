"""Times other numbers than those of `gspn_jax.kernels.devices` on the GPU at hand, and says which are faster.

    python benchmarks/gpu_tune.py --out benchmarks/results/tuning_gpu.json [--fields joint_tile local ...] [--limit 600]

A field of `Device` at a time is replaced, all others as they stand. Each of its cases runs forward, and forward and
backward in one program, beside the program as it is, in turns in this process; a number that makes no other program is
left out, one that cannot be had is recorded with the reason, and one whose values differ from those of the program as
it is (by more than gpu_values.py allows) is never proposed. The ratio of a number is how many times as fast it makes
all that was timed, the geometric mean of its cases; it is proposed from WORTH on. Results are written after each case;
cases that were left out are named. Values against float64 are gpu_values.py's to check, which comes first.

With another device than an NVIDIA GPU that the kernel is made for the script stops with a sentence; `--rehearse`
interprets small cases on a CPU.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from gpu_operator import FULL, TINY, Sizes, best_seconds, passes
from gpu_record import Record
from gpu_values import LIMITS, Case, build
from rehearsal import rehearsal, require_kernel

from gspn_jax.kernels import devices, mosaic_gpu

WORTH = 1.02
"""The ratio from which a number is proposed."""


class Knob(NamedTuple):
    """A field of `Device`, "joint_tile" or "depthwise.strip", with other values to try, and what they change."""

    field: str
    others: tuple
    cases: tuple[Case, ...]

    def of(self, device: devices.Device) -> Any:
        """The value that stands in `device`."""
        return functools.reduce(getattr, self.field.split("."), device)

    def values(self, device: devices.Device) -> list:
        """The one that stands in `device` first; shared memory that it has not is not tried."""
        standing = self.of(device)
        others = [value for value in self.others if value != standing]
        if self.field == "scan_bytes":
            others = [value for value in others if value <= device.shared_bytes]
        return [standing, *others]

    def replaced(self, device: devices.Device, value: Any) -> devices.Device:
        """`device` with the value in this field."""
        outer, _, inner = self.field.partition(".")
        return dataclasses.replace(
            device, **{outer: dataclasses.replace(getattr(device, outer), **{inner: value}) if inner else value}
        )


def propagate(*shape: int, groups: int | None = None) -> Case:
    return Case("propagate", shape, groups or shape[3], "bfloat16")


def low_rank(batch: int, side: int, channels: int, rank: int, **options: Any) -> Case:
    return Case("low_rank", (batch, side, side, channels), rank, "bfloat16", **options)


CONVOLUTIONS = tuple(
    Case("depthwise_conv", shape, side, "bfloat16")
    for shape in ((64, 16, 16, 1536), (64, 32, 32, 288))
    for side in (7, 3)
)
KNOBS = (
    Knob("local", (devices.Local(), devices.Local(slab=16), devices.Local(slab=16, by_copies=True)),
         (low_rank(64, 16, 1536, 93, chunk=2), low_rank(16, 32, 1200, 75, chunk=2))),
    Knob("depthwise.blocks", (2, 4), CONVOLUTIONS[:2]),
    Knob("depthwise.strip", (4, 16), CONVOLUTIONS[:2]),
    Knob("depthwise.segment", (8, 32), CONVOLUTIONS[2:]),
    Knob("joint_tile", (256, 512, 1024, 2048), (propagate(64, 16, 16, 1536), low_rank(64, 16, 1536, 93))),
    Knob("apart_tile", (256, 512, 1024), (propagate(8, 64, 64, 1152), low_rank(4, 64, 1152, 72),
                                          propagate(16, 512, 512, 8))),
    Knob("scan_bytes", tuple(devices.KIB * size for size in (64, 96, 128, 160, 200)),
         (propagate(64, 16, 16, 1536), propagate(32, 32, 32, 1152), propagate(128, 28, 28, 288))),
    Knob("shared_joint", (True, False), (propagate(64, 16, 16, 1536, groups=1),)),
    Knob("shared_tile", (None, 256, 512), (propagate(8, 64, 64, 1152, groups=1),)),
    Knob("skip_joint", (True, False), (low_rank(64, 16, 1536, 93, skip=True),)),
)  # fmt: skip
SMALL = (
    Knob("depthwise.segment", (2, 64), (Case("depthwise_conv", (1, 2, 4, 128), 3, "float32"),)),
    Knob("joint_tile", (256,), (Case("propagate", (1, 4, 8, 64), 64, "float32"),)),
)
"""For the interpreter."""


def on(device: devices.Device, run: Callable[[], Any]) -> Any:
    """The result of `run`, whose kernels are those for `device`."""
    with devices.for_device(device):
        return run()


def refusal(case: Case) -> str | None:
    """Reason why the kernel cannot take a case on this device as it stands, or None."""
    return mosaic_gpu.refuses(jax.ShapeDtypeStruct(case.shape, case.dtype), 4) if case.operator == "propagate" else None


def compare(knob: Knob, case: Case, present: devices.Device, repeats: int, sizes: Sizes) -> list[dict]:
    """A row for each value of the field, the one that stands first; what is wrong with that one is raised."""
    function, arrays, _ = build(case)
    timed = {which: run for which, run in passes(function, arrays).items() if which in ("forward", "both")}
    standing, *_ = values = knob.values(present)
    rows, runs, texts = [], {}, {}
    for value in values:
        row = {"case": str(case), "value": shown(value)}
        rows.append(row)
        there = {which: functools.partial(on, knob.replaced(present, value), run) for which, run in timed.items()}
        try:
            text = str(jax.make_jaxpr(there["both"])())
            if text in texts:
                row["same_program_as"] = texts[text]
                continue
            texts[text] = row["value"]
            found = jax.block_until_ready(jax.tree.leaves([run() for run in there.values()]))
        except Exception as error:  # of any kind: no room, no layout, a compiler that gives up
            if value == standing:
                raise
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        if value == standing:
            expected = found
        row["difference"] = max(map(difference, found, expected))
        row["right"] = row["difference"] < LIMITS[case.dtype]
        runs |= {(row["value"], which): run for which, run in there.items()}
    times = best_seconds(runs, repeats, sizes)
    by_value = {row["value"]: row for row in rows}
    for row in rows:
        if (row["value"], "both") in runs:
            row |= {f"{which}_ms": times[row["value"], which] * 1e3 for which in timed}
            row["ratio"] = milliseconds(rows[0]) / milliseconds(row)
        elif same := by_value.get(row.get("same_program_as")):  # an earlier row
            row |= {name: same[name] for name in ("right", "ratio", "error") if name in same}
    return rows


def shown(value: Any) -> str:
    return str(value).removeprefix("Local")


def difference(found: jax.Array, expected: jax.Array) -> float:
    """The largest, relative to the largest value; infinite where one is no number."""
    found, expected = (a.astype(jnp.float32) for a in (found, expected))
    largest = float(jnp.abs(found - expected).max() / jnp.abs(expected).max())
    return math.inf if math.isnan(largest) else largest


def milliseconds(row: dict) -> float:
    """Forward, as a sampler runs it, and forward and backward, as training does."""
    return row["forward_ms"] + row["both_ms"]


def proposed(rows: list[dict]) -> tuple[str, float] | None:
    """(value, ratio) of the fastest of a field that is right in all cases, where that is worth it."""
    means = {}
    for value in {row["value"]: None for row in rows}:
        its = [row for row in rows if row["value"] == value]
        if all(row.get("right") for row in its):
            means[value] = math.exp(sum(math.log(row["ratio"]) for row in its) / len(its))
    best, ratio = max(means.items(), key=lambda item: item[1], default=("", 0.0))
    return (best, ratio) if ratio >= WORTH else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = [knob.field for knob in KNOBS]
    parser.add_argument("--fields", nargs="+", choices=fields, default=fields, help="those to try; all by default")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which no other case is begun")
    parser.add_argument("--rehearse", action="store_true", help="small cases, interpreted on a CPU")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results, written after each case")
    args = parser.parse_args()
    end = time.monotonic() + args.limit
    knobs = [knob for knob in (SMALL if args.rehearse else KNOBS) if knob.field in args.fields]
    failed = []
    with rehearsal(args.rehearse):
        require_kernel("gpu_tune.py")
        present = devices.current()
        record = Record(args.out, compute_capability=present.capability, multiprocessors=present.multiprocessors)
        record |= {"fields": {knob.field: [] for knob in knobs}, "proposed": {}, "left_out": []}
        for knob in knobs:
            rows = record["fields"][knob.field]
            for case in knob.cases:
                about = f"{knob.field}, {case}"
                if reason := refusal(case) or ("no time was left" if time.monotonic() > end else None):
                    record["left_out"].append(f"{about}: {reason}")
                    continue
                try:
                    found = compare(knob, case, present, args.repeats, TINY if args.rehearse else FULL)
                except Exception as error:  # of the program as it is: the others are worth having
                    failed.append(f"{about}: {type(error).__name__}: {str(error)[:200]}")
                    print(failed[-1], file=sys.stderr, flush=True)
                    continue
                rows += found
                for row in found:
                    said = row.get("error") or ", ".join(
                        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in row.items()
                        if name not in ("case", "value")
                    )
                    print(f"{about}, {row['value']}: {said}", flush=True)
                record["proposed"].pop(knob.field, None)
                if best := proposed(rows):
                    cases = f"{len({row['case'] for row in rows})} of {len(knob.cases)}"
                    record["proposed"][knob.field] = {"value": best[0], "ratio": best[1], "cases": cases}
                record.write()
        record.write()
    for field, best in record["proposed"].items():
        print(
            f"{field}: {best['value']} is {best['ratio']:.3f} times as fast as what stands in kernels/devices.py, over "
            f"{best['cases']} cases"
        )
    if not record["proposed"]:
        print(f"nothing is {WORTH} times as fast as what stands in kernels/devices.py")
    if record["left_out"]:
        print(f"left out: {'; '.join(record['left_out'])}")
    sys.exit(f"the program as it is has an error in {'; '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
