"""Arrays out of .npz files that others wrote: never unpickled, looked at before they are read, images batch by batch.

The header of an array says its type and shape: what is read is what was expected, of the length that the archive holds,
and not many times larger than the file.
"""

import json
import lzma
import math
import pathlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

from gspn_jax.config import ConfigError
from gspn_jax.pixels import to_rgb
from gspn_jax.state_dict import LFS_POINTER

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
"""Errors that zipfile and NumPy raise for files that others wrote, found by tests/test_fuzz.py."""

SMALL = 2**26
"""Bytes of an array that is read however well it was compressed, ..."""
DENSITY = 50
"""... and times its compressed size that a larger one may have: numbers that were computed hardly compress."""
WHOLE = 2**33
"""Bytes of images that are read at once, where their order in the file leaves no choice."""


class Header(NamedTuple):
    """Shape and type that an array of an archive claims, found to agree with the length that the archive gives."""

    shape: tuple[int, ...]
    fortran: bool
    """Whether the first axis is the one that changes fastest."""
    dtype: np.dtype
    compressed: int
    """Bytes in the archive."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def names(path: str | pathlib.Path, what: str) -> tuple[str, ...]:
    """The arrays in an .npz. Raises ConfigError, in which `what` names the file's part, for what is no such file."""
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"{what} must be an .npz file, found nothing at {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(name.removesuffix(".npy") for name in archive.namelist())
    except _DAMAGE as error:
        with open(path, "rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        reason = "a Git LFS pointer, not the file it stands for" if pointer else error
        raise ConfigError(f"{what} must be an .npz file, found {str(path)!r}, which is none: {reason}") from error


def header(path: str | pathlib.Path, name: str) -> Header:
    """Header of the array `name`; nothing of it is read. Raises ConfigError for one that is damaged, or whose
    length is not that of its shape."""
    try:
        with zipfile.ZipFile(path) as archive:
            about = archive.getinfo(f"{name}.npy")
            with archive.open(about) as file:
                shape, fortran, dtype = _header(file)
                length = about.file_size - file.tell()
    except (*_DAMAGE, KeyError) as error:
        raise ConfigError(f"{name!r} in {path} cannot be read: {error}") from error
    found = Header(shape, fortran, dtype, about.compress_size)
    if dtype.hasobject:
        raise ConfigError(f"{name!r} in {path} cannot be read: it holds Python objects, whose code is not run")
    if min(shape, default=0) < 0 or found.bytes != length:
        raise ConfigError(
            f"{name!r} in {path} cannot be read: it claims {dtype} {list(shape)} and holds {length:,} bytes"
        )
    return found


def read(
    path: str | pathlib.Path, name: str, *, kinds: str | None = None, shape: Sequence[int | None] | None = None
) -> Shaped[np.ndarray, "..."]:
    """One array of the file, whole, after a look at what it claims to be.

    `kinds` are NumPy's letters of types that may be, such as "fiu" for numbers; `shape` has None for any length.
    Raises ConfigError for another array, one that is damaged, would have to be unpickled, or is far larger than it is
    in the file.
    """
    found = header(path, name)
    wrong_shape = shape is not None and (
        len(found.shape) != len(shape)
        or any(want not in (None, have) for want, have in zip(shape, found.shape, strict=True))
    )
    if wrong_shape or (kinds is not None and found.dtype.kind not in kinds):
        wanted = "numbers" if kinds and "f" in kinds else {"iu": "integers", "U": "text"}.get(kinds, "an array")
        sizes = "" if shape is None else f" [{', '.join('N' if one is None else str(one) for one in shape)}]"
        raise ConfigError(f"{name!r} in {path} must be {wanted}{sizes}, found {found.dtype} {list(found.shape)}")
    if found.bytes > max(SMALL, DENSITY * found.compressed):
        raise ConfigError(
            f"{name!r} in {path} cannot be read: it claims {found.bytes / 1e9:.1f} GB of what takes "
            f"{found.compressed / 1e6:.1f} MB in the file"
        )
    return _read_whole(path, name)


def read_text(path: str | pathlib.Path, name: str) -> dict[str, Any]:
    """The JSON object that our own programs keep in `name`; empty for anything else that stands there."""
    try:
        value = json.loads(str(read(path, name, kinds="U", shape=())))
    except (ConfigError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_whole(path: str | pathlib.Path, name: str) -> np.ndarray:
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
        self.shape, self._fortran, dtype, _ = about = header(self.path, key)
        if len(self.shape) != 4 or self.shape[3] not in (1, 3) or dtype != np.uint8 or min(self.shape) < 1:
            raise ConfigError(
                f"{what} must have images as uint8 [N, H, W, 3], found {dtype} {list(self.shape)} in {key!r} of {path}"
            )
        if self._fortran and about.bytes > WHOLE:
            raise ConfigError(
                f"{what} must have images of {WHOLE / 1e9:.0f} GB at the most when they are in Fortran order, found "
                f"{about.bytes / 1e9:.0f} GB in {key!r} of {path}: save them in C order"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int, start: int = 0) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """The images from number `start`, `size` at a time, the last batch smaller."""
        if self._fortran:
            whole = _read_whole(self.path, self._key)
            for first in range(start, len(self), size):
                yield to_rgb(np.ascontiguousarray(whole[first : first + size]))
            return
        image = int(np.prod(self.shape[1:]))
        try:
            with self._open() as file:
                _header(file)
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


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read_header(file)
