"""Files within tar files, listed without unpacking them: the one way into tars for every kind of source."""

import collections
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from gspn_jax.config import ConfigError
from gspn_jax.data.listing import kind_of


class Member(NamedTuple):
    """A file of a tar, or of a tar within one."""

    name: str
    tar: str
    """The path of the tar in the file system."""
    inner: str | None
    """The name of the tar within it, if it lies in one."""
    offset: int
    length: int

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(part for part in pathlib.PurePosixPath(self.name).parent.parts if part not in (".", "/"))


def list_tars(root: str, left_out: collections.Counter) -> list[pathlib.Path]:
    """The tar file `root`, or those in the folder `root`; others are counted in `left_out`.

    Raises ConfigError for a folder without any.
    """
    if os.path.isfile(root):
        return [pathlib.Path(root)]
    if not os.path.isdir(root):
        raise ConfigError(f"--tars must be a tar file or a folder of tar files, found nothing at {root!r}")
    tars = []
    for path in sorted(pathlib.Path(root).iterdir()):
        if path.name.startswith("."):
            left_out["hidden"] += 1
        elif path.suffix.lower() == ".tar" and path.is_file():
            tars.append(path)
        else:
            left_out["folders" if path.is_dir() else kind_of(path.name)] += 1
    if not tars:
        raise ConfigError(
            f"--tars must be a tar file or a folder of tar files without compression, found none in {root!r}"
        )
    return tars


def members(path: pathlib.Path, left_out: collections.Counter) -> Iterator[Member]:
    """The files of a tar, and of the tars within it; what is none is counted in `left_out`.

    Raises ConfigError for what is no tar file, or is cut or damaged.
    """
    try:
        with tarfile.open(path, "r:") as outer:
            for member in outer:
                if not _usable(member, left_out):
                    continue
                if not member.name.lower().endswith(".tar"):
                    yield Member(member.name, str(path), None, member.offset_data, member.size)
                    continue
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    for one in inner:
                        if _usable(one, left_out):
                            offset = member.offset_data + one.offset_data
                            yield Member(one.name, str(path), member.name, offset, one.size)
                    _check_end(inner)
            _check_end(outer)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ConfigError(f"{path} must be a tar file without compression, found otherwise: {error}") from error


def content(member: Member) -> bytes:
    """The bytes of a file. Raises OSError."""
    with open(member.tar, "rb") as file:
        file.seek(member.offset)
        return file.read(member.length)


def _usable(member: tarfile.TarInfo, left_out: collections.Counter) -> bool:
    """Tells whether it is a file that lies in the tar as it is."""
    if member.isdir():
        return False
    if any(part.startswith(".") and part not in (".", "..") for part in member.name.split("/")):
        left_out["hidden"] += 1
        return False
    if not member.isreg() or member.issparse():
        left_out["links, devices or sparse files in tars"] += 1
        return False
    return True


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises ReadError unless the headers end in a block of zeros, or with the file: tarfile takes a header that is cut
    or damaged for the end, unless it is the first."""
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0") or archive.fileobj.tell() % tarfile.BLOCKSIZE > 0:
        raise tarfile.ReadError(f"it is cut or damaged at byte {archive.offset:,}")
