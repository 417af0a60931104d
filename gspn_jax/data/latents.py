"""Latents prepared once: VAE moments of every image in array_record shards, from which the loader draws at each visit.

A set is a folder of shards and `metadata.json`. A record is an int32 label followed by float16 moments [V, h, w, 2C],
both little-endian: the mean and the log-variance of each of C channels, unscaled, of V views: the image and, if the
set has flips, its mirror image (flipping a latent is not encoding the flipped image).
"""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any, Protocol

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Float16, Float32, Int32, UInt16
from scipy.special import ndtri

from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data import record_files
from gspn_jax.data.decoding import DataError
from gspn_jax.data.image_batches import beside
from gspn_jax.data.record_files import RecordFiles, Shard
from gspn_jax.data.set_metadata import SetMetadata, find
from gspn_jax.data.source import Views, hash_of
from gspn_jax.small_files import DamagedFile, read_as, typed

FORMAT_VERSION = 1
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0
"""The range of the VAE's log-variance (CompVis/latent-diffusion, `DiagonalGaussianDistribution`)."""

_NOTED = ("images",)
"""Entries of the metadata that make no other set of it: no part of the fingerprint."""
_LOOKED_AT = 16
"""Records, spread over the set, that are read, and their labels looked at, before training begins."""

_TOGETHER = 64
"""Rows that are drawn by one call of each NumPy function: in one call a row, two threads would mostly wait for one
another; in one call a batch, the values would not stay in the cache."""
_ROUNDS = 4
"""Rounds of the cipher that permutes an epoch, as in Grain's own shuffle."""
_BLOCK = 16
"""16-bit values in a block of Philox, which its counter counts."""


@dataclasses.dataclass(frozen=True)
class LatentMetadata(SetMetadata):
    """Contents of the `metadata.json` of a set of latents."""

    FORMAT = "gspn-jax latents"

    vae_sha256: str
    """SHA-256 of the file of VAE weights."""
    image_size: int
    """Side of the images that were encoded, in pixels."""
    latent_shape: tuple[int, int, int]
    """[h, w, C] of a latent; the moments have 2C channels."""
    scaling_factor: float
    """Factor by which a latent is multiplied before it is trained on, after `shift_factor` was taken off."""
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    shards: tuple[Shard, ...]
    flips: bool = True
    shift_factor: float = 0.0
    crop: str = "adm_center"
    """The rule by which images were cropped: openai/guided-diffusion, `center_crop_arr`."""
    moments: str = "mean, logvar; unscaled"
    dtype: str = "float16"
    images: str | None = None
    """The fingerprint of the images that were encoded; None in a set of an earlier version."""
    version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: pathlib.Path) -> "LatentMetadata":
        """Raises ConfigError unless `folder` holds metadata of this version whose counts agree with each other."""
        path = find(folder, "data.path", "latents", "of latents ")
        try:
            about = read_as(path, {"version": int, "count": int})
            if about["version"] != FORMAT_VERSION:
                raise ConfigError(
                    f"{path} must be of format version {FORMAT_VERSION}, found {about['version']!r}: prepare the "
                    "latents again"
                )
            about = {"shift_factor": 0.0} | about  # sets from before it was written
            metadata, count = typed(about, cls, path.name), about["count"]
            record_files.check_names(metadata.shards, path.name)
        except DamagedFile as error:
            raise ConfigError(f"{path} must be the metadata of a set of latents, but {error}") from error
        if not count == metadata.count == sum(metadata.class_counts):
            raise ConfigError(
                f"{path} must count the same latents in all, in its shards and in its classes, found "
                f"{count}, {metadata.count} and {sum(metadata.class_counts)}"
            )
        return metadata


def write_shard(
    path: pathlib.Path, labels: Int32[np.ndarray, " N"], moments: Float16[np.ndarray, "N V h w moments"]
) -> Shard:
    """Writes the records to `path` by way of a temporary file, so that a shard is whole or absent.

    Raises DataError for moments that are not finite, and OSError for a disk that is full.
    """
    if moments.dtype != np.float16 or not np.isfinite(moments).all():
        raise DataError(
            f"the moments for {path} must be finite float16, found {moments.dtype} of magnitude up to "
            f"{np.abs(moments).max()}"
        )
    rows = zip(labels, moments, strict=True)
    return record_files.write(
        path, (np.asarray(label, "<i4").tobytes() + np.asarray(values, "<f2").tobytes() for label, values in rows)
    )


