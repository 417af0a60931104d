"""The line-scan operator of GSPN and the depthwise convolution beside it: arrays in, arrays out."""

import sys

from gspn_jax.kernels.api import available_backends, backend_caveats, line_scan, propagate, propagate_low_rank
from gspn_jax.kernels.depthwise import depthwise_conv
from gspn_jax.kernels.saved import STATES as SCAN_STATES
from gspn_jax.kernels.sharding import Shards, sharded
from gspn_jax.kernels.weights import stochastic_weights

__all__ = [
    "SCAN_STATES",
    "Shards",
    "available_backends",
    "backend_caveats",
    "depthwise_conv",
    "line_scan",
    "propagate",
    "propagate_low_rank",
    "sharded",
    "stochastic_weights",
]

if __name__ == "kernels":  # `import kernels` in a checkout, where this folder lies: one module under two names, not two
    for name in [name for name in sys.modules if f"{name}.".startswith("gspn_jax.kernels.")]:
        sys.modules[name.removeprefix("gspn_jax.")] = sys.modules[name]
