"""Random erasing (arXiv 1708.04896): a box of an image becomes noise; and boxes as masks."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

TRIES = 10


class Boxes(NamedTuple):
    """Rows top .. bottom - 1 and columns left .. right - 1 of each image, or of all; none where they are equal."""

    top: Int[Array, "*B"]
    bottom: Int[Array, "*B"]
    left: Int[Array, "*B"]
    right: Int[Array, "*B"]

    def mask(self, height: int, width: int) -> Bool[Array, "*B H W 1"]:
        rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
        top, bottom, left, right = (jnp.asarray(side)[..., None, None, None] for side in self)
        return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """A box in an image with a probability, of random area (a share of the image's) and aspect (height by width, even
    in its logarithm), filled with normal noise."""

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"The probability of erasing must be in 0..1, found {self.probability}")
        for name, (low, high) in (("area", self.area), ("aspect", self.aspect)):
            if not 0 < low <= high:
                raise ValueError(f"The {name} of erased boxes must be a range above 0, found {(low, high)}")

    def __call__(self, images: Float[Array, "B H W C"], key: Key[Array, ""]) -> Float[Array, "B H W C"]:
        """Normalised images with a box of those that are chosen filled with N(0, 1), every channel of it."""
        batch, height, width, _ = images.shape
        for_boxes, for_noise = jax.random.split(key)
        boxes = self.boxes(jax.random.uniform(for_boxes, (batch, 2 * TRIES + 3)), height, width)
        return jnp.where(boxes.mask(height, width), jax.random.normal(for_noise, images.shape, images.dtype), images)

    def boxes(self, u: Float[Array, "B 23"], height: int, width: int) -> Boxes:
        """The boxes of images by numbers in [0, 1): whether, place down and right, then ten areas and ten aspects.

        The first pair that fits inside the image counts; without one nothing is erased.
        """
        chosen, down, right = u[:, 0] < self.probability, u[:, 1], u[:, 2]
        of_area, of_aspect = u[:, 3 : 3 + TRIES], u[:, 3 + TRIES :]
        area = height * width * (self.area[0] + of_area * (self.area[1] - self.area[0]))
        low, high = (math.log(aspect) for aspect in self.aspect)
        aspect = jnp.exp(low + of_aspect * (high - low))
        rows = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
        columns = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
        fits = (rows < height) & (columns < width)
        first = jnp.argmax(fits, axis=1, keepdims=True)
        erased = chosen & fits.any(1)
        rows, columns = (jnp.where(erased, jnp.take_along_axis(sides, first, 1)[:, 0], 0) for sides in (rows, columns))
        top = jnp.floor(down * (height - rows + 1)).astype(jnp.int32)
        left = jnp.floor(right * (width - columns + 1)).astype(jnp.int32)
        top, left = jnp.minimum(top, height - rows), jnp.minimum(left, width - columns)
        return Boxes(top, top + rows, left, left + columns)
