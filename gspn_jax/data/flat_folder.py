"""The images of another program as they are: files anywhere below a folder, without classes."""

import os
import pathlib

import numpy as np

from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import DataError, decode_image
from gspn_jax.data.source import IMAGE_EXTENSIONS, hash_of

_CHANNELS = 3


class FlatFolder:
    """Random access to {"image": uint8 [H, W, 3], "label": 0} in the order of the files' paths; `files` are those.

    With `image_size` None, images are not touched and must be of one size; else they are scaled and cropped to a square
    of it as ADM does. Hidden files and files of other kinds than JPEG and PNG are ignored.
    """

    class_names = ("",)

    def __init__(self, root: str | pathlib.Path, image_size: int | None = None):
        """Raises ConfigError for a folder without images, DataError for a first image that cannot be decoded."""
        self.root, self._size = pathlib.Path(root), image_size
        found = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
        self.files = tuple(
            sorted(
                path
                for path in found
                if path.lower().endswith(IMAGE_EXTENSIONS) and not os.path.basename(path).startswith(".")
            )
        )
        if not self.files:
            raise ConfigError(f"a folder of images must hold JPEG or PNG files, found none below {str(root)!r}")
        self.shape = self._decode(self.files[0]).shape
        names = [os.path.relpath(path, root) for path in self.files]
        self.fingerprint = hash_of([*names, repr([os.path.getsize(path) for path in self.files])])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        image = self._decode(self.files[index])
        if image.shape != self.shape:
            (height, width), (first_height, first_width) = image.shape[:2], self.shape[:2]
            raise DataError(
                f"{self.files[index]} must be of {first_height}x{first_width} as {self.files[0]} is, found "
                f"{height}x{width}: --image-size fits all to one"
            )
        return {"image": image, "label": np.int32(0)}

    def _decode(self, path: str) -> np.ndarray:
        try:
            encoded = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        return decode_image(encoded, path, self._size, _CHANNELS)
