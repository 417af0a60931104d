"""A source: random access to {"image": uint8 [S, S, C], "label": int32}, and what all kinds of it share.

A source knows its class names and a fingerprint of its content, and raises `DataError` for an image it cannot decode;
what happens then is the loader's choice.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float16

MAX_BAD_IN_A_ROW = 100
"""A set with so many bad images in a row is broken as a whole: replacing them would train on something else."""


class Source(Protocol):
    """A labelled image set with random access, readable from several threads and picklable to other processes."""

    class_names: tuple[str, ...]
    fingerprint: str
    """Hex digits that change when the set does; the same on every host and run. Image bytes are not read for it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        """{"image": uint8 [S, S, C], "label": int32}. Raises DataError for an image that cannot be decoded."""
        ...


class Views(Protocol):
    """Features of the images of a source, computed once (`features.FeatureSet`)."""

    @property
    def bytes(self) -> int:
        """Bytes of a view."""
        ...

    def view(self, index: int, mirrored: bool) -> Float16[np.ndarray, "h w D"]:
        """Those of an image, or of its mirror image. Raises DataError for a damaged record."""
        ...


class Unlabelled:
    """The images of `source` as one class without a name."""

    class_names = ("",)

    def __init__(self, source: Source):
        self._source, self.fingerprint = source, source.fingerprint
        self.metadata: Any = getattr(source, "metadata", None)
        """Those of latents."""

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        return self._source[index] | {"label": np.int32(0)}


def hash_of(parts: Iterable[str | bytes]) -> str:
    """16 hex digits over the parts and where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        data = os.fsencode(part) if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()[:16]


def shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
