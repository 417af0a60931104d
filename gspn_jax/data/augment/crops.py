"""Where an image is cropped, for training and for evaluation, and the crop scaled to the network's size."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from gspn_jax.data.augment.draws import whole

TRIES = 10
BICUBIC = Image.Resampling.BICUBIC


class Box(NamedTuple):
    """Rows top .. top + height - 1 and columns left .. left + width - 1 of an image."""

    top: int
    left: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area (a share of the image's) and aspect (width by height, uniform in its logarithm)."""

    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    draws = 2 * TRIES + 2

    def __post_init__(self):
        for name, (low, high) in (("area", self.area), ("aspect", self.aspect)):
            if not 0 < low <= high or (name == "area" and high > 1):
                raise ValueError(
                    f"{name} must be a range above 0{' and up to 1' if name == 'area' else ''}, found {(low, high)}"
                )

    def box(self, height: int, width: int, u: Float[np.ndarray, " draws"]) -> Box:
        """The box of an image, by `draws` uniform numbers: the first of ten pairs of an area and an aspect that fit.

        If none fits, the largest box at the centre with an aspect within the range.
        """
        *pairs, down, right = u
        low, high = (math.log(aspect) for aspect in self.aspect)
        for of_area, of_aspect in zip(pairs[::2], pairs[1::2], strict=True):
            area = height * width * (self.area[0] + of_area * (self.area[1] - self.area[0]))
            aspect = math.exp(low + of_aspect * (high - low))
            columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < columns <= width and 0 < rows <= height:
                return Box(whole(down, height - rows + 1), whole(right, width - columns + 1), rows, columns)
        rows = min(height, round(width / self.aspect[0]))
        columns = min(width, round(height * self.aspect[1]))
        return Box((height - rows) // 2, (width - columns) // 2, rows, columns)


def resized_crop(image: Image.Image, box: Box, size: int) -> Image.Image:
    """The box cut out and then scaled to [size, size], bicubic with antialiasing."""
    cut = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return cut.resize((size, size), BICUBIC)


def evaluation_crop(image: UInt8[np.ndarray, "H W C"], size: int, share: float = 0.875) -> UInt8[np.ndarray, "S S C"]:
    """The shorter side scaled to size / share rounded down, bicubic with antialiasing, then [size, size] at the centre.

    As timm with `crop_pct` = share evaluates. Raises ValueError for a share that is not above 0 and up to 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share of the image that is cropped must be above 0 and up to 1, found {share}")
    height, width = image.shape[:2]
    short = math.floor(size / share)
    sides = [
        short if side == min(height, width) else int(short * side / min(height, width)) for side in (width, height)
    ]
    scaled = to_array(to_pillow(image).resize(tuple(sides), BICUBIC))
    top, left = (round((side - size) / 2) for side in scaled.shape[:2])
    return scaled[top : top + size, left : left + size]


def to_pillow(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """RGB, or greyscale for one channel. Raises ValueError for another shape or type."""
    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(
            f"An image must be uint8 [H, W, C] with C 1 or 3 and no empty axis, found {image.dtype} {list(image.shape)}"
        )
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def to_array(image: Image.Image) -> UInt8[np.ndarray, "H W C"]:
    """The inverse of `to_pillow`."""
    return np.array(image).reshape(image.height, image.width, -1)
