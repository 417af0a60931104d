"""Prints the errors that `make test-ptx-slow` found, beside the scan's own, as a table for docs/kernel.md.

    python -m tests.ptx.table
"""

import json
import sys

import jax

from kernels import devices
from tests.ptx.cases import CASES, RESULTS

COLUMNS = ("capability", "case", "y", "gradient that is furthest from the scan's", "launches", "warp instructions",
           "reports")


def row(case: str, kernel: dict[str, float], scan: dict[str, float], faults: list[str], launches: int,
        instructions: int) -> list[str]:
    def errors(name: str) -> str:
        return f"{kernel[name]:.1e} ({scan[name]:.1e})"

    furthest = max(set(kernel) - {"y"}, key=lambda name: kernel[name] / max(scan[name], scan["y"]))
    return [case, errors("y"), f"{furthest} {errors(furthest)}", str(launches), f"{instructions:,}", str(len(faults))]


def main() -> None:
    print(f"Emulated, JAX {jax.__version__}: norm errors relative to float64; in parentheses the scan's own.\n")
    print("|", " | ".join(COLUMNS), "|")
    print("|" + "---|" * len(COLUMNS))
    for capability in sorted(devices.DEVICES, key=lambda capability: capability != devices.DEFAULT):
        for case in CASES:
            path = RESULTS / capability / f"{case}.json"
            if path.exists():
                print("|", " | ".join([capability, *row(**json.loads(path.read_text()))]), "|")
            elif capability == devices.DEFAULT:
                print(f"not run: {case}", file=sys.stderr)


if __name__ == "__main__":
    main()
