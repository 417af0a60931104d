"""Images to latents, once: every image and its mirror image, encoded shard by shard; a killed run loses one shard."""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
import time
from typing import TYPE_CHECKING

import numpy as np

from gspn_jax.config import ConfigError
from gspn_jax.data.ahead import read_ahead
from gspn_jax.files import claim, replacing, sha256_of
from gspn_jax.prepare.hosts import check_share
from gspn_jax.prepare.images import CHANNELS, ImageFlags
from gspn_jax.small_files import DamagedFile, read_as

if TYPE_CHECKING:
    from gspn_jax import autoencoder

log = logging.getLogger(__name__)

_SPARE_RATIO, _SPARE_BYTES = 1.01, 2**18
"""Bytes that array_record adds to the records, and to each shard."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latents(ImageFlags):
    """Encode images once: give --images, --tars or --tfds."""

    vae: str
    """The autoencoder: a folder of diffusers, or a file such as sd-vae-ft-ema's or sd-vae-ft-mse's (both encode alike),
    .safetensors or .bin."""
    vae_scale: float | None = None
    """Factor of latents, where no config.json beside the weights tells: 0.18215 (Stable Diffusion 1 and 2)
    by default, 0.13025 of SDXL's."""
    vae_shift: float | None = None
    """Number that is taken off latents before, 0 by default."""
    output: str
    """The folder to write, which a training run then takes as data.path."""
    image_size: int = 256
    """Side of the square that each image is scaled and cropped to, as ADM does."""
    flips: bool = True
    """Encode the mirror image too: twice the time and the disk."""
    shard_size: int = 4096
    """Images a file; a killed run loses at most the file it was writing."""
    num_hosts: int = 1
    """Number of hosts that do not know one another; those of one job (docs/launch) need neither this nor `host`."""
    host: int = 0
    """Number of this host among `num_hosts`; 0 writes the metadata at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("image_size", "shard_size", "num_hosts")
        check_share(self.host, self.num_hosts)

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
    import jax

    from gspn_jax import autoencoder
    from gspn_jax.data.latents import METADATA, LatentMetadata, shard_name
    from gspn_jax.parallel.agreement import meet
    from gspn_jax.prepare.hosts import wait_until
    from gspn_jax.runs import same_hosts

    together = jax.process_count() > 1
    if together:
        arguments = dataclasses.replace(arguments, host=jax.process_index(), num_hosts=jax.process_count())

    # --- what can be wrong is found first
    output = pathlib.Path(arguments.output)
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
    output.mkdir(parents=True, exist_ok=True)
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
    same_hosts.check_values(settings | {"output": arguments.output})
    if (output / METADATA).exists():
        _check_finished(output, LatentMetadata.read(output), settings, source)
        return
    _check_settings(output, settings)

    # --- this host's shards that are not there yet
    side = arguments.image_size // config.factor
    latent_shape = (side, side, config.latent_channels)
    parts = [
        range(start, min(start + arguments.shard_size, len(source)))
        for start in range(0, len(source), arguments.shard_size)
    ]
    paths = [output / shard_name(number, len(parts)) for number in range(len(parts))]
    mine = [number for number in range(arguments.host, len(parts), arguments.num_hosts) if not _is_done(paths[number])]
    _check_disk(output, [len(parts[number]) for number in mine], latent_shape, arguments.flips)
    with replacing(_settings_path(output, arguments.host)) as temporary:
        temporary.write_text(json.dumps(settings))
    meet("latents")
    vae = autoencoder.Autoencoder(weights, config, batch_size=arguments.batch_size)
    _encode_shards(arguments, source, vae, {paths[number]: parts[number] for number in mine})

    # --- the metadata of the whole
    if together and arguments.host:
        wait_until((output / METADATA).exists, "the first host, which writes the metadata")
        return
    if together:
        wait_until(lambda: all(_counts_path(path).exists() for path in paths), "the shards of other hosts")
    missing = sum(not _counts_path(path).exists() for path in paths)
    if arguments.host or missing:
        print(
            f"host {arguments.host} is done"
            + (
                f"; {missing} of {len(paths)} shards of other hosts are missing: "
                "run the command of host 0 again when they are there"
                if missing
                else ""
            )
        )
        return
    _finish(
        output,
        paths,
        LatentMetadata(
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
        ),
    )


def _check_finished(output: pathlib.Path, found, settings: dict, source) -> None:
    """Says that a set is complete. Raises ConfigError unless it is what would be made now."""
    changed = [name for name in ("vae_sha256", "image_size", "flips") if getattr(found, name) != settings[name]]
    if [found.scaling_factor, found.shift_factor] != settings["scale"]:
        changed.append("scale")
    if found.images not in (None, settings["images"]) or tuple(found.class_names) != tuple(source.class_names):
        changed.append("images")
    if changed:
        raise ConfigError(
            f"{output} is complete, with other settings ({', '.join(changed)}): choose another --output, or delete it"
        )
    _remove_notes(output)  # unless a kill came between the metadata and this
    print(
        f"{output} is complete: {found.count:,} latents of {len(found.class_names)} classes"
        + ("" if found.images else "; of which images is not noted in a set of an earlier version")
    )


def _settings_path(output: pathlib.Path, host: int | str) -> pathlib.Path:
    return output / f"preparation-{host}.json"


def _counts_path(shard: pathlib.Path) -> pathlib.Path:
    return shard.with_suffix(".json")


NOTE = {"classes": list[int], "skipped": int, "bytes": int, "sha256": str}
"""Contents of the note beside a shard until the metadata has them."""


def _is_done(shard: pathlib.Path) -> bool:
    """Whether a shard is there as its note has it, which is written after it; else both are made again."""
    try:
        note = read_as(_counts_path(shard), NOTE)
        if shard.stat().st_size == note["bytes"] and sha256_of(shard) == note["sha256"]:
            return True
        log.warning("%s has changed since it was written and is encoded again", shard)
    except FileNotFoundError:
        return False
    except DamagedFile as error:
        log.warning("%s: the shard is encoded again", error)
    return False


def _check_settings(output: pathlib.Path, settings: dict) -> None:
    """What goes on must go on as it began, or the shards would not belong together."""
    for path in output.glob(_settings_path(output, "*").name):
        try:
            before = read_as(path, dict)
        except DamagedFile as error:
            raise ConfigError(
                f"{output} must say with which settings it was begun, but {error}: choose another --output, or "
                "delete it"
            ) from error
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise ConfigError(
                f"{output} was begun with other settings ({', '.join(changed)}): repeat them, choose "
                "another --output, or delete it"
            )


def _check_disk(output: pathlib.Path, records: list[int], latent_shape: tuple[int, int, int], flips: bool) -> None:
    """`records` are those of each shard to write."""
    from gspn_jax.data.latents import record_type

    needed = int(_SPARE_RATIO * sum(records) * record_type(latent_shape, flips).itemsize) + _SPARE_BYTES * len(records)
    free = shutil.disk_usage(output).free
    if free < needed:
        raise ConfigError(
            f"the latents of {sum(records):,} images need {needed / 1e9:.1f} GB in {output}, found "
            f"{free / 1e9:.1f} GB free"
        )


def _encode_shards(arguments: Latents, source, vae, shards: dict[pathlib.Path, range]) -> None:
    """Each shard: its images decoded by threads that work ahead, encoded batch by batch, and written whole."""
    from tqdm import tqdm

    from gspn_jax.data import DataError
    from gspn_jax.data.latents import write_shard

    waited, start, done = 0.0, time.perf_counter(), 0
    indices = [index for part in shards.values() for index in part]
    ahead = 4 * max(arguments.batch_size, arguments.threads)
    claims = contextlib.ExitStack()
    for path in [*shards][:1]:  # before there is a bar
        claims.enter_context(claim(path))
    with (
        claims,
        tqdm(total=len(indices), unit="image", dynamic_ncols=True, desc="encoding") as bar,
        concurrent.futures.ThreadPoolExecutor(arguments.threads) as pool,
        contextlib.closing(read_ahead(pool, source, indices, ahead)) as decoded,
    ):
        for number, (path, part) in enumerate(shards.items()):
            if number:
                claims.enter_context(claim(path))
            moments, labels, skipped = [], [], 0
            for first in range(0, len(part), arguments.batch_size):
                images = []
                for _ in part[first : first + arguments.batch_size]:
                    before = time.perf_counter()
                    try:
                        record = next(decoded)()
                    except DataError as error:
                        if arguments.bad_images == "error":
                            raise
                        skipped += 1
                        log.warning("%s; it is left out", error)
                    else:
                        images.append(record["image"])
                        labels.append(record["label"])
                    waited += time.perf_counter() - before
                    done += 1
                if images:
                    moments.append(_views(vae, np.stack(images), arguments.flips))
                bar.update(min(arguments.batch_size, len(part) - first))
                bar.set_postfix_str(f"{waited / (time.perf_counter() - start):.0%} waiting for decoding", refresh=False)
            if not labels:
                raise DataError(f"none of {len(part)} images in a row can be used, from number {part[0]} of the set")
            shard = write_shard(path, np.array(labels, np.int32), np.concatenate(moments))
            counts = np.bincount(labels, minlength=len(source.class_names))
            note = {"classes": counts.tolist(), "skipped": skipped, "bytes": shard.bytes, "sha256": sha256_of(path)}
            with replacing(_counts_path(path)) as temporary:  # last: a shard counts once its note is there
                temporary.write_text(json.dumps(note))
            claims.close()
    if done:
        seconds = time.perf_counter() - start
        print(
            f"{done:,} images in {seconds:.0f} s, {done / seconds:.1f} images/s, {waited / seconds:.0%} of the time "
            "waiting for decoding"
        )


def _views(vae, images: np.ndarray, flips: bool) -> np.ndarray:
    """Moments [N, V, h, w, 2C] in float16 of the images and, with `flips`, of their mirror images."""
    views = [images, images[:, :, ::-1]] if flips else [images]
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, which is not written
        return np.stack([vae.encode(view).astype(np.float16) for view in views], axis=1)


def _finish(output: pathlib.Path, paths: list[pathlib.Path], metadata) -> None:
    """Writes the metadata from the notes on each shard, which are then removed. Raises ClaimedError when another
    process does."""
    from gspn_jax.data.latents import METADATA

    with claim(output / METADATA):
        if (output / METADATA).exists():
            return  # that process has just ended
        _write_metadata(output, paths, metadata)


def _write_metadata(output: pathlib.Path, paths: list[pathlib.Path], metadata) -> None:
    from gspn_jax.data.latents import Shard

    parts = [read_as(_counts_path(path), NOTE) for path in paths]
    shards = tuple(
        Shard(path.name, sum(part["classes"]), path.stat().st_size) for path, part in zip(paths, parts, strict=True)
    )
    counts = np.sum([part["classes"] for part in parts], axis=0)
    metadata = dataclasses.replace(metadata, shards=shards, class_counts=tuple(counts.tolist()))
    metadata.write(output)
    _remove_notes(output)
    skipped = sum(part["skipped"] for part in parts)
    print(
        f"{metadata.count:,} latents of {len(counts)} classes in {output}"
        + (f"; bad images left out: {skipped:,}" if skipped else "")
    )


def _remove_notes(output: pathlib.Path) -> None:
    for pattern in (_settings_path(output, "*").name, "latents-*.json"):
        for path in output.glob(pattern):
            path.unlink(missing_ok=True)
