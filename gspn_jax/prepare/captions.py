"""Images with captions to VAE moments and text states of a model of Stable Diffusion, once (`shards`)."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_jax.config import ConfigError
from gspn_jax.data.ahead import Record
from gspn_jax.data.captions import CaptionedImages, open_folder, open_tars
from gspn_jax.prepare.images import CHANNELS
from gspn_jax.prepare.shards import Note, ShardFlags, Shards

if TYPE_CHECKING:
    import pathlib

    from gspn_jax.data.captioned_latents import CaptionMetadata
    from gspn_jax.text_to_image.folder import Encoders

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions(ShardFlags):
    """Encode images and their captions once: give --images or --tars."""

    model: str
    """Folder of Stable Diffusion 1, 2 or SDXL, as diffusers writes it, whose VAE and text towers encode."""
    images: str | None = None
    """A folder of images, each with NAME.txt or NAME.json beside NAME.jpg, or with --captions."""
    captions: str | None = None
    """A file of the captions of --images: .parquet, .jsonl, or .json such as COCO's."""
    tars: str | None = None
    """Webdataset tars, a file or a folder of them, each image with a .txt or .json of its name."""
    caption_field: str | None = None
    """Field of captions in JSON and columns; by default caption, text or prompt."""
    image_size: int = 512
    """Side of the square that each image is scaled and cropped to, as ADM does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("image_size")
        if bool(self.images) == bool(self.tars):
            raise ConfigError(f"one of --images and --tars must be given, found {'both' if self.images else 'neither'}")
        if self.captions and not self.images:
            raise ConfigError("--captions is of the images of --images, found --tars, which hold theirs")

    def source(self) -> CaptionedImages[Any]:
        """The images and captions. Raises ConfigError for a set it cannot read."""
        if self.images:
            found = open_folder(self.images, self.image_size, field=self.caption_field, captions=self.captions)
        else:
            found = open_tars(self.tars or "", self.image_size, field=self.caption_field)
        log.info("found %s images with captions", f"{len(found):,}")
        return found


def prepare_captions(arguments: Captions) -> None:
    """Writes this host's shards of the set that `arguments` ask for and, on host 0, the metadata of the whole.

    Raises ConfigError, WeightsError or DataError with one sentence for what cannot be used; OSError for a full disk.
    """
    from gspn_jax.data.captioned_latents import CaptionMetadata, record_type
    from gspn_jax.data.set_metadata import METADATA
    from gspn_jax.text_to_image.folder import encoder_hashes, load_encoders

    # --- what can be wrong is found first
    encoders = load_encoders(arguments.model)
    config = encoders.autoencoder_config
    if config.image_channels != CHANNELS or arguments.image_size % config.factor:
        raise ConfigError(
            f"--image-size must be a multiple of {config.factor} and the autoencoder one of RGB images, "
            f"found {arguments.image_size} and {config.image_channels} channels"
        )
    source = arguments.source()
    settings = {
        "files": encoder_hashes(arguments.model),
        "images": source.fingerprint,
        "image_size": arguments.image_size,
        "bad_images": arguments.bad_images,
        "shard_size": arguments.shard_size,
        "batch_size": arguments.batch_size,
    }
    shards = Shards(
        arguments, settings, count=len(source), stem="captions", noted={"records": int, "cut": int, "skipped": int}
    )
    if (shards.output / METADATA).exists():
        found = CaptionMetadata.read(shards.output)
        shards.refuse_changed(
            [name for name in ("files", "images", "image_size") if getattr(found, name) != settings[name]]
        )
        shards.remove_notes()  # unless a kill came between the metadata and this
        print(f"{shards.output} is complete: {found.count:,} images with captions")
        return

    # --- this host's shards that are not there yet
    side, two = arguments.image_size // config.factor, len(encoders.texts) == 2
    metadata = CaptionMetadata(
        files=settings["files"],
        image_size=arguments.image_size,
        latent_shape=(side, side, config.latent_channels),
        context_shape=(encoders.texts[0].tokenizer.length, sum(part.config.width for part in encoders.texts)),
        pooled_width=(encoders.texts[1].config.projection or encoders.texts[1].config.width) if two else 0,
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor,
        images=source.fingerprint,
        left_out=source.left_out,
        cut=0,
        shards=(),
    )
    record = record_type(metadata.latent_shape, metadata.context_shape, metadata.pooled_width)
    shards.begin(record.itemsize)
    encoding = _Encoding(encoders, record, arguments.batch_size)
    shards.fill(source, encoding.encode, encoding.write)

    # --- the metadata of the whole
    if shards.is_last(shards.output / METADATA):
        shards.finish(shards.output / METADATA, lambda notes: _write_metadata(shards, notes, metadata))


class _Encoding:
    """Records to rows of the set, batch by batch over the devices of this host, and those to a shard."""

    def __init__(self, encoders: "Encoders", record: np.dtype, batch_size: int):
        import jax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec

        from gspn_jax.autoencoder import Autoencoder

        self._record = record
        self._vae = Autoencoder(encoders.autoencoder, encoders.autoencoder_config, batch_size=batch_size)
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
        self._place = lambda ids: jax.device_put(ids, split)
        self._texts = tuple(part._replace(params=jax.device_put(dict(part.params), whole)) for part in encoders.texts)

    def encode(self, records: Sequence[Record]) -> tuple[np.ndarray, int]:
        """Rows, and how many captions are longer than what the towers see."""
        from gspn_jax.text_to_image.conditions import encode_prompts

        captions = [record["caption"] for record in records]
        padded = [*captions, *[""] * (self._vae.batch_size - len(captions))]  # one shape, compiled once
        texts = encode_prompts(self._texts, padded, self._place)
        rows = np.zeros(len(records), self._record)
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, which is not written
            rows["moments"][:, 0] = self._vae.encode(np.stack([record["image"] for record in records]))
            rows["context"] = np.asarray(texts.context)[: len(records)]
            if texts.pooled is not None:
                rows["pooled"] = np.asarray(texts.pooled)[: len(records)]
                rows["sizes"] = [record["sizes"] for record in records]
        return rows, sum(map(bool, texts.cut[: len(records)]))

    def write(self, path: "pathlib.Path", batches: list[tuple[np.ndarray, int]]) -> Note:
        from gspn_jax.data.captioned_latents import write_shard

        rows, cut = zip(*batches, strict=True)
        return {"records": write_shard(path, np.concatenate(rows)).records, "cut": sum(cut)}


def _write_metadata(shards: Shards, notes: list[Note], metadata: "CaptionMetadata") -> str:
    from gspn_jax.data.record_files import Shard

    made = tuple(
        Shard(path.name, note["records"], note["bytes"]) for path, note in zip(shards.paths, notes, strict=True)
    )
    skipped, cut = (sum(note[name] for note in notes) for name in ("skipped", "cut"))
    left_out = metadata.left_out | ({"bad images": skipped} if skipped else {})
    metadata = dataclasses.replace(metadata, shards=made, left_out=left_out, cut=cut)
    metadata.write(shards.output)
    return f"{metadata.count:,} images with captions in {shards.output}" + (
        f"; captions longer than the {metadata.context_shape[0]} tokens that are read: {cut:,}" if cut else ""
    )
