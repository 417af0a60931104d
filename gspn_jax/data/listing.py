"""The image files below a folder, and a count of all that is left out: the one rule for every folder of images.

Links are followed, also those of folders. Left out, counted and said are hidden files and folders, broken links, links
that lead back to a folder they lie in, files of other kinds than `decoding.EXTENSIONS`, pipes and devices.
"""

import collections
import dataclasses
import errno
import logging
import os
from collections.abc import Iterator

from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import EXTENSIONS

log = logging.getLogger("gspn_jax.data")

IMAGE_EXTENSIONS = tuple(ending for endings in EXTENSIONS.values() for ending in endings)
KINDS = "JPEG, PNG, WebP, BMP, GIF or TIFF"
"""The files that are images, for a sentence."""
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
"""Names of the parts that a set is divided into, rather than of classes."""

_HIDDEN, _BROKEN, _LOOP, _SPECIAL = "hidden", "broken links", "links in a loop", "pipes or devices"
_UNREADABLE = "unreadable"


@dataclasses.dataclass(frozen=True)
class Listing:
    """Images below a folder, and the files of other kinds that were asked for."""

    files: tuple[str, ...]
    """Paths relative to the folder, with "/", sorted."""
    left_out: collections.Counter
    """Kind of file -> how many."""

    def describe_left_out(self) -> str:
        """Such as "3 .heic, 2 broken links"; empty if nothing was left out."""
        return describe(self.left_out)


def list_images(root: str | os.PathLike, *, also: tuple[str, ...] = ()) -> Listing:
    """Lists the images below `root`, and files whose names end as one of `also`. No file is opened; only links and
    unknown entries are asked what they are.

    Raises ConfigError for a folder that cannot be read.
    """
    left_out: collections.Counter = collections.Counter()
    files = tuple(sorted(_walk(os.fspath(root), "", (), left_out, also)))
    return Listing(files, left_out)


def is_image_name(name: str) -> bool:
    """Tells whether a file of that name is taken for an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def kind_of(name: str) -> str:
    """Kind that a file that is no image is counted as: the end of its name."""
    return os.path.splitext(name)[1].lower() or "files without an extension"


def describe(left_out: collections.Counter) -> str:
    """The counts in a sentence, the most first."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(left_out.items(), key=lambda item: (-item[1], item)))


def say_left_out(root: str | os.PathLike, left_out: collections.Counter) -> None:
    """Logs what was left out of `root`, if anything was."""
    if left_out:
        log.warning("left out of %s: %s", os.fspath(root), describe(left_out))


def refuse_splits(where: str, names: set[str], inner: bool, way_out: str) -> None:
    """Raises ConfigError if the folders `names` of `where` are a set's parts (train, val) rather than its classes.

    `inner` tells whether the images of one of them lie in folders of their own.
    """
    parts = sorted(name for name in names if name.casefold() in SPLITS)
    if inner and parts and (len(parts) > 1 or len(names) == 1):
        raise ConfigError(
            f"the folders of {where} must be classes, found the parts of a set, {', '.join(parts)}, with folders of "
            f"their own: {way_out}"
        )


def _walk(root: str, folder: str, above: tuple, left_out: collections.Counter, also: tuple[str, ...]) -> Iterator[str]:
    """Images below root/folder, relative to root; `above` identifies the folders on the way."""
    path = os.path.join(root, folder) if folder else root
    try:
        with os.scandir(path) as found:
            entries = list(found)
        status = os.stat(path)
    except OSError as error:
        raise ConfigError(f"the folder {path!r} cannot be read: {error.strerror}") from error
    above = (*above, (status.st_dev, status.st_ino))
    for entry in entries:
        if entry.name.startswith("."):
            left_out[_HIDDEN] += 1
            continue
        relative = f"{folder}/{entry.name}" if folder else entry.name
        try:
            if entry.is_dir():
                if entry.is_symlink() and _identity(entry) in above:
                    left_out[_LOOP] += 1
                else:
                    yield from _walk(root, relative, above, left_out, also)
            elif entry.is_file():
                if is_image_name(entry.name) or entry.name.lower().endswith(also):
                    yield relative
                else:
                    left_out[kind_of(entry.name)] += 1
            else:
                left_out[_BROKEN if entry.is_symlink() and not os.path.exists(entry.path) else _SPECIAL] += 1
        except OSError as error:
            left_out[_LOOP if error.errno == errno.ELOOP else _UNREADABLE] += 1


def _identity(entry: os.DirEntry) -> tuple[int, int]:
    status = entry.stat()
    return status.st_dev, status.st_ino
