"""Training of a part: parameters that `train.only` does not name stay as they are, without gradients or moments."""

import re
from typing import Any

import jax

from gspn_jax.config import ConfigError, TrainConfig
from gspn_jax.models.parameters import by_path


def trained(config: TrainConfig, shapes: Any) -> Any | None:
    """A tree of True and False like `shapes`: the parameters in whose paths `train.only` is found; None for all.

    Raises ConfigError, with the names that exist, for one that is found in none.
    """
    if config.only is None:
        return None
    chosen = {path: re.search(config.only, path) is not None for path in by_path(shapes)}
    if not any(chosen.values()):
        raise ConfigError(
            f"train.only must be found in the name of a parameter, found {config.only!r}, which is in none of "
            f"{', '.join(chosen)}"
        )
    return jax.tree.unflatten(jax.tree.structure(shapes), list(chosen.values()))


def part(params: Any, trained: Any | None) -> Any:
    """`params` with None, a tree without leaves, in place of those that are not trained."""
    return params if trained is None else jax.tree.map(lambda leaf, mine: leaf if mine else None, params, trained)


def without(params: Any, names: tuple[str, ...]) -> Any:
    """`params` without what stands under these names at its top."""
    return {name: part for name, part in params.items() if name not in names} if names else params


def merged(part: Any, params: Any) -> Any:
    """`params` with those of `part` in their places: the inverse of `part`."""
    return jax.tree.map(lambda own, new: own if new is None else new, params, part)
