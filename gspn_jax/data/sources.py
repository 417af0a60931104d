"""Where images come from: random access to {"image": uint8 [S, S, C], "label": int32}.

A source knows its class names and a fingerprint of its content, and raises `DataError` for an image it cannot decode;
what happens then is the loader's choice.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data.decoding import DataError, decode_image, fit_image

__all__ = ["MAX_BAD_IN_A_ROW", "DataError", "DigitsSource", "FolderSource", "Source", "make_source"]

IMAGE_EXTENSIONS = (".jpeg", ".jpg", ".png")
_SIZES_IN_FINGERPRINT = 1024
MAX_BAD_IN_A_ROW = 100
"""A set with so many bad images in a row is broken as a whole: replacing them would train on something else."""


class Source(Protocol):
    """A labelled image set with random access, readable from several threads and picklable to other processes."""

    class_names: tuple[str, ...]
    fingerprint: str
    """Hex digits that change when the set does; the same on every host and run. Image bytes are not read for it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        """{"image": uint8 [S, S, C], "label": int32}. Raises DataError for an image that cannot be decoded."""
        ...


def make_source(config: DataConfig) -> Source:
    """The source that `config` names, its images fitted to `image_size` and `channels`.

    Latents are of the size they were prepared in; `LatentSource` gives their moments in place of an image. With
    `config.in_memory` all images are decoded here (`memory.MemorySource`, which says what that raises).
    Raises ConfigError for a set that is missing, empty, prepared in another format, or has other classes than
    `config.num_classes`.
    """
    if config.source != "latents" and config.channels not in (1, 3):
        raise ConfigError(f"data.channels must be 1 (greyscale) or 3 (RGB) for images, found {config.channels}")
    if config.source == "digits":
        source: Source = DigitsSource(config.image_size, config.channels)
    elif config.source == "folder":
        source = FolderSource(config.path, config.image_size, config.channels)
    elif config.source == "latents":
        from gspn_jax.data.latents import LatentSource  # which imports this module

        source = LatentSource(config)
    else:
        # Imported here: tensorflow-datasets is slow to import and most runs do without it.
        from gspn_jax.data.tfds_source import TfdsSource

        source = TfdsSource(config.name, config.path, config.split, config.image_size, config.channels)
    found = len(source.class_names)
    if found != config.num_classes:
        raise ConfigError(f"data.num_classes is {config.num_classes}, but {_describe(config)} has {found} "
                          f"{'class' if found == 1 else 'classes'} ({shorten(source.class_names)})")
    if config.in_memory:
        from gspn_jax.data.memory import MemorySource  # which imports this module

        return MemorySource(source, config)
    return source


class DigitsSource:
    """The 1,797 handwritten digits (8x8, 17 grey levels) that are embedded in scikit-learn; levels 0..16 -> 0..255."""

    def __init__(self, size: int, channels: int):
        from sklearn.datasets import load_digits  # scikit-learn is slow to import

        digits = load_digits()
        levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        self._images = np.stack([fit_image(Image.fromarray(image), size, channels) for image in levels])
        self._labels = digits.target.astype(np.int32)
        self.class_names = tuple(str(name) for name in digits.target_names)
        self.fingerprint = hash_of(["digits", levels.tobytes(), self._labels.tobytes()])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        return {"image": self._images[index], "label": self._labels[index]}


class FolderSource:
    """JPEG and PNG files in one folder a class: `root/<class>/**/*.jpg`.

    Classes and files are sorted by name; folders within a class folder belong to it; hidden files and files of other
    kinds are ignored. The fingerprint covers class and file names, and the sizes of about 1,000 files spread evenly.
    """

    def __init__(self, root: str, size: int, channels: int):
        if not os.path.isdir(root):
            raise ConfigError(f"data.path must be a folder with one folder of images a class, found "
                              f"{'a file' if os.path.exists(root) else 'nothing'} at {root!r}")
        self._root, self._size, self._channels = root, size, channels
        with os.scandir(root) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        self.class_names = tuple(folders)
        files = [sorted(_image_files(root, folder)) for folder in folders]
        self._files = [name for group in files for name in group]
        self._labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(group) for group in files])
        if not self._files:
            raise ConfigError(f"data.path must be a folder with one folder of images a class, found no JPEG or PNG "
                              f"file in the {len(folders)} folders of {root!r}")
        empty = [folder for folder, group in zip(folders, files, strict=True) if not group]
        if empty:
            raise ConfigError(f"every class folder in {root!r} must hold JPEG or PNG files, found none in "
                              f"{shorten(empty)}")
        spread = np.linspace(0, len(self._files) - 1, min(len(self._files), _SIZES_IN_FINGERPRINT)).astype(int)
        sizes = [os.path.getsize(os.path.join(root, self._files[i])) for i in spread]
        self.fingerprint = hash_of(["folder", *self.class_names, *self._files, repr(sizes)])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        path = os.path.join(self._root, self._files[index])
        try:
            with open(path, "rb") as file:
                encoded = file.read()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        return {"image": decode_image(encoded, path, self._size, self._channels), "label": self._labels[index]}


def _image_files(root: str, folder: str) -> Iterable[str]:
    """Paths below root/folder, relative to root. No file is opened or asked for its size: a listing is all it takes."""
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.is_file():
                yield f"{folder}/{entry.name}"
            elif entry.is_dir():
                yield from _image_files(root, f"{folder}/{entry.name}")


def hash_of(parts: Iterable[str | bytes]) -> str:
    """16 hex digits over the parts and where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        data = os.fsencode(part) if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()[:16]


def shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _describe(config: DataConfig) -> str:
    return {"digits": "the digits set", "folder": f"the folder {config.path!r}", "tfds": config.name,
            "latents": f"the set of latents {config.path!r}"}[config.source]
