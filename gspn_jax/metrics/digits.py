"""The judge of the digits demo: a small classifier trained on the real digits, and distances in its features."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from gspn_jax import extras
from gspn_jax.metrics.frechet import frechet_distance, moments

EPOCHS = 60


@dataclasses.dataclass(frozen=True)
class DigitsScore:
    """`conditional_accuracy`: share of samples that the classifier gives the class asked for, 0..1.
    `frechet`: distance of the samples from one half of the real digits, in the classifier's 64 hidden features.
    `frechet_floor`: distance of the other half of the real digits from it, with equally many images on both sides.
    `classifier_accuracy`: the classifier on real digits that it was not trained on, 0..1."""

    conditional_accuracy: float
    frechet: float
    frechet_floor: float
    classifier_accuracy: float


class DigitsJudge:
    """Trained once on four fifths of the real digits; the same each time (about two seconds)."""

    def __init__(self, images: UInt8[np.ndarray, "N 8 8 1"], labels: Int[np.ndarray, " N"]):
        extras.require("eval", "sklearn", by="the judge of digits")
        from sklearn.model_selection import train_test_split
        from sklearn.neural_network import MLPClassifier

        self._images, self._labels = images, labels
        train_x, test_x, train_y, test_y = train_test_split(
            self._pixels(images), labels, test_size=0.2, random_state=0, stratify=labels
        )
        self._classifier = MLPClassifier((64,), alpha=0.01, learning_rate_init=3e-3, random_state=0)
        order = np.random.default_rng(0)
        for _ in range(EPOCHS):  # a fixed number of epochs; fit() would warn that it did not wait for convergence
            for index in np.array_split(order.permutation(len(train_x)), len(train_x) // 100):
                self._classifier.partial_fit(train_x[index], train_y[index], classes=np.unique(labels))
        self.accuracy = float(self._classifier.score(test_x, test_y))
        self.weights = self._classifier.coefs_[0]
        self.biases = self._classifier.intercepts_[0]

    @staticmethod
    def _pixels(images: UInt8[np.ndarray, "N 8 8 1"]) -> Float[np.ndarray, "N 64"]:
        return images.reshape(len(images), -1) / 255.0

    def features(self, images: UInt8[np.ndarray, "N 8 8 1"]) -> Float[np.ndarray, "N 64"]:
        """The classifier's hidden layer after its ReLU."""
        return np.maximum(self._pixels(images) @ self.weights + self.biases, 0.0)

    def score(
        self, images: UInt8[np.ndarray, "N 8 8 1"], labels: Int[np.ndarray, " N"], *, classes: Sequence[int] = range(10)
    ) -> DigitsScore:
        """Judges samples asked for as `labels`, beside the real digits of `classes`.

        Raises ValueError for images that are not [N, 8, 8, 1] uint8.
        """
        if images.shape[1:] != self._images.shape[1:] or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [N, 8, 8, 1], found {images.dtype} {list(images.shape)}")
        known = self._images[np.isin(self._labels, classes)]
        order = np.random.default_rng(0).permutation(len(known))
        half = len(order) // 2
        real = moments(self.features(known[order[:half]]))
        other = moments(self.features(known[order[half : 2 * half]]))
        # equally many samples as real digits: the distance is biased by the number of images
        drawn = moments(self.features(images[np.random.default_rng(0).permutation(len(images))[:half]]))
        return DigitsScore(
            conditional_accuracy=float(np.mean(self._classifier.predict(self._pixels(images)) == labels)),
            frechet=frechet_distance(*drawn, *real),
            frechet_floor=frechet_distance(*other, *real),
            classifier_accuracy=self.accuracy,
        )
