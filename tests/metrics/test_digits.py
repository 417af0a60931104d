"""The judge of the demo tells digits from noise and right classes from wrong ones."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from gspn_jax.metrics.digits import DigitsJudge


@pytest.fixture(scope="module")
def real():
    digits = load_digits()
    return np.round(digits.images * 255 / 16).astype(np.uint8)[..., None], digits.target


@pytest.fixture(scope="module")
def judge(real):
    return DigitsJudge(*real)


def test_knows_held_out_digits(judge):
    assert judge.accuracy > 0.95


def test_real_digits_score_at_the_floor(judge, real):
    images, labels = real
    score = judge.score(images, labels)
    assert score.conditional_accuracy > 0.98
    assert score.frechet < 2 * score.frechet_floor


def test_wrong_classes_noise_and_a_missing_class_score_badly(judge, real):
    images, labels = real
    assert judge.score(images, (labels + 1) % 10).conditional_accuracy < 0.05
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    assert judge.score(noise, labels).conditional_accuracy < 0.3
    floor = judge.score(images, labels).frechet_floor
    assert judge.score(noise, labels).frechet > 20 * floor
    few, theirs = images[labels < 5], labels[labels < 5]
    assert judge.score(few, theirs).frechet > 3 * floor
    assert judge.score(few, theirs, classes=range(5)).frechet < floor  # half of them are the very same


@pytest.mark.wrong_shapes
def test_other_images_get_a_sentence(judge):
    with pytest.raises(ValueError, match="images must be uint8"):
        judge.score(np.zeros((4, 16, 16, 1), np.uint8), np.zeros(4, int))
