"""Images decoded once: a folder of flat files of pixels that are mapped into memory, with one index.

A set is `metadata.json`, `index.npz` (label, height and width of every image) and shards, each the uint8 pixels of its
images, [H, W, 3] one after the other. Images keep their aspect: the shorter side is at most `image_size`, so that what
is evaluated is to the bit what the files of origin give, and training can crop whatever it likes.
"""

import dataclasses
import json
import pathlib
import threading
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import fit_image
from gspn_jax.data.set_metadata import METADATA, SetMetadata, find, read_versioned
from gspn_jax.data.source import hash_of
from gspn_jax.files import replacing, sha256_of
from gspn_jax.small_files import DamagedFile, is_within, typed

VERSION = 1
INDEX = "index.npz"
CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of pixels: its name, how many images and bytes it holds, and its SHA-256."""

    name: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class RecordMetadata(SetMetadata):
    """Contents of the `metadata.json` of a set."""

    FORMAT = "gspn-jax records"

    image_size: int
    """The shorter side of images that were larger; others are as they were."""
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    shards: tuple[Shard, ...]
    index_sha256: str
    version: int = VERSION

    @classmethod
    def read(cls, folder: pathlib.Path) -> "RecordMetadata":
        """Raises ConfigError unless `folder` holds the metadata of a set of this version."""
        path = find(folder, "data.path", "images", "of records ")
        try:
            about = read_versioned(path, cls.FORMAT, VERSION, {})
            metadata = typed(about, cls, path.name)
            if not all(is_within(shard.name) for shard in metadata.shards):
                raise DamagedFile(f"{path.name} names shards outside of its folder")
        except DamagedFile as error:
            raise ConfigError(f"the metadata of the records in {str(folder)!r} cannot be used: {error}") from error
        return metadata


@dataclasses.dataclass(frozen=True)
class Index:
    """Label, height and width of every image of a set."""

    labels: Int[np.ndarray, " N"]
    heights: Int[np.ndarray, " N"]
    widths: Int[np.ndarray, " N"]

    @property
    def bytes(self) -> Int[np.ndarray, " N"]:
        return CHANNELS * self.heights.astype(np.int64) * self.widths

    def write(self, path: pathlib.Path) -> None:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **dataclasses.asdict(self))

    @classmethod
    def read(cls, path: pathlib.Path) -> "Index":
        with np.load(path) as arrays:
            return cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})

    @classmethod
    def joined(cls, parts: "list[Index]") -> "Index":
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


class RecordSource:
    """The images of a set as they lie on the disk, or with a `size` fitted to squares of it as ADM does.

    Pixels are read where they are looked at: a crop of an image reads its own lines. The hashes of the set are its
    fingerprint; they are compared with the files by `problem`, not here.
    """

    def __init__(self, root: str, size: int | None, channels: int):
        """Raises ConfigError for a set that is not whole, judged by sizes and the hash of the index."""
        self._folder, self._size = pathlib.Path(root), size
        self.metadata = metadata = RecordMetadata.read(self._folder)
        if channels != CHANNELS:
            raise ConfigError(f"data.channels must be {CHANNELS} for records, which are RGB, found {channels}")
        missing = problem(self._folder, hashes=False)
        if missing:
            raise ConfigError(f"{root} must be a whole set of records, but {missing}")
        self._index = index = Index.read(self._folder / INDEX)
        self._ends = np.cumsum([shard.records for shard in metadata.shards])
        starts = np.cumsum(index.bytes) - index.bytes  # in the set, then in the shard
        first = np.repeat(
            starts[self._ends - [shard.records for shard in metadata.shards]], [s.records for s in metadata.shards]
        )
        self._offsets = starts - first
        self.class_names = metadata.class_names
        self.fingerprint = hash_of(["records", json.dumps(dataclasses.asdict(metadata), sort_keys=True)])
        self._maps: list[np.ndarray | None] = [None] * len(metadata.shards)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._index.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        pixels = self._pixels(index)
        if self._size is not None:
            pixels = fit_image(Image.fromarray(pixels), self._size, CHANNELS)
        return {"image": pixels, "label": self._index.labels[index]}

    def _pixels(self, index: int) -> UInt8[np.ndarray, "H W C"]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        if self._maps[number] is None:
            with self._lock:
                path = self._folder / self.metadata.shards[number].name
                self._maps[number] = np.memmap(path, np.uint8, "r").view(np.ndarray)
        shape = int(self._index.heights[index]), int(self._index.widths[index]), CHANNELS
        start = int(self._offsets[index])
        return self._maps[number][start : start + shape[0] * shape[1] * CHANNELS].reshape(shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": [None] * len(self._maps), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_lock": threading.Lock()})


def problem(folder: pathlib.Path, *, hashes: bool = True) -> str | None:
    """Fault of a set whose metadata can be read, as a clause; None when it is whole.

    Without `hashes` shards are looked at no further than their sizes.
    """
    metadata = RecordMetadata.read(folder)
    path = folder / INDEX
    if not path.is_file() or sha256_of(path) != metadata.index_sha256:
        return f"{INDEX} is {'not the one that was written' if path.is_file() else 'missing'}"
    index = Index.read(path)
    if len(index.labels) != metadata.count or not np.isin(index.labels, range(len(metadata.class_names))).all():
        return f"{INDEX} is of other images or classes than {METADATA}"
    ends = np.cumsum([0, *(shard.records for shard in metadata.shards)])
    for shard, start, stop in zip(metadata.shards, ends, ends[1:], strict=False):
        path = folder / shard.name
        found = path.stat().st_size if path.is_file() else None
        if found != shard.bytes or found != index.bytes[start:stop].sum():
            return f"{shard.name} {'is missing' if found is None else f'has {found} bytes, not {shard.bytes}'}"
        if hashes and sha256_of(path) != shard.sha256:
            return f"the content of {shard.name} has changed (its SHA-256 is not that of {METADATA})"
    return None


def shard_name(number: int, count: int) -> str:
    return f"images-{number:05}-of-{count:05}.bin"
