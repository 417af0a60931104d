"""Checks of settings: one sentence that names the field, what was expected and what was found."""

import dataclasses
import math
import os
from typing import Any, Literal, get_args, get_origin

from gspn_jax.tables import Table


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one sentence for the user."""


def require(condition: bool, field: str, expected: str, found: Any) -> None:
    """Raises ConfigError, "FIELD must be EXPECTED, found FOUND", unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field} must be {expected}, found {found!r}")


def whole_number(text: str) -> int | None:
    """The number that `text` writes as we do, in the digits 0 to 9; None for all else ("²", "٣", "-1", "01")."""
    plain = text.isascii() and text.isdigit() and len(text) < 20 and (text == "0" or not text.startswith("0"))
    return int(text) if plain else None


LARGEST = 2**31 - 1
"""Steps are counted in 32 bits."""
LIMITS = {
    "seed": 2**64 - 1,
    "timesteps": 10**6,
    "num_samples": 10**8,
    "per_class": 10**6,
    "image_size": 2**16,
    "hidden": 2**20,
    "depth": 2**16,
    "threads": 2**12,
    "workers": 2**12,
}
"""Where another number is the largest, by the field's name: more would not end, or fit anywhere."""


def check_numbers(owner: Any, prefix: str = "") -> None:
    """Raises ConfigError unless each field of the dataclass `owner` that holds numbers, by its type, holds such ones:
    whole where they must be, finite, and within `LIMITS`; and each text one that can name a file. Without `prefix`
    fields are named as flags, --batch-size."""
    for field in dataclasses.fields(owner):
        kinds, found, inner = _kinds(field.type), getattr(owner, field.name), get_args(field.type)
        name = f"{prefix}.{field.name}" if prefix else f"--{field.name.replace('_', '-')}"
        for text in found if isinstance(found, tuple | list) else (found,):
            require_no_nul(name, text)
        if not kinds & {int, float}:
            continue
        if get_origin(field.type) is tuple:
            wanted = "several numbers" if inner[-1] is ... else f"{len(inner)} numbers"
            several = isinstance(found, tuple | list) and (inner[-1] is ... or len(found) == len(inner))
            require(several, name, wanted, found)
        for value in found if isinstance(found, tuple | list) else (found,):
            if type(value) in kinds - {int, float}:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            expected = "a number" if float in kinds else "a whole number"
            require(whole or (float in kinds and isinstance(value, float)), name, expected, value)
            require(whole or math.isfinite(value), name, "finite", value)
            limit = LIMITS.get(field.name, LARGEST)
            require(not whole or abs(value) <= limit, name, f"at most {limit:,}", value)


def _kinds(annotation: Any) -> set[Any]:
    """The types of single values that an annotation allows."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    inner = [one for one in get_args(annotation) if one is not ...]
    return set().union(*map(_kinds, inner)) if inner else {annotation}


def require_no_nul(field: str, found: Any) -> None:
    """`require` for a text that may be the path of a file."""
    require(not (isinstance(found, str) and "\0" in found), field, "a text without NUL", found)


def require_one_of(field: str, found: Any, allowed: tuple | Table) -> None:
    """`require` for a value of a tuple or a name of a table."""
    require(found in allowed, field, "one of " + ", ".join(map(repr, allowed)), found)


def require_positive(owner: Any, prefix: str, *names: str) -> None:
    """`require` for fields of `owner` that are greater than 0."""
    for name in names:
        require(getattr(owner, name) > 0, f"{prefix}.{name}", "greater than 0", getattr(owner, name))


def put_homes(owner: Any, *names: str) -> None:
    """Puts the user's home in place of a leading "~", which would otherwise be a folder of that name."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, str) and (value == "~" or value.startswith("~/")):
            object.__setattr__(owner, name, os.path.expanduser(value))


WIDEST = 1 / math.sqrt(12)
"""The relative standard deviation of the mean of all steps; a power-function average is narrower."""


def require_width(field: str, width: float) -> None:
    """`require` for the width of a power-function average (`runs.power`)."""
    require(0.0 < width <= WIDEST, field, f"greater than 0 and at most {WIDEST:.4f}, the mean of all steps", width)


def require_fraction(owner: Any, prefix: str, *names: str) -> None:
    """`require` for fields of `owner` in [0, 1)."""
    for name in names:
        require(0.0 <= getattr(owner, name) < 1.0, f"{prefix}.{name}", "in [0, 1)", getattr(owner, name))
