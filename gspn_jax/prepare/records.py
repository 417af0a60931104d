"""Images decoded once: scaled down, written as flat files of pixels shard by shard; a killed run loses one shard."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm

from gspn_jax.config import ConfigError
from gspn_jax.data.ahead import read_ahead
from gspn_jax.data.augment.crops import BICUBIC, scaled_sides, to_array, to_pillow
from gspn_jax.data.decoding import DataError
from gspn_jax.data.records import INDEX, METADATA, Index, RecordMetadata, Shard, problem, shard_name
from gspn_jax.data.source import Source
from gspn_jax.files import claim, replacing, sha256_of
from gspn_jax.prepare.hosts import check_share
from gspn_jax.prepare.images import ImageFlags
from gspn_jax.small_files import DamagedFile, read_as

log = logging.getLogger(__name__)

SETTINGS = "preparation.json"
AHEAD = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records(ImageFlags):
    """Decode images once, for the training of classifiers: give --images, --tars or --tfds."""

    output: str
    """The folder to write, which `data.path` of a config then names, with data.source "records"."""
    image_size: int = 256
    """The shorter side that larger images are scaled to, bicubic with antialiasing; smaller ones stay as they are. 256
    is what 224 pixels are evaluated at."""
    shard_size: int = 1024
    """Images a file; a killed run loses at most the file it was writing."""
    num_hosts: int = 1
    """Number of hosts that share the work, and a file system."""
    host: int = 0
    """Number of this host among `num_hosts`; 0 writes the metadata at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("image_size", "shard_size", "num_hosts")
        check_share(self.host, self.num_hosts)


def prepare_records(arguments: Records) -> None:
    """Writes this host's shards of the set that `arguments` ask for and, on host 0, the index and the metadata.

    Of a set that is complete, every file is compared with its hash. Raises ConfigError or DataError with one sentence
    for what cannot be used; OSError for a full disk.
    """
    output = pathlib.Path(arguments.output)
    source = arguments.source(None)
    settings = {
        "images": source.fingerprint,
        "image_size": arguments.image_size,
        "bad_images": arguments.bad_images,
        "shard_size": arguments.shard_size,
    }
    _begin(output, settings)
    with claim(output / f"host {arguments.host}"):
        _prepare(arguments, source, output)


def _prepare(arguments: Records, source: Source, output: pathlib.Path) -> None:
    """The shards of this host, and on host 0 what is written at the end."""
    if (output / METADATA).exists():
        _verify(output)
        return
    parts = [
        range(start, min(start + arguments.shard_size, len(source)))
        for start in range(0, len(source), arguments.shard_size)
    ]
    paths = [output / shard_name(number, len(parts)) for number in range(len(parts))]
    mine = range(arguments.host, len(parts), arguments.num_hosts)
    _decode_shards(arguments, source, {paths[i]: parts[i] for i in mine if not _is_whole(paths[i])})
    missing = sum(not path.exists() for path in paths)
    if missing or arguments.host:
        print(
            f"host {arguments.host} is done"
            + (f"; {missing} of {len(paths)} shards of other hosts are missing" if missing else "")
            + ": run the command of host 0 when all are there"
        )
        return
    _finish(output, paths, source, arguments.image_size)


def _begin(output: pathlib.Path, settings: dict) -> None:
    """Notes the settings in the folder; what goes on must go on as it began, or the shards would not belong together.

    Raises ConfigError for a folder of other settings or of other things.
    """
    path = output / SETTINGS
    if path.exists():
        try:
            before = read_as(path, dict)
        except DamagedFile as error:
            raise ConfigError(f"{output} cannot be gone on with, for {error}: delete it") from error
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise ConfigError(
                f"{output} was begun with other settings ({', '.join(changed)}): repeat them, choose another --output, "
                "or delete it"
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output must be a new folder, or one that this command began, found {str(output)!r}")
    output.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(settings) + "\n")


def _is_whole(shard: pathlib.Path) -> bool:
    """Tells whether a shard of an earlier start is there as it was written; one that is not is made again, and said."""
    if not shard.exists():
        return False
    try:
        note = read_as(_note(shard, ".json"), {"sha256": str, "skipped": int})
        Index.read(_note(shard, ".npz"))
        wrong = None if sha256_of(shard) == note["sha256"] else "its content has changed"
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, DamagedFile):
        wrong = "it or its note cannot be read"
    if wrong:
        log.warning("%s is decoded again: %s", shard, wrong)
    return wrong is None


def _verify(output: pathlib.Path) -> None:
    metadata = RecordMetadata.read(output)
    wrong = problem(output)
    if wrong:
        raise ConfigError(f"{output} must be as it was written, but {wrong}: delete it, and prepare the images again")
    _remove_notes(output / shard.name for shard in metadata.shards)  # unless a kill came between metadata and this
    print(
        f"{output} is complete, every file as it was written: {metadata.count:,} images of "
        f"{len(metadata.class_names)} classes"
    )


