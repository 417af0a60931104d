"""One reader of the small files that we write ourselves: JSON that a disk, a program or a person may have changed
since.

What comes back is of the types asked for, finite, and nested no deeper than anything of ours: no later code meets a
surprise. All else is `DamagedFile`, whose message is a clause that begins with the file's name.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
import stat
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from gspn_jax.config import ConfigError

log = logging.getLogger(__name__)

DEPTH = 32
"""Levels of lists and objects; ours have six."""
LARGEST = 64 << 20
"""Bytes; the manifest of a checkpoint of 100,000 files has 15 MB."""
LARGEST_NUMBER = 2**64 - 1
"""Seeds have 64 bits; nothing has more."""


class DamagedFile(ConfigError):
    """A small file that does not hold what was written into it; the message is a clause for the user."""


def read_json(path: str | os.PathLike, *, nan: bool = False, large: bool = False) -> Any:
    """The JSON in `path`; with `nan` also NaN and Infinity, with `large` whole numbers of any size.

    Raises FileNotFoundError, other OSError, DamagedFile.
    """
    path = pathlib.Path(path)
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # a pipe would wait, a device never end
        raise DamagedFile(f"{path.name} is no file")
    if about.st_size > LARGEST:
        raise DamagedFile(f"{path.name} has {about.st_size:,} bytes, more than such a file ever has")
    return parse(path.read_bytes(), path.name, nan=nan, large=large)


def read_as(path: str | os.PathLike, kind: Any, *, nan: bool = False) -> Any:
    """The JSON in `path` as `typed` returns it. Raises FileNotFoundError, other OSError, and DamagedFile."""
    path = pathlib.Path(path)
    return typed(read_json(path, nan=nan), kind, path.name)


def read_lines(
    path: str | os.PathLike, fields: Mapping[str, Any]
) -> tuple[list[tuple[bytes, dict]], list[DamagedFile]]:
    """Reads a file with a JSON object in each line: (each whole line as it is written, with its object), what is wrong
    with others. The end of a line that was never finished is in neither.

    Objects have a value of its type for each name of `fields`; other values may be NaN. No file has no line.
    Raises OSError, and DamagedFile for what is no file.
    """
    path = pathlib.Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DamagedFile(f"{path.name} is no file")
    except FileNotFoundError:
        return [], []
    whole, wrong = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            name = f"line {number} of {path.name}"
            try:
                whole.append((line, typed(parse(line, name, nan=True), fields, name)))
            except DamagedFile as error:
                if line.endswith(b"\n"):
                    wrong.append(error)
    return whole, wrong


def parse(text: str | bytes, name: str, *, nan: bool = False, large: bool = False) -> Any:
    """The JSON in `text`, of which `name` speaks; `nan` and `large` as in `read_json`. Raises DamagedFile."""
    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{name} is no text") from error
    except RecursionError as error:
        raise DamagedFile(f"{name} is nested too deeply") from error
    except ValueError as error:
        said = "is empty" if not text.strip() else f"is no JSON ({error})"
        raise DamagedFile(f"{name} {said}") from error
    level = [value]
    for _ in range(DEPTH):
        if not nan and any(isinstance(one, float) and not math.isfinite(one) for one in level):
            raise DamagedFile(f"{name} has a number that is not finite")
        if not large and any(isinstance(one, int) and abs(one) > LARGEST_NUMBER for one in level):
            raise DamagedFile(f"{name} has a whole number of more than 64 bits")
        level = [inner for one in level if isinstance(one, dict | list) for inner in _inner(one)]
        if not level:
            return value
    raise DamagedFile(f"{name} is nested too deeply")


def typed(value: Any, kind: Any, name: str) -> Any:
    """`value` of JSON, if it is of the type `kind`: `int | None`, `list[str]`, `tuple[int, int]` (made of a list), a
    dataclass (made of an object), or {field: kind} for an object, which may have other fields. A field that is not
    there is None where it may be. True is no number, and a whole number is a float.

    Raises DamagedFile, which speaks of `name`.
    """
    if isinstance(kind, Mapping) or dataclasses.is_dataclass(kind):
        return _object(value, kind, name)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        if value is None and type(None) in inner:
            return None
        (kind,) = (one for one in inner if one is not type(None))
        return typed(value, kind, name)
    if origin is dict and isinstance(value, dict):
        return {key: typed(one, inner[1], f"{key!r} in {name}") for key, one in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        kinds = (inner[0],) * len(value) if origin is list or inner[-1] is ... else inner
        if len(kinds) == len(value):
            return origin(typed(one, kind, f"an entry of {name}") for one, kind in zip(value, kinds, strict=True))
    right = origin is None and isinstance(value, int | float if kind is float else kind)
    if right and (kind is bool or not isinstance(value, bool)):
        return value
    raise DamagedFile(f"{name} must be {_word(kind)}, found {shown(value)}")


def _object(value: Any, kind: Any, name: str) -> Any:
    """`typed` for a dataclass or {field: kind}."""
    if not isinstance(value, dict):
        raise DamagedFile(f"{name} must be an object, found {shown(value)}")
    plain = isinstance(kind, Mapping)
    fields = kind if plain else {field.name: field.type for field in dataclasses.fields(kind)}
    for field in fields:
        if field not in value and type(None) not in get_args(fields[field]):
            raise DamagedFile(f"{name} has no {field!r}")
    found = {field: typed(value.get(field), one, f"{field!r} in {name}") for field, one in fields.items()}
    return value | found if plain else kind(**found)


def is_within(name: str) -> bool:
    """Tells whether `name` is the path of a file below a folder, in the form in which we write it."""
    try:
        return b"\0" not in os.fsencode(name) and {"", ".", ".."}.isdisjoint(name.split("/"))
    except UnicodeEncodeError:
        return False


def set_aside(path: pathlib.Path, problem: str) -> pathlib.Path:
    """Renames a file that one can do without to the first free `<name>.damaged-1`, with a line; returns where it is."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.rename(path, aside)
    log.warning("%s, and is set aside as %s", problem, aside)
    return aside


def shown(value: Any) -> str:
    """`value` in a sentence, cut to a length that can be read."""
    text = f"{type(value).__name__} with {len(value):,} entries" if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _inner(value: dict | list) -> list:
    return list(value.values()) if isinstance(value, dict) else value


def _word(kind: Any) -> str:
    """The type `kind` in a sentence."""
    words = {int: "a whole number", float: "a number", str: "a text", dict: "an object", list: "a list", bool: "a bool"}
    inner = [_word(one) for one in get_args(kind) if one is not ...]
    if get_origin(kind) is dict:
        return f"an object of values that are each {inner[1]}"
    if get_origin(kind) is list or (get_origin(kind) is tuple and get_args(kind)[-1] is ...):
        return f"a list of entries that are each {inner[0]}"
    return f"a list of {len(inner)}" if get_origin(kind) is tuple else words.get(kind, "an object")
