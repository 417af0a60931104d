"""A judge of small images where there is no Inception: a small network trained on the real, labelled ones.

Its numbers tell checkpoints of one data set apart; they are not FID, and compare with no published ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from gspn_jax.metrics.frechet import frechet_distance, moments
from gspn_jax.pixels import from_uint8

WIDTHS = (64, 128, 256)
"""Channels at each halving of the resolution."""
FEATURES = 128
GROUPS = 8
BATCH = 256


class _Network(nnx.Module):
    """3x3 convolutions, two at each resolution, each with group normalisation; the mean over pixels; two linears."""

    def __init__(self, channels: int, classes: int, rngs: nnx.Rngs):
        convolutions, norms, before = [], [], channels
        for width in WIDTHS:
            for stride in (2 if width > WIDTHS[0] else 1, 1):
                convolutions.append(nnx.Conv(before, width, (3, 3), strides=stride, rngs=rngs))
                norms.append(nnx.GroupNorm(width, num_groups=GROUPS, rngs=rngs))
                before = width
        self.convolutions, self.norms = nnx.List(convolutions), nnx.List(norms)
        self.features = nnx.Linear(before, FEATURES, rngs=rngs)
        self.logits = nnx.Linear(FEATURES, classes, rngs=rngs)

    def __call__(self, images: UInt8[Array, "N H W C"]) -> tuple[Float[Array, "N F"], Float[Array, "N K"]]:
        x = from_uint8(images)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = jax.nn.relu(norm(convolution(x)))
        features = jax.nn.relu(self.features(x.mean((1, 2))))
        return features, self.logits(features)


@dataclasses.dataclass(frozen=True)
class ClassifierScore:
    """`conditional_accuracy`: share of samples that the classifier gives the class asked for, 0..1.
    `frechet`: distance of the samples from the images that it was trained on, in its features.
    `frechet_floor`: the same of as many real images that it was not trained on.
    `classifier_accuracy`: the classifier on those, 0..1."""

    conditional_accuracy: float
    frechet: float
    frechet_floor: float
    classifier_accuracy: float
    num_samples: int


class ClassifierJudge:
    """Trained when it is made, by AdamW with a one-cycle schedule; with `flip` on images of which half are mirrored."""

    def __init__(
        self,
        images: UInt8[np.ndarray, "N H W C"],
        labels: Int[np.ndarray, " N"],
        *,
        steps: int,
        flip: bool,
        seed: int = 0,
    ):
        classes = int(labels.max()) + 1
        self._graph, params = nnx.split(_Network(images.shape[-1], classes, nnx.Rngs(seed)))
        optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 2e-3, pct_start=0.2), weight_decay=0.05)
        rng = np.random.default_rng(seed)

        def loss(params, images, labels):
            _, logits = nnx.merge(self._graph, params)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        @jax.jit
        def step(params, state, images, labels, mirrored):
            images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
            updates, state = optimizer.update(jax.grad(loss)(params, images, labels), state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for _ in range(steps):
            rows = rng.integers(len(images), size=BATCH)
            mirrored = rng.random(BATCH) < flip / 2
            params, state = step(params, state, images[rows], labels[rows].astype(np.int32), mirrored)
        self._params = jax.block_until_ready(params)
        self._real = moments(self._apply(images)[0])

    @functools.cached_property
    def _forward(self):
        return jax.jit(lambda params, images: nnx.merge(self._graph, params)(images))

    def _apply(self, images: UInt8[np.ndarray, "N H W C"]) -> tuple[Float[np.ndarray, "N F"], Int[np.ndarray, " N"]]:
        """Features and the class that each image is given."""
        features, classes = [], []
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            padded = np.pad(batch, ((0, BATCH - len(batch)), (0, 0), (0, 0), (0, 0)))  # one shape, compiled once
            found, logits = self._forward(self._params, padded)
            features.append(np.asarray(found)[: len(batch)])
            classes.append(np.asarray(logits.argmax(-1))[: len(batch)])
        return np.concatenate(features), np.concatenate(classes)

    def score(
        self,
        samples: UInt8[np.ndarray, "N H W C"],
        wanted: Int[np.ndarray, " N"],
        held_out: UInt8[np.ndarray, "M H W C"],
        labels: Int[np.ndarray, " M"],
    ) -> ClassifierScore:
        """Judges samples asked for as `wanted`, beside real images that it was not trained on.

        For the floor, as many of those are taken as there are samples: the distance grows as images get fewer. Raises
        ValueError when there are not so many.
        """
        if len(samples) > len(held_out):
            raise ValueError(
                f"at most as many samples as held-out images ({len(held_out)}) can be judged, found {len(samples)}"
            )
        features, classes = self._apply(samples)
        real, given = self._apply(held_out)
        chosen = np.random.default_rng(0).permutation(len(real))[: len(samples)]
        return ClassifierScore(
            conditional_accuracy=float(np.mean(classes == wanted)),
            frechet=frechet_distance(*moments(features), *self._real),
            frechet_floor=frechet_distance(*moments(real[chosen]), *self._real),
            classifier_accuracy=float(np.mean(given == labels)),
            num_samples=len(samples),
        )