def record_type(latent_shape: tuple[int, int, int], flips: bool) -> np.dtype:
    """A record of the set, as NumPy reads it."""
    height, width, channels = latent_shape
    return np.dtype([("label", "<i4"), ("moments", "<f2", (1 + flips, height, width, 2 * channels))])


class LatentSource:
    """The set of latents in `config.path`.

    Raises ConfigError, before anything is read, for metadata that do not fit `config` and for missing or cut shards.
    """

    def __init__(self, config: DataConfig):
        folder = pathlib.Path(config.path)
        self.metadata = metadata = LatentMetadata.read(folder)
        wanted, found = (config.image_size, config.image_size, config.channels), metadata.latent_shape
        if found != wanted:
            raise ConfigError(
                f"data.image_size and data.channels ask for latents of {_times(wanted)}, but those in "
                f"{config.path!r} are {_times(found)}"
            )
        if config.flip and not metadata.flips:
            raise ConfigError(
                f"data.flip needs latents of both views, but those in {config.path!r} were prepared "
                f"without flips: set data.flip to False, or prepare them again"
            )
        self._records = RecordFiles(folder, metadata.shards, record_type(metadata.latent_shape, metadata.flips))
        self.class_names = metadata.class_names
        about = {name: value for name, value in dataclasses.asdict(metadata).items() if name not in _NOTED}
        if not metadata.shift_factor:  # as sets from before it was written
            del about["shift_factor"]
        self.fingerprint = hash_of(["latents", json.dumps(about, sort_keys=True)])
        for index in np.unique(np.linspace(0, len(self) - 1, min(_LOOKED_AT, len(self))).astype(int)):
            with contextlib.suppress(DataError):  # what is damaged is met where it is read
                record = self._records[int(index)]
                self._check_label(int(index), record["label"], ConfigError)

    def __len__(self) -> int:
        return self.metadata.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        """{"moments": float16 [V, h, w, 2C], "label": int32}. Raises DataError for a damaged record, and for a label of
        no class."""
        values = self._records[index]
        self._check_label(index, values["label"], DataError)
        return {"moments": values["moments"], "label": values["label"]}

    def _check_label(self, index: int, label: np.int32, failure: type[Exception]) -> None:
        if not 0 <= label < len(self.class_names):
            raise failure(
                f"{self._records.name(index)} must have a label in 0..{len(self.class_names) - 1}, as the metadata has "
                f"so many classes, found {label}"
            )


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class MomentSource(Protocol):
    """A source of moments, and of whatever else its records have."""

    @property
    def metadata(self) -> Any:
        """With `latent_shape`, `scaling_factor` and `shift_factor`."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"moments": float16 [V, h, w, 2C], ...}, the others of one shape and type each."""
        ...


