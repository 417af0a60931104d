"""Features of a frozen network, computed once: the tokens of every image and of its mirror image, in shards.

A set is a folder of array_record shards and `metadata.json`. A record is float16 [h, w, D], little-endian: of one view.
The views of an image follow one another, the image and, if the set has flips, its mirror image; the images are in the
order of the set that they are of.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float16

from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data import record_files
from gspn_jax.data.decoding import DataError
from gspn_jax.data.record_files import RecordFiles, Shard
from gspn_jax.data.set_metadata import SetMetadata, find, read_versioned
from gspn_jax.data.source import Source, hash_of
from gspn_jax.small_files import DamagedFile, typed

VERSION = 1


@dataclasses.dataclass(frozen=True)
class FeatureMetadata(SetMetadata):
    """Contents of the `metadata.json` of a set of features."""

    FORMAT = "gspn-jax features"

    network: str
    """The line of `tables.FEATURE_NETWORKS`."""
    network_sha256: str
    """Digest of its weights."""
    image_size: int
    """Side of the images, in pixels, before the network scales them."""
    shape: tuple[int, int, int]
    """[h, w, D] of a view."""
    images: str
    """The fingerprint of the images."""
    shards: tuple[Shard, ...]
    flips: bool = True
    crop: str = "adm_center"
    dtype: str = "float16"
    version: int = VERSION

    @property
    def views(self) -> int:
        return 1 + self.flips

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(shard.records for shard in self.shards) // self.views

    @classmethod
    def read(cls, folder: pathlib.Path, field: str = "align.features") -> "FeatureMetadata":
        """Raises ConfigError, which speaks of `field`, unless `folder` holds metadata of this version."""
        path = find(folder, field, "features")
        try:
            about = read_versioned(path, cls.FORMAT, VERSION, {"count": int})
            metadata = typed(about, cls, path.name)
            record_files.check_names(metadata.shards, path.name)
        except DamagedFile as error:
            raise ConfigError(f"{path} must be the metadata of a set of features, but {error}") from error
        if not 0 < metadata.count == about["count"] or min(metadata.shape) < 1:
            raise ConfigError(
                f"{path} must count the same images in all and in its shards, found {about['count']} and "
                f"{metadata.count} of {_times(metadata.shape)}"
            )
        return metadata


def write_shard(path: pathlib.Path, features: Float16[np.ndarray, "N V h w D"]) -> Shard:
    """Writes the records to `path`, whole or not at all.

    Raises DataError for features that are not finite, and OSError for a disk that is full.
    """
    if features.dtype != np.float16 or not np.isfinite(features).all():
        raise DataError(f"the features for {path} must be finite in float16, found NaN or infinity")
    views = features.reshape(-1, *features.shape[2:])
    return record_files.write(path, (np.asarray(view, "<f2").tobytes() for view in views))


class FeatureSet:
    """The set in `path`: `view(index, mirrored)` from any thread or process.

    Raises ConfigError, before any record is read, for metadata that are damaged and for missing or cut shards.
    """

    def __init__(self, path: str):
        folder = pathlib.Path(path)
        self.path, self.metadata = path, FeatureMetadata.read(folder)
        record = np.dtype([("features", "<f2", self.metadata.shape)])
        self._records = RecordFiles(folder, self.metadata.shards, record)
        self.fingerprint = hash_of(["features", json.dumps(dataclasses.asdict(self.metadata), sort_keys=True)])

    def __len__(self) -> int:
        return self.metadata.count

    @property
    def bytes(self) -> int:
        """Bytes of a view."""
        return 2 * math.prod(self.metadata.shape)

    def view(self, index: int, mirrored: bool) -> Float16[np.ndarray, "h w D"]:
        """Features of an image of the set, or of its mirror image. Raises DataError for a damaged record."""
        return self._records[index * self.metadata.views + int(mirrored)]["features"]

    def check(self, source: Source, config: DataConfig, grid: int) -> None:
        """Raises ConfigError unless these are features of the images of `source`, which `config` names, on a square
        of `grid` tokens a side."""
        about: Any = getattr(source, "metadata", None) if config.latents else None
        images = about.images if config.latents else source.fingerprint
        size = about.image_size if config.latents else config.image_size
        found = self.metadata
        if images is None:
            raise ConfigError(
                f"align.features must be of the images of the latents in {config.path!r}, which do not note theirs, as "
                "sets of an earlier version: prepare the latents again"
            )
        if (found.images, found.count) != (images, len(source)):
            raise ConfigError(
                f"align.features must be of the images that are trained on ({len(source):,}, fingerprint {images}), "
                f"found features of {found.count:,} with fingerprint {found.images} in {self.path!r}"
            )
        if found.image_size != size:
            raise ConfigError(
                f"align.features must be of images of {size} pixels, as those that are trained on, found "
                f"{found.image_size} in {self.path!r}"
            )
        if found.shape[:2] != (grid, grid):
            raise ConfigError(
                f"align.features must have a feature for each of the {grid}x{grid} tokens of the model, found "
                f"{_times(found.shape[:2])} in {self.path!r}: prepare them with --tokens {grid}"
            )
        if config.flip and not found.flips:
            raise ConfigError(
                f"data.flip needs features of both views, but those in {self.path!r} were prepared without flips: "
                "set data.flip to False, or prepare them again"
            )


class Featured:
    """The images of `images` beside their `features`, as a source."""

    def __init__(self, images: Source, features: FeatureSet):
        self.images, self.features = images, features
        self.class_names = images.class_names
        self.metadata: Any = getattr(images, "metadata", None)
        """Those of latents."""
        self.fingerprint = hash_of([images.fingerprint, features.fingerprint])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        return self.images[index]


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
