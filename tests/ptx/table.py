"""Prints the errors that `make test-ptx-slow` found, beside the scan's own, as a table for docs/kernel.md.

    python -m tests.ptx.table
"""

import json
import sys

import jax

from tests.ptx.cases import CASES, RESULTS

GRADIENTS = ("x", "gates", "lam", "out_gate", "skip", "merge", "proxy")


def main() -> None:
    print(f"Emulated, JAX {jax.__version__}: norm errors relative to float64, in parentheses the scan's own.\n")
    print("| case | y | " + " | ".join(GRADIENTS) + " | launches | reports |")
    print("|" + "---|" * (len(GRADIENTS) + 4))
    for case in CASES:
        path = RESULTS / f"{case}.json"
        if not path.exists():
            print(f"not run: {case}", file=sys.stderr)
            continue
        found = json.loads(path.read_text())
        errors = [f"{found['kernel'][name]:.1e} ({found['scan'][name]:.1e})" if name in found["kernel"] else ""
                  for name in ("y", *GRADIENTS)]
        print("|", " | ".join([str(case), *errors, str(found["launches"]), str(len(found["faults"]))]), "|")


if __name__ == "__main__":
    main()
