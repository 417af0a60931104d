"""The line-scan operator of GSPN and the depthwise convolution beside it: arrays in, arrays out."""

from kernels.api import available_backends, backend_caveats, line_scan, propagate, propagate_low_rank
from kernels.depthwise import depthwise_conv
from kernels.saved import STATES as SCAN_STATES
from kernels.sharding import sharded
from kernels.weights import stochastic_weights

__all__ = [
    "SCAN_STATES",
    "available_backends",
    "backend_caveats",
    "depthwise_conv",
    "line_scan",
    "propagate",
    "propagate_low_rank",
    "sharded",
    "stochastic_weights",
]
