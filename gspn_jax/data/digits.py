"""The handwritten digits that are embedded in scikit-learn."""

import functools

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from gspn_jax.data.decoding import fit_image
from gspn_jax.data.source import hash_of

SIDE = 8


class DigitsSource:
    """The 1,797 handwritten digits (8x8, 17 grey levels) that are embedded in scikit-learn; levels 0..16 -> 0..255."""

    def __init__(self, size: int, channels: int):
        levels, self._labels, self.class_names = _read()
        self._images = _fitted(size, channels)
        self.fingerprint = hash_of(["digits", levels.tobytes(), self._labels.tobytes()])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        return {"image": self._images[index], "label": self._labels[index]}


@functools.cache
def _read() -> tuple[UInt8[np.ndarray, "1797 8 8"], Int32[np.ndarray, "1797"], tuple[str, ...]]:
    """Images, labels and names of the classes; scikit-learn reads them from a text file each time."""
    from sklearn.datasets import load_digits  # scikit-learn is slow to import

    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return levels, digits.target.astype(np.int32), tuple(str(name) for name in digits.target_names)


@functools.lru_cache(maxsize=4)
def _fitted(size: int, channels: int) -> UInt8[np.ndarray, "1797 size size channels"]:
    images = np.stack([fit_image(Image.fromarray(image), size, channels) for image in _read()[0]])
    images.setflags(write=False)  # sources share them
    return images
