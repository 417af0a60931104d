"""Tells whether this process is a command of this project, not a program that uses it. Imports next to nothing."""

import os
import sys

COMMANDS = ("gspn-train", "gspn-sample")
PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def is_command() -> bool:
    """Tells whether the process runs an entry script, a benchmark, a module of the package or an installed command."""
    if sys.argv[:1] == ["-m"]:  # python -m, until the module is found
        return any(word.startswith("gspn_jax.") for word in sys.orig_argv)
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None:
        return False
    path = os.path.realpath(script)
    folder, root = os.path.dirname(path), os.path.dirname(PACKAGE)
    ours = folder in (root, os.path.join(root, "benchmarks")) or path.startswith(PACKAGE + os.sep)
    return ours or os.path.basename(path) in COMMANDS
