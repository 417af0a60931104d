"""The handwritten digits that are embedded in scikit-learn."""

import numpy as np
from PIL import Image

from gspn_jax.data.decoding import fit_image
from gspn_jax.data.source import hash_of

SIDE = 8


class DigitsSource:
    """The 1,797 handwritten digits (8x8, 17 grey levels) that are embedded in scikit-learn; levels 0..16 -> 0..255."""

    def __init__(self, size: int, channels: int):
        from sklearn.datasets import load_digits  # scikit-learn is slow to import

        digits = load_digits()
        levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        self._images = np.stack([fit_image(Image.fromarray(image), size, channels) for image in levels])
        self._labels = digits.target.astype(np.int32)
        self.class_names = tuple(str(name) for name in digits.target_names)
        self.fingerprint = hash_of(["digits", levels.tobytes(), self._labels.tobytes()])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        return {"image": self._images[index], "label": self._labels[index]}
