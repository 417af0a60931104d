"""What a launch of the GPU kernel computes, and from what."""

import dataclasses
from typing import Any, NamedTuple

KINDS = ("left", "center", "right", "lam", "out_gate", "skip")
"""What a pixel has for each direction and channel, in the order in which it is expanded from a proxy."""
LAM, OUT_GATE, SKIP = map(KINDS.index, ("lam", "out_gate", "skip"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to compute, all of it static: scans in `directions`, restarted every `chunk` lines, with these terms."""

    directions: tuple[str, ...]
    chunk: int | None
    logits: bool
    lam: bool
    out_gate: bool
    skip: bool
    shared: bool = False
    """Whether all channels of a block have the same weights: one of the groups of `Inputs.weights`."""

    @property
    def kinds(self) -> int:
        """Number of KINDS that a proxy is expanded to: skip is the last one."""
        return SKIP + self.skip


class Inputs(NamedTuple):
    """Arrays, or their references in a kernel; None for the terms that a job does not have."""

    x: Any
    """[B, H, W, C]"""
    weights: Any
    """[B, H, W, K, 3, C or G], logits or ready"""
    lam: Any
    """[B, H, W, K, C]"""
    out_gate: Any
    """[B, H, W, K, C]"""
    skip: Any
    """[B, H, W, K, C]"""
    merge: Any
    """[K, C] float32"""
    proxy: Any = None
    """[B, H, W, d], in place of weights, lam, out_gate and skip"""
    up: Any = None
    """[K, slabs, kinds, slab, d], by which a proxy is expanded: see `low_rank.by_slab` and `from_proxy.channels`"""
