"""Samples by the thousand in one .npz of the ADM layout, written so that a kill or a full disk loses nothing."""

import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from gspn_jax.config import ConfigError
from gspn_jax.files import replacing
from gspn_jax.small_files import DamagedFile, parse, read_json, typed

log = logging.getLogger(__name__)

Draw = Callable[[np.ndarray, np.ndarray], np.ndarray]
PARTIAL = ".gspn-partial"
"""End of an output's name for the folder of its finished batches."""
_PIXELS, _SETTINGS, _BATCHES = "images.bin", "settings.json", "batches.jsonl"


def write_npz(
    path: pathlib.Path,
    draw: Draw,
    labels: Int[np.ndarray, " N"],
    indices: Int[np.ndarray, " N"],
    *,
    shape: tuple[int, int, int],
    batch_size: int,
    settings: dict[str, Any],
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Draws N images batch by batch into `path`: `arr_0` uint8 [N, H, W, C], `arr_1` int64 labels [N], and `settings`
    as JSON text, which say how the images were made. The caller has claimed `path` (`files.claim_new`).

    Finished batches lie in `<path>.gspn-partial/` until the whole is there; a second call with the same `settings`
    (JSON values) goes on behind those that are as they were drawn. `done` is called with the number of images that
    exist. Raises ConfigError when `path` exists, when a partial result has other settings, or for too small a disk.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already: choose another output, or delete it")
    partial = _Partial(path.with_name(path.name + PARTIAL), settings)
    total, image_bytes = len(labels), int(np.prod(shape))
    count = partial.count(labels, indices, image_bytes)
    free, needed = shutil.disk_usage(path.absolute().parent).free, (2 * total - count) * image_bytes
    if free < needed:
        raise ConfigError(
            f"{total} images of {'x'.join(map(str, shape))} need {needed / 1e9:.2f} GB on the disk of "
            f"{path.parent} while they are written, found {free / 1e9:.2f} GB free"
        )
    partial.begin(count, image_bytes)
    done(count)
    while count < total:
        batch = slice(count, min(count + batch_size, total))
        partial.add(draw(labels[batch], indices[batch]), labels[batch], indices[batch])
        count = batch.stop
        done(count)
    images: UInt8[np.ndarray, "N H W C"] = np.memmap(partial.pixels, np.uint8, "r", shape=(total, *shape))
    with replacing(path, new=True) as temporary, open(temporary, "wb") as file:  # to a name, savez would append ".npz"
        np.savez(file, arr_0=images, arr_1=labels.astype(np.int64), settings=np.array(json.dumps(settings)))
    del images
    partial.remove()


class _Partial:
    """The folder of the batches that are finished: their pixels, one behind the other, and a line of JSON each, with
    the number of its images and the SHA-256 of pixels, labels and indices. A batch counts once its line is there."""

    def __init__(self, folder: pathlib.Path, settings: dict[str, Any]):
        """Raises ConfigError for a folder of other settings, or one that is not ours."""
        self._folder, self.pixels = folder, folder / _PIXELS
        self._settings, self._batches = folder / _SETTINGS, folder / _BATCHES
        self._wanted = settings
        if not folder.exists():
            return
        saved = self._saved_settings()
        if saved is None and folder.is_dir() and not any(folder.iterdir()):
            return
        if not isinstance(saved, dict):
            raise ConfigError(
                f"{folder} must be the unfinished samples of an earlier call, found no settings that can be read in "
                f"it ({_SETTINGS}): delete it, or choose another output"
            )
        if saved != settings:
            changed = [name for name in settings if saved.get(name) != settings[name]]
            raise ConfigError(
                f"{folder} was begun with other settings ({', '.join(changed)}): repeat them, choose another output, "
                "or delete it"
            )

    def _saved_settings(self) -> Any:
        try:
            return read_json(self._settings)
        except (OSError, DamagedFile):
            return None

    def count(self, labels: Int[np.ndarray, " N"], indices: Int[np.ndarray, " N"], image_bytes: int) -> int:
        """The number of images, from the first, that are there as they were drawn; a line says what is left out."""
        if not (self.pixels.is_file() and self._batches.is_file()):
            return 0
        count, size = 0, self.pixels.stat().st_size
        lines = self._batches.read_bytes().splitlines()
        with open(self.pixels, "rb") as file:
            for line in lines:
                try:
                    number, digest = typed(parse(line, _BATCHES), tuple[int, str], _BATCHES)
                except DamagedFile:  # the line that a kill cut short, or other bytes
                    break
                batch = slice(count, count + number)
                whole = number > 0 and batch.stop <= len(labels) and batch.stop * image_bytes <= size
                if not whole or _digest(file.read(number * image_bytes), labels[batch], indices[batch]) != digest:
                    break
                count = batch.stop
            else:
                return count
        log.warning(
            "of the unfinished samples in %s the first %d images are as they were drawn: the others are drawn again",
            self._folder,
            count,
        )
        return count

    def begin(self, count: int, image_bytes: int) -> None:
        """Cuts off what follows the first `count` images."""
        self._folder.mkdir(exist_ok=True)
        if self._saved_settings() is None:
            with replacing(self._settings) as temporary:
                temporary.write_text(json.dumps(self._wanted))
        with open(self.pixels, "ab") as file:
            file.truncate(count * image_bytes)
        kept, seen = [], 0
        for line in self._batches.read_bytes().splitlines() if count else ():
            if seen == count:
                break
            kept.append(line + b"\n")
            seen += json.loads(line)[0]
        with replacing(self._batches) as temporary:
            temporary.write_bytes(b"".join(kept))

    def add(
        self, images: UInt8[np.ndarray, "n H W C"], labels: Int[np.ndarray, " n"], indices: Int[np.ndarray, " n"]
    ) -> None:
        """Appends a batch; its line is written when its pixels are on the disk."""
        pixels = np.ascontiguousarray(images).tobytes()
        _append(self.pixels, pixels)
        _append(self._batches, json.dumps([len(images), _digest(pixels, labels, indices)]).encode() + b"\n")

    def remove(self) -> None:
        """Removes what is ours; a file of somebody else keeps the folder."""
        for path in (self.pixels, self._batches, self._settings):
            path.unlink(missing_ok=True)
        try:
            self._folder.rmdir()
        except OSError as error:
            log.warning("%s is left where it is (%s)", self._folder, error.strerror)


def _append(path: pathlib.Path, content: bytes) -> None:
    with open(path, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _digest(pixels: bytes, *numbers: Int[np.ndarray, " n"]) -> str:
    digest = hashlib.sha256(pixels)
    for array in numbers:
        digest.update(np.ascontiguousarray(array, "<i8").tobytes())
    return digest.hexdigest()
