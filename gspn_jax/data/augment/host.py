"""Augmentation of a training image on the host: crop, flip, RandAugment; pixels stay uint8."""

import dataclasses

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from gspn_jax.data.augment.crops import RandomResizedCrop, resized_crop, to_array
from gspn_jax.data.augment.draws import uniforms
from gspn_jax.data.augment.rand_augment import RandAugment, apply_operation


@dataclasses.dataclass(frozen=True)
class HostAugmentation:
    """An image of any size -> [size, size, C], cropped, mirrored with probability `flip`, and changed by RandAugment.

    `rand_augment` None leaves that out.
    """

    size: int = 224
    crop: RandomResizedCrop = RandomResizedCrop()
    flip: float = 0.5
    rand_augment: RandAugment | None = RandAugment()

    def __call__(
        self, image: UInt8[np.ndarray, "H W C"], *, seed: int, epoch: int, index: int
    ) -> UInt8[np.ndarray, "S S C"]:
        """The image numbered `index` as epoch `epoch` of `seed` shows it. C is 1 or 3; ValueError if it is not."""
        crop, rand = self.crop, self.rand_augment
        u = uniforms(seed, epoch, index, crop.draws + 1 + (rand.draws if rand else 0))
        height, width = image.shape[:2]
        picture = resized_crop(image, crop.box(height, width, u[: crop.draws].tolist()), self.size)
        if u[crop.draws] < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rand:
            for name, magnitude, negative in rand.choices(u[crop.draws + 1 :]):
                picture = apply_operation(picture, name, magnitude, negative)
        return to_array(picture)
