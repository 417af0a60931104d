"""RandAugment (arXiv 1909.13719) with the fifteen operations and the rising magnitudes of timm's "inc1" policy."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageEnhance, ImageOps

from gspn_jax.data.augment.crops import BICUBIC
from gspn_jax.data.augment.draws import whole

LARGEST = 10
"""Magnitudes are 0 .. LARGEST."""
MEAN_COLOUR = (124, 116, 104)
"""Mean colour of ImageNet, in 0 .. 255: what comes in from outside of an image."""


class Operation(NamedTuple):
    """`apply(image, value)` with the value of a magnitude; an operation without `value` takes no strength."""

    apply: Callable[[Image.Image, float], Image.Image]
    value: Callable[[float], float] | None = None
    signed: bool = False
    """Whether the value is negated at random."""


def _looked_up(image: Image.Image, function: Callable[[int], int]) -> Image.Image:
    return image.point([function(i) for i in range(256)] * len(image.getbands()))


def _posterized(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the upper bits. None is a black image, which Pillow's own function refuses since version 13."""
    return _looked_up(image, lambda i: i & ~(2 ** (8 - bits) - 1))


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=_fill(image))


def _fill(image: Image.Image) -> tuple[int, int, int] | int:
    return MEAN_COLOUR if image.mode == "RGB" else round(sum(MEAN_COLOUR) / 3)


def _enhanced(enhancer: type) -> Operation:
    """Blends with what an enhancer makes of the image without its property, by 0.1 .. 1.9; 1 is the image itself."""
    return Operation(
        lambda image, value: enhancer(image).enhance(1 + value),
        lambda magnitude: magnitude / LARGEST * 0.9,
        signed=True,
    )


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(lambda image, _: ImageOps.autocontrast(image)),
    "Equalize": Operation(lambda image, _: ImageOps.equalize(image)),
    "Invert": Operation(lambda image, _: ImageOps.invert(image)),
    "Rotate": Operation(
        lambda image, degrees: image.rotate(degrees, BICUBIC, fillcolor=_fill(image)),
        lambda magnitude: magnitude / LARGEST * 30,
        signed=True,
    ),
    "Posterize": Operation(_posterized, lambda magnitude: 4 - int(magnitude / LARGEST * 4)),
    "Solarize": Operation(
        lambda image, threshold: _looked_up(image, lambda i: i if i < threshold else 255 - i),
        lambda magnitude: 256 - int(magnitude / LARGEST * 256),
    ),
    "SolarizeAdd": Operation(
        lambda image, added: _looked_up(image, lambda i: min(255, i + added) if i < 128 else i),
        lambda magnitude: int(magnitude / LARGEST * 110),
    ),
    "Color": _enhanced(ImageEnhance.Color),
    "Contrast": _enhanced(ImageEnhance.Contrast),
    "Brightness": _enhanced(ImageEnhance.Brightness),
    "Sharpness": _enhanced(ImageEnhance.Sharpness),
    "ShearX": Operation(
        lambda image, shear: _affine(image, 1, shear, 0, 0, 1, 0),
        lambda magnitude: magnitude / LARGEST * 0.3,
        signed=True,
    ),
    "ShearY": Operation(
        lambda image, shear: _affine(image, 1, 0, 0, shear, 1, 0),
        lambda magnitude: magnitude / LARGEST * 0.3,
        signed=True,
    ),
    "TranslateX": Operation(
        lambda image, share: _affine(image, 1, 0, share * image.width, 0, 1, 0),
        lambda magnitude: magnitude / LARGEST * 0.45,
        signed=True,
    ),
    "TranslateY": Operation(
        lambda image, share: _affine(image, 1, 0, 0, 0, 1, share * image.height),
        lambda magnitude: magnitude / LARGEST * 0.45,
        signed=True,
    ),
}
"""By name. timm calls the last two "TranslateXRel" and "TranslateYRel", and some others "...Increasing"."""
_NAMES = tuple(OPERATIONS)


def apply_operation(image: Image.Image, name: str, magnitude: float, negative: bool = False) -> Image.Image:
    """An operation of OPERATIONS on an RGB or greyscale image, at a magnitude of 0 .. 10.

    `negative` negates the value of an operation that has a sign; others are the same with it.
    """
    operation = OPERATIONS[name]
    value = 0.0 if operation.value is None else operation.value(magnitude)
    return operation.apply(image, -value if negative and operation.signed else value)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """`layers` operations drawn with replacement, each applied with a probability, at normally distributed magnitudes.

    Magnitudes have mean `magnitude` and standard deviation `deviation`, cut to 0 .. 10.
    """

    layers: int = 2
    magnitude: float = 9.0
    deviation: float = 0.5
    probability: float = 0.5

    def __post_init__(self):
        if not 0 <= self.magnitude <= LARGEST:
            raise ValueError(f"The magnitude of RandAugment must be in 0..{LARGEST}, found {self.magnitude}")
        if self.layers < 0 or self.deviation < 0 or not 0 <= self.probability <= 1:
            raise ValueError(
                "RandAugment must have layers and deviation from 0 and a probability in 0..1, "
                f"found {self.layers}, {self.deviation} and {self.probability}"
            )

    @property
    def draws(self) -> int:
        return 4 * self.layers

    def choices(self, u: Float[np.ndarray, " draws"]) -> list[tuple[str, float, bool]]:
        """(name, magnitude, negative) of the operations to apply, by `draws` uniform numbers in (0, 1)."""
        chosen = []
        for which, applied, size, sign in np.reshape(u, (self.layers, 4)).tolist():
            if applied < self.probability:
                magnitude = self.magnitude + self.deviation * statistics.NormalDist().inv_cdf(size)
                chosen.append((_NAMES[whole(which, len(_NAMES))], min(max(magnitude, 0.0), float(LARGEST)), sign < 0.5))
        return chosen
