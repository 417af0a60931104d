"""Widths that tensor cores take: 1500 channels are computed as 1536, and the 36 that are added are zero.

Matrix libraries copy a matrix whose rows are no multiple of 16 bytes, on every call. The padding exists while blocks
run and nowhere else: parameters are padded where they are cast, and the transpose of that cuts their gradients, so that
state, checkpoints and counts know nothing of it. Added channels of the tokens stay zero: the linears have zero columns
and biases there, the convolutions zero kernels, and the scans map zero to zero. The layer norm leaves them out of its
sums; what it makes of them meets zero rows.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gspn_jax.models.presets import Architecture

ALIGNED = 8
"""Numbers of bfloat16 in 16 bytes."""
QUANTA = {"hidden": 64, "proxy": 32}
"""Multiple to which a width that is not aligned is rounded up: whole lines of 128 bytes, and the tiles of the scan's
products."""

_AXES = (
    (r"join/kernel$", ("halves", "hidden")),
    (r"mixer/proxy/kernel$", ("hidden", "proxy")),
    (r"mixer/proxy/bias$", ("proxy",)),
    (r"mixer/(gates|lam|out_gate|skip)/kernel$", ("proxy", None, "hidden")),
    (r"mixer/merge$", (None,)),
    (r"conv/kernel$", (None, None, "hidden")),
    (r"kernel$", ("hidden", "hidden")),
    (r"bias$", ("hidden",)),
)
"""Trailing axes of the parameters of a block of the paper layout: the first pattern that matches a path counts."""


def widths(arch: Architecture) -> dict[str, int]:
    """{"hidden", "proxy"} as they are computed. Groups of channels that share weights would not stay together, and of
    other mixers than GSPN's nothing is known."""
    options = arch.options
    if not options.aligned:
        return {"hidden": arch.hidden}
    kept = () if options.groups in (1, arch.hidden) else ("hidden",)
    return {
        name: size if name in kept or size % ALIGNED == 0 else -(-size // QUANTA[name]) * QUANTA[name]
        for name, size in (("hidden", arch.hidden), ("proxy", options.proxy))
    }


def pad_tokens(array: Float[Array, "... D"], width: int) -> Float[Array, "... P"]:
    """Zeros behind the last axis, up to `width`."""
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])])


def pad_block(params: Any, arch: Architecture) -> Any:
    """Parameters of a block of the paper layout, or of a stack of them, in the widths of `widths`; those that have them
    already are left alone, as are all of a mixer that is not `aligned`."""
    if not arch.options.aligned:
        return params
    to = widths(arch)

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next(axes for pattern, axes in _AXES if re.search(pattern, name))
        if name.endswith("gates/kernel") and arch.options.groups == 1:
            axes = (*axes[:-1], None)
        for axis, kind in zip(range(-len(axes), 0), axes, strict=True):
            if kind == "halves":
                leaf = _pad_halves(leaf, axis, to["hidden"])
            elif kind is not None:
                leaf = _pad(leaf, axis, to[kind])
        return leaf

    return jax.tree_util.tree_map_with_path(one, params)


def _pad(array: Array, axis: int, size: int) -> Array:
    more = [(0, 0)] * array.ndim
    more[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, more) if more[axis][1] else array


def _pad_halves(array: Array, axis: int, size: int) -> Array:
    """Each half of the axis is padded, for what comes in is two arrays of tokens side by side."""
    if array.shape[axis] == 2 * size:
        return array
    return jnp.concatenate([_pad(half, axis, size) for half in jnp.split(array, 2, axis=axis)], axis=axis)
