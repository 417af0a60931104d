"""Values that the backward pass keeps of a block's forward pass, and what it computes again."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Shaped

from gspn_jax.config import Remat
from gspn_jax.kernels import SCAN_STATES

NAMES = ("norm", "in_proj", "conv7", "proxy", SCAN_STATES, "scan", "out_proj", "conv3", "join", "fc1")
"""Values that "names" keeps: means and scales of norms, products after their bias, the convolutions of the paper's
block, and the result and the states of the scans."""


def named(value: Shaped[Array, "*axes"], name: str) -> Shaped[Array, "*axes"]:
    """`value`, which "names" keeps if the name is one of NAMES."""
    return checkpoint_name(value, name)


def checkpointed(step: Callable, remat: Remat, *, prevent_cse: bool) -> Callable:
    """`step`, whose backward pass computes again what `remat` does not keep; "none" keeps everything.

    `prevent_cse`: where the compiler sees both passes and would take the second computation for the first.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return step
    policy = {
        # Keeps the outputs of the linears; recomputes norms, gates, scans and attention scores.
        "dots": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_only_these_names(*NAMES),
        "full": None,
    }[remat]
    return jax.checkpoint(step, policy=policy, prevent_cse=prevent_cse)
