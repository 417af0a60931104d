"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch with itself in reverse order, and soft targets."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from gspn_jax.data.augment.erasing import Boxes


class Mixture(NamedTuple):
    """Parts of every image: `weight` of it plus 1 - weight of its partner, and inside `box` the partner alone.

    The partner of the first image is the last, and so on.
    """

    weight: Float[Array, ""]
    box: Boxes

    def images(self, images: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        partners = images[::-1]
        mixed = self.weight * images + (1 - self.weight) * partners
        return jnp.where(self.box.mask(*images.shape[1:3]), partners, mixed)

    def targets(self, targets: Float[Array, "B K"], height: int, width: int) -> Float[Array, "B K"]:
        """Targets mixed by what is seen of either image: the weight, less the box's true area."""
        top, bottom, left, right = self.box
        lam = self.weight * (1 - (bottom - top) * (right - left) / (height * width))
        return lam * targets + (1 - lam) * targets[::-1]


def mixup(lam: Float[Array, ""]) -> Mixture:
    """`lam` of each image and 1 - lam of its partner."""
    nothing = jnp.int32(0)
    return Mixture(jnp.asarray(lam, jnp.float32), Boxes(nothing, nothing, nothing, nothing))


def cutmix(lam: Float[Array, ""], row: Int[Array, ""], column: Int[Array, ""], height: int, width: int) -> Mixture:
    """A box of 1 - lam of the area, its sides rounded down, around (row, column), cut at the border."""

    def side(size: int, centre: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        length = jnp.floor(size * jnp.sqrt(1 - lam)).astype(jnp.int32)
        return jnp.clip(centre - length // 2, 0, size), jnp.clip(centre + (length + 1) // 2, 0, size)

    return Mixture(jnp.float32(1), Boxes(*side(height, row), *side(width, column)))


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Each batch by Mixup with lambda ~ Beta(mixup, mixup) or CutMix with Beta(cutmix, cutmix); 0 leaves one out.

    `switch` is the probability of CutMix where there are both, `probability` that a batch is mixed at all.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    probability: float = 1.0

    def __post_init__(self):
        if self.mixup < 0 or self.cutmix < 0 or self.mixup + self.cutmix == 0:
            raise ValueError(
                f"mixup and cutmix must be at least 0 and one of them above, found {self.mixup} and {self.cutmix}"
            )
        if not (0 <= self.switch <= 1 and 0 <= self.probability <= 1):
            raise ValueError(
                "The probabilities of mixing must be in 0..1, "
                f"found switch {self.switch} and probability {self.probability}"
            )

    def draw(self, key: Key[Array, ""], height: int, width: int) -> Mixture:
        """The mixture of a batch of images [height, width]."""
        for_mixup, for_cutmix, for_row, for_column, for_choice = jax.random.split(key, 5)
        mixtures = []
        if self.mixup:
            mixtures.append(mixup(jax.random.beta(for_mixup, self.mixup, self.mixup)))
        if self.cutmix:
            mixtures.append(
                cutmix(
                    jax.random.beta(for_cutmix, self.cutmix, self.cutmix),
                    jax.random.randint(for_row, (), 0, height),
                    jax.random.randint(for_column, (), 0, width),
                    height,
                    width,
                )
            )
        is_cutmix, is_mixed = jax.random.uniform(for_choice, (2,)) < jnp.array([self.switch, self.probability])
        chosen = jax.tree.map(lambda a, b: jnp.where(is_cutmix, b, a), mixtures[0], mixtures[-1])
        return jax.tree.map(lambda a, b: jnp.where(is_mixed, a, b), chosen, mixup(1.0))


def smoothed(labels: Int[Array, "B"], num_classes: int, smoothing: float) -> Float[Array, "B K"]:
    """One-hot targets of which `smoothing` is spread over all classes, the true one included."""
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
