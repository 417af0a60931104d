"""Arrays out of .npz files that others wrote: checked, never unpickled, and images read batch by batch."""

import lzma
import pathlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np
from jaxtyping import UInt8

from gspn_jax.config import ConfigError
from gspn_jax.pixels import to_rgb

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    SyntaxError,
    ValueError,
    OverflowError,
    MemoryError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
)
"""What zipfile and NumPy raise for files that others wrote, found by tests/test_fuzz.py."""


def names(path: str | pathlib.Path, what: str) -> tuple[str, ...]:
    """The arrays in an .npz. Raises ConfigError, in which `what` names the file's part, for what is no such file."""
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"{what} must be an .npz file, found nothing at {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(name.removesuffix(".npy") for name in archive.namelist())
    except _DAMAGE as error:
        raise ConfigError(f"{what} must be an .npz file, found {str(path)!r}, which is none: {error}") from error


def read(path: str | pathlib.Path, name: str) -> np.ndarray:
    """One array of the file, whole. Raises ConfigError for one that is damaged or would have to be unpickled."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except _DAMAGE as error:
        raise ConfigError(f"{name!r} in {path} cannot be read: {error}") from error


class StoredImages:
    """The images uint8 [N, H, W, 3] under `key` of an .npz, compressed or not, without reading them all at once.

    Greyscale images, which have one channel in the file and in `shape`, are read as three equal ones.

    Raises ConfigError, in which `what` names the file's part, for a file without such images.
    """

    def __init__(self, path: str | pathlib.Path, what: str, key: str = "arr_0"):
        self.path, self._key = pathlib.Path(path), key
        found = names(path, what)
        if key not in found:
            raise ConfigError(f"{what} must have images as {key!r}, found {', '.join(found) or 'nothing'} in {path}")
        with self._open() as file:
            self.shape, fortran, dtype = self._header(file)
        if len(self.shape) != 4 or self.shape[3] not in (1, 3) or dtype != np.uint8 or fortran or min(self.shape) < 1:
            raise ConfigError(
                f"{what} must have images as uint8 [N, H, W, 3], found {dtype} {list(self.shape)} in {key!r} of {path}"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int, start: int = 0) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """The images from number `start`, `size` at a time, the last batch smaller."""
        image = int(np.prod(self.shape[1:]))
        try:
            with self._open() as file:
                self._header(file)
                file.seek(file.tell() + start * image)
                for first in range(start, len(self), size):
                    count = min(size, len(self) - first)
                    data = file.read(count * image)
                    images = np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])
                    yield to_rgb(images)
        except _DAMAGE as error:
            raise ConfigError(f"{self._key!r} in {self.path} cannot be read: {error}") from error

    def _open(self) -> IO[bytes]:
        archive = zipfile.ZipFile(self.path)
        try:
            return archive.open(f"{self._key}.npy")
        except _DAMAGE as error:
            raise ConfigError(f"{self._key!r} in {self.path} cannot be read: {error}") from error
        finally:
            archive.close()  # the member stays readable

    def _header(self, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        try:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            return read_header(file)
        except _DAMAGE as error:
            raise ConfigError(f"{self._key!r} in {self.path} cannot be read: {error}") from error
