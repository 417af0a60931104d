"""The `metadata.json` of a prepared set: what latents, pixels and captions write and read alike."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

from gspn_jax.config import ConfigError
from gspn_jax.files import replacing
from gspn_jax.small_files import read_as

METADATA = "metadata.json"


class SetMetadata:
    """Base of the dataclasses that are the contents of a `metadata.json`; they have `shards`, which have `records`."""

    FORMAT: ClassVar[str]
    """Name of the kind of set, within the file."""

    @property
    def count(self: Any) -> int:
        """Number of records in all shards."""
        return sum(shard.records for shard in self.shards)

    def write(self: Any, folder: pathlib.Path) -> None:
        """Writes the file, whole or not at all."""
        text = json.dumps({"format": self.FORMAT, "count": self.count} | dataclasses.asdict(self), indent=1)
        with replacing(folder / METADATA) as temporary:
            temporary.write_text(text + "\n")


def find(folder: pathlib.Path, field: str, command: str, what: str = "") -> pathlib.Path:
    """The file in `folder`. Raises ConfigError, which speaks of `field`, unless `prepare COMMAND` wrote one there."""
    path = folder / METADATA
    if not path.is_file():
        raise ConfigError(
            f"{field} must be a folder {what}written by `python -m gspn_jax.prepare {command}`, found no {METADATA} in "
            f"{str(folder)!r}"
        )
    return path


def read_versioned(path: pathlib.Path, form: str, version: int, besides: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of `path` with the types of `besides`. Raises DamagedFile for what is no such JSON, and ConfigError for
    another format or version."""
    about = read_as(path, {"format": str, "version": int} | dict(besides))
    if (about["format"], about["version"]) != (form, version):
        raise ConfigError(
            f"{path} must be of the format {form!r}, version {version}, found {about['format']!r}, version "
            f"{about['version']}"
        )
    return about
