"""A labelled folder of images: one folder a class."""

import os
from collections.abc import Iterable

import numpy as np

from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import DataError, decode_image
from gspn_jax.data.source import IMAGE_EXTENSIONS, hash_of, shorten

_SIZES_IN_FINGERPRINT = 1024


class FolderSource:
    """JPEG and PNG files in one folder a class: `root/<class>/**/*.jpg`.

    Classes and files are sorted by name; folders within a class folder belong to it; hidden files and files of other
    kinds are ignored. The fingerprint covers class and file names, and the sizes of about 1,000 files spread evenly.
    """

    def __init__(self, root: str, size: int, channels: int):
        if not os.path.isdir(root):
            raise ConfigError(
                f"data.path must be a folder with one folder of images a class, found "
                f"{'a file' if os.path.exists(root) else 'nothing'} at {root!r}"
            )
        self._root, self._size, self._channels = root, size, channels
        with os.scandir(root) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        self.class_names = tuple(folders)
        files = [sorted(_image_files(root, folder)) for folder in folders]
        self._files = [name for group in files for name in group]
        self._labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(group) for group in files])
        if not self._files:
            raise ConfigError(
                f"data.path must be a folder with one folder of images a class, found no JPEG or PNG "
                f"file in the {len(folders)} folders of {root!r}"
            )
        empty = [folder for folder, group in zip(folders, files, strict=True) if not group]
        if empty:
            raise ConfigError(
                f"every class folder in {root!r} must hold JPEG or PNG files, found none in {shorten(empty)}"
            )
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