class _Scaled:
    """Images of a source whose shorter side is at most `short`."""

    def __init__(self, source: Source, short: int):
        self._source, self._short = source, short
        self.class_names, self.fingerprint = source.class_names, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        record = self._source[index]
        image = record["image"]
        if min(image.shape[:2]) > self._short:
            rows, columns = scaled_sides(*image.shape[:2], self._short)
            image = to_array(to_pillow(image).resize((columns, rows), BICUBIC))
        return {"image": image, "label": record["label"]}


def _decode_shards(arguments: Records, source: Source, shards: dict[pathlib.Path, range]) -> None:
    """Each shard: its images decoded and scaled by threads that work ahead, written whole with a note beside it."""
    indices = [index for part in shards.values() for index in part]
    start, written = time.perf_counter(), 0
    with (
        tqdm(total=len(indices), unit="image", dynamic_ncols=True, desc="decoding") as bar,
        concurrent.futures.ThreadPoolExecutor(arguments.threads) as pool,
        contextlib.closing(
            read_ahead(pool, _Scaled(source, arguments.image_size), indices, AHEAD * arguments.threads)
        ) as decoded,
    ):
        done = 0
        for path, part in shards.items():
            written += _write_shard(path, part, decoded, arguments.bad_images == "skip", bar)
            done += len(part)
            needed, free = written / done * (len(indices) - done), shutil.disk_usage(path.parent).free
            if free < needed:
                raise ConfigError(
                    f"the {len(indices) - done:,} images that are left need {needed / 1e9:.1f} GB in {path.parent}, "
                    f"found {free / 1e9:.1f} GB free"
                )
    if indices:
        seconds = time.perf_counter() - start
        print(f"{len(indices):,} images in {seconds:.0f} s, {len(indices) / seconds:.1f} images/s")


def _write_shard(path: pathlib.Path, part: range, decoded: Iterator, skip: bool, bar: tqdm) -> int:
    """Writes the next images of `decoded`; returns their bytes. Raises DataError for a bad one unless it may `skip`."""
    digest, labels, shapes, skipped = hashlib.sha256(), [], [], 0
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            for _ in part:
                try:
                    record = next(decoded)()
                except DataError as error:
                    if not skip:
                        raise
                    skipped += 1
                    log.warning("%s; it is left out", error)
                else:
                    pixels = np.ascontiguousarray(record["image"])
                    digest.update(pixels)
                    file.write(pixels)
                    labels.append(record["label"])
                    shapes.append(pixels.shape[:2])
                bar.update()
        if not labels:
            raise DataError(f"none of {len(part)} images in a row can be used, from number {part[0]} of the set")
        # The note comes before the rename: a shard that is there has one.
        heights, widths = np.array(shapes, np.int32).T
        Index(np.array(labels, np.int32), heights, widths).write(_note(path, ".npz"))
        with replacing(_note(path, ".json")) as note:
            note.write_text(json.dumps({"sha256": digest.hexdigest(), "skipped": skipped}))
    return path.stat().st_size


def _note(shard: pathlib.Path, suffix: str) -> pathlib.Path:
    return shard.with_suffix(suffix)


def _remove_notes(shards: Iterable[pathlib.Path]) -> None:
    for shard in shards:
        for suffix in (".json", ".npz"):
            _note(shard, suffix).unlink(missing_ok=True)


def _finish(output: pathlib.Path, paths: list[pathlib.Path], source: Source, image_size: int) -> None:
    """Writes index and metadata from the notes on each shard, which are then removed."""
    notes = [read_as(_note(path, ".json"), {"sha256": str, "skipped": int}) for path in paths]
    parts = [Index.read(_note(path, ".npz")) for path in paths]
    index = Index.joined(parts)
    index.write(output / INDEX)
    shards = tuple(
        Shard(path.name, len(part.labels), path.stat().st_size, note["sha256"])
        for path, part, note in zip(paths, parts, notes, strict=True)
    )
    counts = np.bincount(index.labels, minlength=len(source.class_names))
    metadata = RecordMetadata(image_size, source.class_names, tuple(counts.tolist()), shards, sha256_of(output / INDEX))
    metadata.write(output)
    _remove_notes(paths)
    skipped = sum(note["skipped"] for note in notes)
    print(
        f"{metadata.count:,} images of {len(counts)} classes, {sum(shard.bytes for shard in shards) / 1e9:.2f} GB, in "
        f"{output}" + (f"; bad images left out: {skipped:,}" if skipped else "")
    )
