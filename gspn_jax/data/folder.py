"""A labelled folder of images: one folder a class."""

import collections
import os

import numpy as np

from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import read_image
from gspn_jax.data.listing import KINDS, list_images, refuse_splits, say_left_out
from gspn_jax.data.source import hash_of, shorten

_SIZES_IN_FINGERPRINT = 1024


class FolderSource:
    """The images in one folder a class: `root/<class>/**/*.jpg`, as `listing` finds them.

    Classes and files are sorted by name; folders within a class folder belong to it. What is left out is logged. The
    fingerprint covers class and file names, and the sizes of about 1,000 files spread evenly.
    """

    def __init__(self, root: str, size: int | None, channels: int, *, insist: bool = False):
        """With `insist`, folders named "train" and "val" are classes all the same.

        Raises ConfigError for what is no such folder, or the one above it.
        """
        if not os.path.isdir(root):
            raise ConfigError(
                f"data.path must be a folder with one folder of images a class, found "
                f"{'a file' if os.path.exists(root) else 'nothing'} at {root!r}"
            )
        self._root, self._size, self._channels = root, size, channels
        listing = list_images(root)
        files: dict[str, list[str]] = {name: [] for name in sorted(_folders(root))}
        beside = 0
        for name in listing.files:
            folder, _, rest = name.partition("/")
            if rest:
                files[folder].append(name)
            else:
                beside += 1
        inner = any(name.count("/") > 1 for name in listing.files)
        if not insist:
            refuse_splits(repr(root), set(files), inner, f"give one of them, such as {os.path.join(root, 'train')!r}")
        left_out = listing.left_out + collections.Counter({"images beside the class folders": beside})
        say_left_out(root, left_out)
        self.class_names = tuple(files)
        self._files = [name for group in files.values() for name in group]
        self._labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(group) for group in files.values()])
        if not self._files:
            raise ConfigError(
                f"data.path must be a folder with one folder of images a class, found no {KINDS} "
                f"file in the {len(files)} folders of {root!r}"
            )
        if empty := [folder for folder, group in files.items() if not group]:
            raise ConfigError(f"every class folder in {root!r} must hold {KINDS} files, found none in {shorten(empty)}")
        spread = np.linspace(0, len(self._files) - 1, min(len(self._files), _SIZES_IN_FINGERPRINT)).astype(int)
        sizes = [os.path.getsize(os.path.join(root, self._files[i])) for i in spread]
        self.fingerprint = hash_of(["folder", *self.class_names, *self._files, repr(sizes)])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        path = os.path.join(self._root, self._files[index])
        return {"image": read_image(path, self._size, self._channels), "label": self._labels[index]}


def _folders(root: str) -> list[str]:
    """The class folders, also those without an image; a link back to `root` is none."""
    with os.scandir(root) as entries:
        found = [entry.name for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry.path)]
    return [name for name in found if not os.path.samefile(os.path.join(root, name), root)]