class LatentBatches:
    """batches(k): batch k of an endless stream, {"image": float32 [b, h, w, C], "label": int32 [b]}; of another source
    with what its records have in place of the label.

    Every epoch has every record once in an order of its own. A row's view and posterior sample, scaled,
    mean + exp(logvar / 2) * noise, depend on `seed` and the row's place in the stream only, whatever the batch size.
    The noise is of variance 1 in 65,536 equally likely levels, as fine as the float16 moments that it is added to.
    Levels, means and deviations are looked up, and a batch draws its random bits at once: NumPy's normal numbers,
    conversion, exponential and a generator a row would take two thirds of the loader's time.
    """

    def __init__(self, source: MomentSource, *, batch_size: int, seed: int, flip: bool, features: Views | None = None):
        """With `features` there is "features" float16 [b, h, w, D] too, of the view that is drawn."""
        self._features = features
        self._source, self._batch_size, self._seed, self._flip = source, batch_size, seed, flip
        self._levels = _normal_levels()
        scale = np.float32(source.metadata.scaling_factor)
        values = np.arange(2**16, dtype=np.uint16).view(np.float16)
        values = np.where(np.isfinite(values), values, 0).astype(np.float32)
        self._means = scale * (values - np.float32(source.metadata.shift_factor))
        self._deviations = scale * np.exp(np.clip(values, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE) / 2)

    def __call__(self, batch: int) -> dict[str, np.ndarray]:
        places = range(batch * self._batch_size, (batch + 1) * self._batch_size)
        arrays = {"image": np.empty((len(places), *self._source.metadata.latent_shape), np.float32)}
        order, bits = self._order(places), self._random_bits(places)
        views = bits[:, 0] & 1 if self._flip else np.zeros(len(bits), int)
        for start in range(0, len(places), _TOGETHER):
            rows = slice(start, start + _TOGETHER)
            records = [self._source[index] for index in order[rows]]
            moments = [record.pop("moments") for record in records]
            self._draw(moments, views[rows], bits[rows], arrays["image"][rows])
            for name, value in records[0].items():
                if name not in arrays:
                    arrays[name] = np.empty((len(places), *np.shape(value)), value.dtype)
                arrays[name][rows] = [record[name] for record in records]
        return arrays | beside(self._features, order, views)

    def _order(self, places: range) -> list[int]:
        """The record at each place: Grain's permutation by arithmetic, without Grain's time for each element."""
        length = len(self._source)
        epochs = range(places[0] // length, places[-1] // length + 1)
        seeds = {epoch: int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0]) for epoch in epochs}
        return [
            index_shuffle(place % length, max_index=length - 1, seed=seeds[place // length], rounds=_ROUNDS)
            for place in places
        ]

    def _random_bits(self, places: range) -> UInt16[np.ndarray, "b n"]:
        """For each place its own blocks of Philox's stream: one value for the view, then one for each of the latent."""
        blocks = -(-(1 + int(np.prod(self._source.metadata.latent_shape))) // _BLOCK)
        words = np.random.Philox(key=self._seed, counter=places[0] * blocks).random_raw(len(places) * blocks * 4)
        return words.astype("<u8", copy=False).view("<u2").reshape(len(places), blocks * _BLOCK)

    def _draw(
        self, moments: list[np.ndarray], views: np.ndarray, bits: UInt16[np.ndarray, "b n"], out: np.ndarray
    ) -> None:
        mean, log_variance = (np.empty(out.shape, np.uint16) for _ in range(2))
        for row, (record, view) in enumerate(zip(moments, views, strict=True)):
            # the bits of each half, copied a pixel at a time rather than a value at a time
            pixels = record[view].view(f"V{2 * out.shape[-1]}")
            mean[row].view(pixels.dtype)[...] = pixels[..., :1]
            log_variance[row].view(pixels.dtype)[...] = pixels[..., 1:]
        # "clip" changes nothing, no index being out of range, but spares NumPy's buffer for errors
        self._levels.take(bits[:, 1 : 1 + out[0].size].reshape(out.shape), mode="clip", out=out)
        out *= self._deviations.take(log_variance, mode="clip")
        out += self._means.take(mean, mode="clip")


def _normal_levels() -> Float32[np.ndarray, "65536"]:
    levels = ndtri((np.arange(2**16) + 0.5) / 2**16)
    return (levels / levels.std()).astype(np.float32)


def write_synthetic(
    folder: pathlib.Path,
    *,
    records: int,
    shards: int = 1,
    latent_shape: tuple[int, int, int] = (32, 32, 4),
    num_classes: int = 1000,
    flips: bool = True,
    seed: int = 0,
) -> LatentMetadata:
    """A set of random moments in the format of a real one, for tests and benchmarks."""
    rng = np.random.default_rng(seed)
    height, width, channels = latent_shape
    folder.mkdir(parents=True, exist_ok=True)
    written, counts = [], np.zeros(num_classes, int)
    for number, size in enumerate(len(part) for part in np.array_split(np.arange(records), shards)):
        labels = rng.integers(num_classes, size=size, dtype=np.int32)
        moments = rng.standard_normal((size, 1 + flips, height, width, 2 * channels), np.float32)
        moments[..., :channels] *= 5
        moments[..., channels:] -= 4
        written.append(write_shard(folder / shard_name(number, shards), labels, moments.astype(np.float16)))
        counts += np.bincount(labels, minlength=num_classes)
    metadata = LatentMetadata(
        vae_sha256="0" * 64,
        image_size=8 * height,
        latent_shape=latent_shape,
        scaling_factor=0.18215,
        class_names=tuple(f"class {i}" for i in range(num_classes)),
        class_counts=tuple(map(int, counts)),
        shards=tuple(written),
        flips=flips,
    )
    metadata.write(folder)
    return metadata


def shard_name(number: int, count: int) -> str:
    return record_files.shard_name("latents", number, count)
