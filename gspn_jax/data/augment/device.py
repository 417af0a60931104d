"""Augmentation of a batch on the device: normalise, erase, mix; and without the last two for evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from gspn_jax.data.augment.erasing import RandomErasing
from gspn_jax.data.augment.mixing import Mixing, smoothed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


def normalise(
    images: UInt8[Array, "B H W C"], mean: tuple[float, ...] = IMAGENET_MEAN,
    deviation: tuple[float, ...] = IMAGENET_DEVIATION,
) -> Float[Array, "B H W C"]:  # fmt: skip
    """Pixels over 255, less the mean of their channel, over its standard deviation; float32."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean, jnp.float32)) / jnp.array(deviation, jnp.float32)


@dataclasses.dataclass(frozen=True)
class DeviceAugmentation:
    """A batch of uint8 images and labels -> what the network and its loss take. None leaves a part out."""

    num_classes: int
    smoothing: float = 0.1
    erasing: RandomErasing | None = RandomErasing()
    mixing: Mixing | None = Mixing()
    mean: tuple[float, ...] = IMAGENET_MEAN
    deviation: tuple[float, ...] = IMAGENET_DEVIATION

    def __call__(
        self, images: UInt8[Array, "B H W C"], labels: Int[Array, "B"], key: Key[Array, ""]
    ) -> tuple[Float[Array, "B H W C"], Float[Array, "B K"]]:
        """Normalised, erased and mixed images, and soft targets, by a key of the step: of the whole batch, however many
        devices it is split over."""
        for_erasing, for_mixing = jax.random.split(key)
        x, targets = normalise(images, self.mean, self.deviation), smoothed(labels, self.num_classes, self.smoothing)
        if self.erasing:
            x = self.erasing(x, for_erasing)
        if self.mixing:
            mixture = self.mixing.draw(for_mixing, *x.shape[1:3])
            x, targets = mixture.images(x), mixture.targets(targets, *x.shape[1:3])
        return x, targets
