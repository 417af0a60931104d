"""The judge that is trained on the data tells real images from others, and one class from another."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from gspn_jax.metrics import classifier
from gspn_jax.metrics.classifier import ClassifierJudge


@pytest.fixture(scope="module")
def digits():
    """(images, labels) to train on, and held out."""
    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    return [(images[part], found.target[part]) for part in (order[:1300], order[1300:])]


@pytest.fixture(scope="module")
def judge(digits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "WIDTHS", (16, 32))
        patch.setattr(classifier, "BATCH", 64)
        yield ClassifierJudge(*digits[0], steps=150, flip=False)


def test_real_images_are_at_the_floor_and_others_are_not(judge, digits):
    images, labels = digits[1]
    rng = np.random.default_rng(1)
    real = judge.score(images, labels, images, labels)
    assert real.classifier_accuracy > 0.9 and real.conditional_accuracy == real.classifier_accuracy
    # the same images in another order: eigenvalues that rounding makes, about 1e-16, under 128 square roots
    assert real.frechet == pytest.approx(real.frechet_floor, rel=0, abs=128e-8) and real.num_samples == len(images)
    noise = judge.score(rng.integers(256, size=images.shape, dtype=np.uint8), labels, images, labels)
    one_class = judge.score(np.repeat(images[labels == 3][:1], len(images), 0), labels, images, labels)
    blurred = judge.score((images // 2 + np.roll(images, 1, 2) // 2), labels, images, labels)
    assert min(noise.frechet, one_class.frechet) > 5 * real.frechet and blurred.frechet > 1.5 * real.frechet
    assert max(noise.conditional_accuracy, one_class.conditional_accuracy) < 0.25


def test_samples_of_another_class_than_asked_for_are_told(judge, digits):
    images, labels = digits[1]
    right = judge.score(images[:200], labels[:200], images, labels)
    wrong = judge.score(images[:200], (labels[:200] + 1) % 10, images, labels)
    assert right.conditional_accuracy > 0.9 and wrong.conditional_accuracy < 0.1
    assert right.frechet == wrong.frechet


def test_more_samples_than_real_images_get_a_sentence(judge, digits):
    images, labels = digits[1]
    with pytest.raises(ValueError, match=r"at most as many samples as held-out images \(20\) .*, found 21"):
        judge.score(images[:21], labels[:21], images[:20], labels[:20])
