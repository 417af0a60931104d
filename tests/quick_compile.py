"""Flags of XLA's CPU compiler for tests, which compile much and run little."""

import importlib.metadata

QUICK_COMPILE = "--xla_backend_optimization_level=0"  # LLVM's optimisations are half of the time
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # a quarter of the rest; later versions have no other way
