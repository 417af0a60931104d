"""Images to latents, once: every image and its mirror image, encoded shard by shard (`shards`)."""

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_jax.config import ConfigError
from gspn_jax.data.ahead import Record
from gspn_jax.files import sha256_of
from gspn_jax.prepare.images import CHANNELS, ImageFlags
from gspn_jax.prepare.shards import Note, ShardFlags, Shards

if TYPE_CHECKING:
    from gspn_jax import autoencoder
    from gspn_jax.data.latents import LatentMetadata
    from gspn_jax.data.source import Source

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latents(ImageFlags, ShardFlags):
    """Encode images once: give --images, --tars or --tfds."""

    vae: str
    """The autoencoder: a folder of diffusers, or a file such as sd-vae-ft-ema's or sd-vae-ft-mse's (both encode alike),
    .safetensors or .bin."""
    vae_scale: float | None = None
    """Factor of latents, where no config.json beside the weights tells: 0.18215 (Stable Diffusion 1 and 2)
    by default, 0.13025 of SDXL's."""
    vae_shift: float | None = None
    """Number that is taken off latents before, 0 by default."""
    image_size: int = 256
    """Side of the square that each image is scaled and cropped to, as ADM does."""
    flips: bool = True
    """Encode the mirror image too: twice the time and the disk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("image_size")

    def scale(self) -> "autoencoder.Scale | None":
        """Scale and shift that the flags tell."""
        from gspn_jax import autoencoder

        if self.vae_scale is None:
            if self.vae_shift is not None:
                raise ConfigError(f"--vae-shift needs --vae-scale, found {self.vae_shift} alone")
            return None
        return autoencoder.check_scale(self.vae_scale, self.vae_shift or 0.0, "--vae-scale")


def prepare_latents(arguments: Latents) -> None:
    """Writes this host's shards of the set that `arguments` ask for and, on host 0, the metadata of the whole.

    Raises ConfigError, WeightsError or DataError with one sentence for what cannot be used; OSError for a full disk.
    """
    from gspn_jax import autoencoder
    from gspn_jax.data.latents import LatentMetadata, record_type
    from gspn_jax.data.set_metadata import METADATA

    # --- what can be wrong is found first
    vae_file = autoencoder.weights_file(arguments.vae)
    weights, config = autoencoder.load(vae_file, arguments.scale())
    if config.image_channels != CHANNELS or arguments.image_size % config.factor:
        raise ConfigError(
            f"--image-size must be a multiple of {config.factor} and the autoencoder one of RGB images, "
            f"found {arguments.image_size} and {config.image_channels} channels"
        )
    log.info("latents are trained on as (latent - %g) * %g", config.shift_factor, config.scaling_factor)
    source = arguments.source(arguments.image_size)
    vae_sha256 = sha256_of(vae_file)
    settings = {
        "vae_sha256": vae_sha256,
        "scale": [config.scaling_factor, config.shift_factor],
        "images": source.fingerprint,
        "image_size": arguments.image_size,
        "flips": arguments.flips,
        "bad_images": arguments.bad_images,
        "shard_size": arguments.shard_size,
        "batch_size": arguments.batch_size,
    }
    shards = Shards(arguments, settings, count=len(source), stem="latents", noted={"classes": list[int]})
    if (shards.output / METADATA).exists():
        _check_finished(shards, LatentMetadata.read(shards.output), settings, source)
        return

    # --- this host's shards that are not there yet
    side = arguments.image_size // config.factor
    latent_shape = (side, side, config.latent_channels)
    shards.begin(record_type(latent_shape, arguments.flips).itemsize)
    encoding = _Encoding(
        autoencoder.Autoencoder(weights, config, batch_size=arguments.batch_size),
        arguments.flips,
        len(source.class_names),
    )
    shards.fill(source, encoding.encode, encoding.write)

    # --- the metadata of the whole
    if not shards.is_last(shards.output / METADATA):
        return
    metadata = LatentMetadata(
        vae_sha256=vae_sha256,
        image_size=arguments.image_size,
        latent_shape=latent_shape,
        flips=arguments.flips,
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor,
        class_names=source.class_names,
        class_counts=(),
        shards=(),
        images=source.fingerprint,
    )
    shards.finish(shards.output / METADATA, lambda notes: _write_metadata(shards, notes, metadata))


def _check_finished(shards: Shards, found: "LatentMetadata", settings: dict[str, Any], source: "Source") -> None:
    """Says that a set is complete. Raises ConfigError unless it is what would be made now."""
    changed = [name for name in ("vae_sha256", "image_size", "flips") if getattr(found, name) != settings[name]]
    if [found.scaling_factor, found.shift_factor] != settings["scale"]:
        changed.append("scale")
    if found.images not in (None, settings["images"]) or tuple(found.class_names) != tuple(source.class_names):
        changed.append("images")
    shards.refuse_changed(changed)
    shards.remove_notes()  # unless a kill came between the metadata and this
    print(
        f"{shards.output} is complete: {found.count:,} latents of {len(found.class_names)} classes"
        + ("" if found.images else "; of which images is not noted in a set of an earlier version")
    )


@dataclasses.dataclass(frozen=True)
class _Encoding:
    """Records to labels and moments in float16, batch by batch, and those to a shard."""

    vae: "autoencoder.Autoencoder"
    flips: bool
    classes: int

    def encode(self, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
        """Labels, and moments [N, V, h, w, 2C] of the images and, with `flips`, of their mirror images."""
        images = np.stack([record["image"] for record in records])
        views = [images, images[:, :, ::-1]] if self.flips else [images]
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, which is not written
            moments = np.stack([self.vae.encode(view).astype(np.float16) for view in views], axis=1)
        return np.array([record["label"] for record in records], np.int32), moments

    def write(self, path: pathlib.Path, batches: list[tuple[np.ndarray, np.ndarray]]) -> Note:
        from gspn_jax.data.latents import write_shard

        labels, moments = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        write_shard(path, labels, moments)
        return {"classes": np.bincount(labels, minlength=self.classes).tolist()}


def _write_metadata(shards: Shards, notes: list[Note], metadata: "LatentMetadata") -> str:
    from gspn_jax.data.record_files import Shard

    made = tuple(
        Shard(path.name, sum(note["classes"]), note["bytes"]) for path, note in zip(shards.paths, notes, strict=True)
    )
    counts = np.sum([note["classes"] for note in notes], axis=0)
    metadata = dataclasses.replace(metadata, shards=made, class_counts=tuple(counts.tolist()))
    metadata.write(shards.output)
    return f"{metadata.count:,} latents of {len(counts)} classes in {shards.output}"
