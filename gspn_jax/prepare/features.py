"""Images to features of a frozen network, once: the tokens of every image and of its mirror image, shard by shard
(`shards`)."""

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float16

from gspn_jax.config import ConfigError
from gspn_jax.data.ahead import Record
from gspn_jax.data.source import Source
from gspn_jax.prepare.images import CHANNELS, ImageFlags
from gspn_jax.prepare.shards import Note, ShardFlags, Shards
from gspn_jax.tables import FEATURE_NETWORKS

if TYPE_CHECKING:
    from gspn_jax.data.features import FeatureMetadata
    from gspn_jax.metrics.extractor import Extractor

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features(ImageFlags, ShardFlags):
    """Compute features once, for training that is aligned with them: give --images, --tars, --tfds, --records or
    --digits."""

    KINDS: ClassVar[tuple[str, ...]] = (*ImageFlags.KINDS, "records", "digits")

    records: str | None = None
    """A folder of images that `gspn_jax.prepare images` decoded."""
    digits: bool = False
    """The digits of scikit-learn."""
    unconditional: bool = False
    """The images of --images are any below the folder, as with data.unconditional, whatever its folders are."""
    output: str
    """The folder to write, which a training run then takes as align.features."""
    network: str = "dinov2"
    """The feature network, one whose line has `tokens`."""
    weights: str
    """Its weights: of DINOv2 a folder of transformers, or a file."""
    tokens: int = 16
    """Side of the square of tokens that the trained model has: of its image or latent, over its patch."""
    image_size: int = 256
    """Side of the square that each image is scaled and cropped to, as ADM does, before the network scales it: that of
    the images or latents that are trained on."""
    flips: bool = True
    """Compute those of the mirror image too: twice the time and the disk."""
    shard_size: int = 512
    """Images a file, which are held in memory until it is written; a killed run loses at most the file it was
    writing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("image_size", "tokens")
        if self.unconditional and not self.images:
            raise ConfigError("--unconditional is for the images of --images, found others")

    def _open(self, image_size: int | None) -> Source:
        if self.digits:
            from gspn_jax.data.digits import SIDE, DigitsSource

            return DigitsSource(image_size or SIDE, CHANNELS)
        if self.records:
            from gspn_jax.data.records import RecordSource

            return RecordSource(self.records, image_size, CHANNELS)
        if self.images and self.unconditional:
            from gspn_jax.data.flat_folder import FlatFolder

            return FlatFolder(self.images, image_size, CHANNELS)
        return super()._open(image_size)


def prepare_features(arguments: Features) -> None:
    """Writes this host's shards of the set that `arguments` ask for and, on host 0, the metadata of the whole.

    Raises ConfigError, WeightsError or DataError with one sentence for what cannot be used; OSError for a full disk.
    """
    import jax

    from gspn_jax.data.features import FeatureMetadata
    from gspn_jax.data.set_metadata import METADATA
    from gspn_jax.metrics.extractor import Extractor

    # --- what can be wrong is found first
    network, params, digest = _network(arguments)
    source = arguments.source(arguments.image_size)
    extractor = Extractor(params, batch_size=arguments.batch_size, network=network)
    images = jax.ShapeDtypeStruct((1, arguments.image_size, arguments.image_size, CHANNELS), np.uint8)
    shape = jax.eval_shape(lambda x: network.network(params, network.resize(x)), images).shape[1:]
    settings = {
        "network": arguments.network,
        "network_sha256": digest,
        "images": source.fingerprint,
        "image_size": arguments.image_size,
        "shape": list(shape),
        "flips": arguments.flips,
        "bad_images": arguments.bad_images,
        "shard_size": arguments.shard_size,
        "batch_size": arguments.batch_size,
    }
    shards = Shards(arguments, settings, count=len(source), stem="features", noted={"images": int})
    if (shards.output / METADATA).exists():
        _check_finished(shards, FeatureMetadata.read(shards.output, "--output"), settings)
        return

    # --- this host's shards that are not there yet
    shards.begin((1 + arguments.flips) * 2 * int(np.prod(shape)))
    encoding = _Encoding(extractor, arguments.flips)
    shards.fill(source, encoding.encode, encoding.write)

    # --- the metadata of the whole
    if not shards.is_last(shards.output / METADATA):
        return
    metadata = FeatureMetadata(
        network=arguments.network,
        network_sha256=digest,
        image_size=arguments.image_size,
        shape=shape,
        images=source.fingerprint,
        shards=(),
        flips=arguments.flips,
    )
    shards.finish(shards.output / METADATA, lambda notes: _write_metadata(shards, notes, metadata))


def _network(arguments: Features) -> tuple[Any, Any, str]:
    """(network of tokens, its parameters, their digest). Raises ConfigError or WeightsError for what cannot be used."""
    from gspn_jax.metrics.networks import choose

    if arguments.network not in FEATURE_NETWORKS:
        known = ", ".join(map(repr, FEATURE_NETWORKS))
        raise ConfigError(f"--network must be one of {known}, found {arguments.network!r}")
    network, path = choose(arguments.network, arguments.weights, "--weights")
    if not hasattr(network, "tokens"):
        raise ConfigError(f"--network must be one that has features of tokens, found {arguments.network!r}")
    tensors = network.read(path)
    return network.tokens(arguments.tokens), network.from_state_dict(tensors), network.digest(tensors)


def _check_finished(shards: Shards, found: "FeatureMetadata", settings: dict[str, Any]) -> None:
    """Says that a set is complete. Raises ConfigError unless it is what would be made now."""
    names = ("network", "network_sha256", "images", "image_size", "flips")
    changed = [name for name in names if getattr(found, name) != settings[name]]
    if list(found.shape) != settings["shape"]:
        changed.append("tokens")
    shards.refuse_changed(changed)
    shards.remove_notes()  # unless a kill came between the metadata and this
    print(f"{shards.output} is complete: features of {found.count:,} images")


@dataclasses.dataclass(frozen=True)
class _Encoding:
    """Records to features in float16, batch by batch, and those to a shard."""

    extractor: "Extractor"
    flips: bool

    def encode(self, records: Sequence[Record]) -> Float16[np.ndarray, "N V h w D"]:
        """Features of the images and, with `flips`, of their mirror images."""
        images = np.stack([record["image"] for record in records])
        views = [images, np.ascontiguousarray(images[:, :, ::-1])] if self.flips else [images]
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, which is not written
            found = [np.asarray(self.extractor(view)[0])[: len(images)].astype(np.float16) for view in views]
        return np.stack(found, axis=1)

    def write(self, path: pathlib.Path, batches: list[np.ndarray]) -> Note:
        from gspn_jax.data.features import write_shard

        features = np.concatenate(batches)
        write_shard(path, features)
        return {"images": len(features)}


def _write_metadata(shards: Shards, notes: list[Note], metadata: "FeatureMetadata") -> str:
    from gspn_jax.data.record_files import Shard

    made = tuple(
        Shard(path.name, note["images"] * metadata.views, note["bytes"])
        for path, note in zip(shards.paths, notes, strict=True)
    )
    metadata = dataclasses.replace(metadata, shards=made)
    metadata.write(shards.output)
    return f"features of {metadata.count:,} images in {shards.output}"
