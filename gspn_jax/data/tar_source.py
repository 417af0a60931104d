"""ImageNet as it is published: tar files of JPEGs, read in place without unpacking them."""

import os
import pathlib
import tarfile
from collections.abc import Iterator

import numpy as np

from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import DataError, decode_image
from gspn_jax.data.source import IMAGE_EXTENSIONS, hash_of


class TarSource:
    """The tar files of a folder: one a class (`n01440764.tar`), or one that holds those (`ILSVRC2012_img_train.tar`).

    A class is named after its tar; classes and images are sorted by name. Only headers are read to find the images.
    Raises ConfigError for a folder without such files, and DataError for an image that cannot be decoded.
    """

    def __init__(self, root: str, size: int, channels: int):
        tars = sorted(pathlib.Path(root).glob("*.tar"))
        if not tars:
            raise ConfigError(
                f"--tars must be a folder of tar files, one a class or one of all classes, found none in {root!r}"
            )
        classes: dict[str, list[tuple[str, str, int, int]]] = {}
        for path in tars:
            try:
                for name, image, offset, length in _images(path):
                    classes.setdefault(name, []).append((image, str(path), offset, length))
            except tarfile.TarError as error:
                raise ConfigError(f"{path} must be a tar file without compression, found otherwise: {error}") from error
        if not classes:
            raise ConfigError(f"--tars must be a folder of tar files with JPEG or PNG files, found none in {root!r}")
        self.class_names = tuple(sorted(classes))
        self._images = [image for name in self.class_names for image in sorted(classes[name])]
        self._labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(classes[n]) for n in self.class_names])
        self._size, self._channels = size, channels
        self.fingerprint = hash_of(["tars", *self.class_names, *(f"{image[0]} {image[3]}" for image in self._images)])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        image, path, offset, length = self._images[index]
        name = f"{image} in {path}"
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                encoded = file.read(length)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}") from error
        return {"image": decode_image(encoded, name, self._size, self._channels), "label": self._labels[index]}


def _images(path: pathlib.Path) -> Iterator[tuple[str, str, int, int]]:
    """(class, file name, offset, length) of every image of a tar, or of the tars within it."""
    with tarfile.open(path, "r:") as outer:
        for member in outer:
            if member.isfile() and member.name.endswith(".tar"):
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    for image in inner:
                        if _is_image(image):
                            yield (
                                pathlib.PurePath(member.name).stem,
                                image.name,
                                member.offset_data + image.offset_data,
                                image.size,
                            )
            elif _is_image(member):
                yield path.stem, member.name, member.offset_data, member.size


def _is_image(member: tarfile.TarInfo) -> bool:
    return member.isfile() and os.path.splitext(member.name)[1].lower() in IMAGE_EXTENSIONS
