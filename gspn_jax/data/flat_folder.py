"""The images of another program as they are: files anywhere below a folder, without classes."""

import os
import pathlib

import numpy as np

from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import DataError, Fit, read_image
from gspn_jax.data.listing import KINDS, list_images, say_left_out
from gspn_jax.data.source import MAX_BAD_IN_A_ROW, hash_of


class FlatFolder:
    """Random access to {"image": uint8 [H, W, C], "label": 0} in the order of the files' paths; `files` are those.

    With `image_size` None, images are not touched and must be of one size; else they are scaled and cropped to a square
    of it as `fit` says. `left_out` describes what is no image, as `listing` says; it is logged.
    """

    class_names = ("",)

    def __init__(
        self,
        root: str | pathlib.Path,
        image_size: int | None = None,
        channels: int = 3,
        *,
        skip_bad: bool = False,
        fit: Fit = "adm",
    ):
        """Raises ConfigError for a folder without images; with `image_size` None, DataError for a first image that
        cannot be decoded, or with `skip_bad` for many of them in a row."""
        self.root, self._size, self._channels, self._fit = pathlib.Path(root), image_size, channels, fit
        listing = list_images(root)
        say_left_out(root, listing.left_out)
        self.left_out = listing.describe_left_out()
        self.files = tuple(os.path.join(root, name) for name in listing.files)
        if not self.files:
            raise ConfigError(f"a folder of images must hold {KINDS} files, found none below {str(root)!r}")
        self.shape = (image_size, image_size, channels) if image_size else self._first_shape(skip_bad)
        self.fingerprint = hash_of([*listing.files, repr([os.path.getsize(path) for path in self.files])])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        """Raises DataError for an image that cannot be decoded, ConfigError for one of another size than the first."""
        image = read_image(self.files[index], self._size, self._channels, self._fit)
        if image.shape != self.shape:
            (height, width), (first_height, first_width) = image.shape[:2], self.shape[:2]
            raise ConfigError(
                f"{self.files[index]} must be of {first_height}x{first_width} as {self._first} is, found "
                f"{height}x{width}: --image-size fits all to one"
            )
        return {"image": image, "label": np.int32(0)}

    def _first_shape(self, skip_bad: bool) -> tuple[int, ...]:
        tries = self.files[: MAX_BAD_IN_A_ROW if skip_bad else 1]
        for number, self._first in enumerate(tries, 1):
            try:
                return read_image(self._first, None, self._channels).shape
            except DataError:
                if number == len(tries):
                    raise
        raise AssertionError("there is a file")
