"""Parameters of elsewhere that a run may begin with: where they come from, and what of them may differ."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh


class Rows(NamedTuple):
    """Rows of a table that go on: for each one here the number of the row there, None for one that begins anew."""

    there: tuple[int | None, ...]
    said: str


@dataclasses.dataclass(frozen=True)
class Given:
    """Parameters of elsewhere, found and not yet read, and which of them may differ from those of the task.

    Parts are named by regular expressions that match the start of a path such as "trunk/blocks/mlp/fc1/kernel".
    """

    said: str
    """Where they come from."""
    shapes: Any
    """A tree of their `ParamShape`."""
    read: Callable[[Mesh], Any]
    """Gives them as `sharding.stored` on a mesh."""
    loose: tuple[str, ...] = ()
    """Parts that begin anew where their shapes differ; elsewhere another shape is an error."""
    anew: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Parts that begin anew in any case -> why."""
    rows: Mapping[str, Rows] = dataclasses.field(default_factory=dict)
    """Tables by path, whose rows stand for something by themselves."""
