"""Muon (Jordan et al. 2024) for the matrices of blocks, AdamW for the rest; `matrices` says which are which."""

import math
import re
from typing import Any

import jax
import optax

from gspn_jax.config import ConfigError, OptimizerConfig
from gspn_jax.models.parameters import by_path

MATCHED_RMS = 0.2
"""Root mean square of an update in units of the learning rate, about AdamW's, so that both take the same rate and
weight decay (Moonlight, arXiv 2502.16982, section 2.2)."""


def matrices(shapes: Any) -> dict[str, tuple[int, int]]:
    """Path -> (inputs, outputs) of the parameters that Muon trains: kernels of linears in stacks of blocks.

    Their first axis after that of layers is the input and the last the output; axes between (queries, keys and values,
    the six vectors of adaLN, directions of scans) and that of layers count matrices, each orthogonalised for itself.
    AdamW trains biases, norms, merge weights, depthwise convolutions and matrices of a single row or column, and all
    that is in no block: embeddings of patches, time and classes, and the last layer.
    """
    found = {}
    for name, own in by_path(shapes).items():
        if getattr(own, "stacked", False) and re.search(r"(^|/)kernel$", name) and not re.search(r"conv/kernel$", name):
            layer = own.shape[1:]
            if len(layer) > 1 and min(layer[0], layer[-1]) > 1:
                found[name] = (layer[0], layer[-1])
    return found


def describe(shapes: Any) -> str:
    """A line for people: which parameters Muon trains, and their share."""
    found = matrices(shapes)
    sizes = {name: math.prod(own.shape) for name, own in by_path(shapes).items()}
    mine, everything = sum(sizes[name] for name in found), sum(sizes.values())
    share = f"{mine / 1e6:.2f}M of {everything / 1e6:.2f}M parameters"
    return f"Muon trains {share} ({', '.join(found)}); AdamW trains the rest"


def muon_and_adamw(
    config: OptimizerConfig, rate: optax.Schedule, shapes: Any, decayed: Any = None
) -> optax.GradientTransformation:
    """Both, each on its part of parameters like `shapes`, which may be stored padded; any of them may be left out.

    `decayed` says which parameters weight decay is of: a tree of True and False like them, None for all. Raises
    ConfigError where there are no matrices.
    """
    sizes = matrices(shapes)
    if not sizes:
        raise ConfigError("optimizer.name must be 'adamw' for a network without stacks of blocks, found 'muon'")
    decays = by_path(decayed)

    def by_name(function):
        """A function of a tree that applies `function` to the name and value of each leaf."""
        return lambda tree: jax.tree_util.tree_map_with_path(lambda path, leaf: function(_name(path), leaf), tree)

    mask = None if decayed is None else by_name(lambda name, _: decays[name])
    dimensions = by_name(lambda _, leaf: optax.contrib.MuonDimensionNumbers(1, leaf.ndim - 1))
    # by own shapes, where optax has the stored ones: padding must not change an update
    scaled = by_name(lambda name, update: MATCHED_RMS * math.sqrt(max(sizes[name])) * update)
    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: scaled(updates)),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(rate),
    )
    adamw = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=mask)
    parts = by_name(lambda name, _: "muon" if name in sizes else "adamw")
    return optax.partition({"muon": muon, "adamw": adamw}, parts)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
