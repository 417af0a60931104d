"""Crops of an image, for training and for evaluation, scaled to the network's size."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
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

    def box(self, height: int, width: int, u: Sequence[float]) -> Box:
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


def resized_crop(image: UInt8[np.ndarray, "H W C"], box: Box, size: int) -> Image.Image:
    """The box cut out and then scaled to [size, size], bicubic with antialiasing. Raises ValueError as `to_pillow`."""
    check_image(image)
    cut = image[box.top : box.top + box.height, box.left : box.left + box.width]
    return to_pillow(cut).resize((size, size), BICUBIC)


def scaled_sides(height: int, width: int, short: int) -> tuple[int, int]:
    """(height, width) of an image whose shorter side is scaled to `short`; the other one is rounded down."""
    sides = [
        short if side == min(height, width) else int(short * side / min(height, width)) for side in (height, width)
    ]
    return sides[0], sides[1]


def short_side(size: int, share: float = 0.875) -> int:
    """The shorter side of an image of whose centre [size, size] is evaluated: size / share, rounded down.

    Raises ValueError for a share that is not above 0 and up to 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share of the image that is cropped must be above 0 and up to 1, found {share}")
    return math.floor(size / share)


def evaluation_crop(image: UInt8[np.ndarray, "H W C"], size: int, share: float = 0.875) -> UInt8[np.ndarray, "S S C"]:
    """The shorter side scaled to `short_side`, bicubic with antialiasing, then [size, size] at the centre.

    As timm with `crop_pct` = share evaluates. Raises ValueError for a share that is not above 0 and up to 1.
    """
    rows, columns = scaled_sides(*image.shape[:2], short_side(size, share))
    scaled = (
        image if image.shape[:2] == (rows, columns) else to_array(to_pillow(image).resize((columns, rows), BICUBIC))
    )
    top, left = (round((side - size) / 2) for side in (rows, columns))
    return scaled[top : top + size, left : left + size]


def to_pillow(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """RGB, or greyscale for one channel. Raises ValueError for another shape or type."""
    check_image(image)
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def check_image(image: UInt8[np.ndarray, "H W C"]) -> None:
    """Raises ValueError unless the image is uint8 with one or three channels."""
    if image.ndim != 3 or image.dtype != np.uint8 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(
            f"An image must be uint8 [H, W, C] with C 1 or 3 and no empty axis, found {image.dtype} {list(image.shape)}"
        )


def to_array(image: Image.Image) -> UInt8[np.ndarray, "H W C"]:
    """The inverse of `to_pillow`."""
    return np.asarray(image).reshape(image.height, image.width, -1)
