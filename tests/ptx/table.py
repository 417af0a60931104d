"""Prints the errors that `make test-ptx-slow` found, beside those of rounding, as a table for docs/kernel_code.md.

python -m tests.ptx.table
"""

import json
import sys

import jax

from gspn_jax.kernels import devices
from tests.ptx.cases import CASES, RESULTS

COLUMNS = ("capability", "case", "y", "gradient that is furthest from it", "launches", "warp instructions", "reports")


def row(
    case: str, errors: dict[str, float], expected: dict[str, float], faults: list[str], launches: int, instructions: int
) -> list[str]:
    def show(name: str) -> str:
        return f"{errors[name]:.1e} ({expected[name]:.1e})"

    furthest = max(set(errors) - {"y"}, key=lambda name: errors[name] / expected[name])
    return [case, show("y"), f"{furthest} {show(furthest)}", str(launches), f"{instructions:,}", str(len(faults))]


def main() -> None:
    print(f"Emulated, JAX {jax.__version__}: norm errors relative to float64; in parentheses those of rounding.\n")
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
