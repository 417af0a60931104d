"""Images and captions prepared once for a model of Stable Diffusion: VAE moments and text states, in record files.

A set is a folder of shards and `metadata.json`. A record is float16 moments [1, h, w, 2C] (the mean and the
log-variance of each of C channels, unscaled) and text states [N, D]; with two text towers also the pooled state [P] and
the six sizes (`captions.CaptionedImages`) as int32.
"""

import dataclasses
import json
import pathlib

import numpy as np
from jaxtyping import Shaped

from gspn_jax.config import ConfigError
from gspn_jax.data import record_files
from gspn_jax.data.decoding import DataError
from gspn_jax.data.latents import LatentBatches
from gspn_jax.data.loader import Loader
from gspn_jax.data.record_files import RecordFiles, Shard
from gspn_jax.data.set_metadata import SetMetadata, find, read_versioned
from gspn_jax.data.source import hash_of
from gspn_jax.data.thread_loader import ThreadLoader
from gspn_jax.small_files import DamagedFile, typed

VERSION = 1

_NOTED = ("images", "left_out", "cut")
"""Entries of the metadata that make no other set of it: no part of the fingerprint."""


@dataclasses.dataclass(frozen=True)
class CaptionMetadata(SetMetadata):
    """Contents of the `metadata.json` of a set."""

    FORMAT = "gspn-jax captions"

    files: dict[str, str]
    """SHA-256 of the files that made it, by their path in the folder of the model."""
    image_size: int
    """Side of the images that were encoded, in pixels."""
    latent_shape: tuple[int, int, int]
    """[h, w, C] of a latent; the moments have 2C channels."""
    context_shape: tuple[int, int]
    """[N, D] of the text states."""
    pooled_width: int
    """Width of the pooled text state; 0 where there is none."""
    scaling_factor: float
    """Factor by which a latent is multiplied before it is trained on, after `shift_factor` was taken off."""
    shift_factor: float
    images: str
    """The fingerprint of the images and captions."""
    left_out: dict[str, int]
    """Things found with them that are not in the set, bad images among them, and how many."""
    cut: int
    """Captions of more tokens than the text towers see."""
    shards: tuple[Shard, ...]
    crop: str = "adm_center"
    """The rule by which images were cropped: openai/guided-diffusion, `center_crop_arr`."""
    moments: str = "mean, logvar; unscaled"
    dtype: str = "float16"
    version: int = VERSION

    @classmethod
    def read(cls, folder: pathlib.Path) -> "CaptionMetadata":
        """Raises ConfigError unless `folder` holds metadata of this version whose counts agree with each other."""
        path = find(folder, "data.path", "captions")
        try:
            about = read_versioned(path, cls.FORMAT, VERSION, {"count": int})
            metadata = typed(about, cls, path.name)
            record_files.check_names(metadata.shards, path.name)
        except DamagedFile as error:
            raise ConfigError(f"{path} must be the metadata of a set of captions, but {error}") from error
        if not 0 < metadata.count == about["count"]:
            raise ConfigError(
                f"{path} must count the same images in all and in its shards, found {about['count']} and "
                f"{metadata.count}"
            )
        return metadata


def record_type(latent_shape: tuple[int, int, int], context_shape: tuple[int, int], pooled_width: int) -> np.dtype:
    """A record of the set, as NumPy reads it."""
    height, width, channels = latent_shape
    fields = [("moments", "<f2", (1, height, width, 2 * channels)), ("context", "<f2", context_shape)]
    if pooled_width:
        fields += [("pooled", "<f2", (pooled_width,)), ("sizes", "<i4", (6,))]
    return np.dtype(fields)


def write_shard(path: pathlib.Path, records: Shaped[np.ndarray, " N"]) -> Shard:
    """Writes records of `record_type` to `path`, whole or not at all. Raises DataError for some that are not finite,
    and OSError for a disk that is full."""
    for name in records.dtype.names or ():
        if not np.isfinite(records[name]).all():
            raise DataError(f"the {name} for {path} must be finite in float16, found NaN or infinity")
    return record_files.write(path, (record.tobytes() for record in records))


class CaptionedLatents:
    """The set in `path`: random access to {"moments", "context"}, with two text towers also {"pooled", "sizes"}.

    Raises ConfigError, before any record is read, for metadata that are damaged and for missing or cut shards.
    """

    class_names: tuple[str, ...] = ("",)

    def __init__(self, path: str):
        folder = pathlib.Path(path)
        self.metadata = metadata = CaptionMetadata.read(folder)
        self._record = record_type(metadata.latent_shape, metadata.context_shape, metadata.pooled_width)
        self._records = RecordFiles(folder, metadata.shards, self._record)
        about = {name: value for name, value in dataclasses.asdict(metadata).items() if name not in _NOTED}
        self.fingerprint = hash_of(["captions", json.dumps(about, sort_keys=True)])

    def __len__(self) -> int:
        return self.metadata.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        """Raises DataError for a damaged record."""
        record = self._records[index]
        return {name: record[name] for name in self._record.names or ()}


def make_loader(
    source: CaptionedLatents, *, batch_size: int, seed: int, start_step: int = 0, num_hosts: int = 1, host: int = 0
) -> Loader:
    """Endless batches {"image": float32 [b, h, w, C], "context": float16 [b, N, D], ...}, b = batch_size / num_hosts.

    "image" is a posterior sample of each latent, scaled, drawn anew each epoch; order, hosts and seeds are those of
    `loader.make_loader`.
    """
    if batch_size % num_hosts:
        raise ConfigError(
            f"train.batch_size must be a multiple of the number of hosts ({num_hosts}), found {batch_size}"
        )
    batches = LatentBatches(source, batch_size=batch_size // num_hosts, seed=seed, flip=False)
    return ThreadLoader(batches, first=start_step * num_hosts + host, stride=num_hosts)
