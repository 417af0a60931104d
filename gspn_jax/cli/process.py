"""Preparation of a command's process, before anything else."""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys

from gspn_jax.cli import child, command, hosts, huge_pages, interrupts, limits, log_lines, streams


def setup() -> None:
    """Makes the process ready; called first, before JAX is imported. In this order:

    Ctrl-C ends it with a line (`interrupts`); streams can be written (`streams`); too little memory
    is refused (`limits`); on a CPU the command starts again
    with large pages (`huge_pages`); one of several hosts goes on in a child process (`child`); a flag of XLA is set
    (`set_xla_flags`); log lines go to stderr, and failed saves are quiet (`log_lines`); JAX's compilation cache goes to
    the disk (JAX_COMPILATION_CACHE_DIR moves it).
    """
    if command.is_command():
        interrupts.end_at_once()
    streams.prepare()
    if command.is_command():
        limits.check()
    huge_pages.restart_with_them()
    if hosts.is_one_of_several() and "jax" not in sys.modules:
        child.watch_over_child()
    set_xla_flags()
    log_lines.show()
    log_lines.quiet_failed_saves()
    set_compilation_cache()


def set_compilation_cache() -> None:
    """Takes that of the user; none for a user without a home, and who names one in JAX_COMPILATION_CACHE_DIR has it."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no such user
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(cache) / "gspn_jax" / "jax"))


SLICE_FUSION = "--xla_gpu_enable_dynamic_slice_fusion"


def set_xla_flags() -> None:
    """Switches off what JAX 0.11.2 for CUDA does wrong: a product that is saved for the backward pass it computes
    twice. 0.10.2 and 0.12 do not, and gain by it. Has no effect once JAX is imported, or on a choice of one's own."""
    flags = os.environ.get("XLA_FLAGS", "")
    cuda = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if cuda and importlib.metadata.version("jax") == "0.11.2" and SLICE_FUSION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {SLICE_FUSION}=false".strip()
