"""Crops, flips and RandAugment: Pillow's pixels to the bit, timm's rules, and draws that know only their place."""

import dataclasses
import statistics

import numpy as np
import pytest
from PIL import Image

from gspn_jax.data.augment.crops import Box, RandomResizedCrop, evaluation_crop, resized_crop, to_pillow
from gspn_jax.data.augment.draws import uniforms
from gspn_jax.data.augment.host import HostAugmentation
from gspn_jax.data.augment.rand_augment import OPERATIONS, RandAugment, apply_operation
from tests.data import numpy_augment


def picture(height, width, seed=0):
    """Waves with noise: smooth parts, edges, and few values that are 0 or 255."""
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([127 + 100 * np.sin(columns / 5 + c) * np.cos(rows / 4 - c) for c in range(3)], -1)
    noise = np.random.default_rng(seed).normal(0, 20, waves.shape)
    return np.clip(waves + noise, 10, 240).astype(np.uint8)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_at_each_magnitude_is_that_of_numpy_to_the_bit(name):
    for image in (picture(17, 22), picture(20, 13)):
        for magnitude in (0.0, 3.3, 9.0, 10.0):
            for sign in (1, -1):
                found = apply_operation(Image.fromarray(image), name, magnitude, sign < 0)
                np.testing.assert_array_equal(found, numpy_augment.operate(image, name, magnitude, sign))


def test_operations_change_images_and_signs_turn_them():
    image = Image.fromarray(picture(17, 22))
    one, other = (
        {name: np.asarray(apply_operation(image, name, 9.0, negative)) for name in OPERATIONS}
        for negative in (False, True)
    )
    same = {name for name in OPERATIONS if (one[name] == other[name]).all()}
    assert same == {"AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd"}
    assert len(OPERATIONS) == 15
    for name in OPERATIONS:
        assert (one[name] != np.asarray(image)).any(), name


def test_every_operation_takes_greyscale():
    image = to_pillow(picture(17, 22)[..., :1])
    for name in OPERATIONS:
        found = apply_operation(image, name, 9.0)
        assert (found.mode, found.size) == ("L", (22, 17)), name


@pytest.mark.parametrize(("height", "width"), [(50, 37), (37, 50), (10, 90), (90, 10)])
def test_crops_are_those_of_the_rule(height, width):
    crop = RandomResizedCrop()
    for index in range(200):
        u = uniforms(0, 0, index, crop.draws)
        box = crop.box(height, width, u)
        assert box == Box(*numpy_augment.crop_box(height, width, u))
        assert box.top >= 0 and box.left >= 0 and box.top + box.height <= height and box.left + box.width <= width


@pytest.mark.parametrize("size", [24, 60])
def test_a_crop_is_scaled_by_the_antialiased_cubic(size):
    image = picture(50, 37)
    found = np.asarray(resized_crop(image, Box(3, 4, 40, 30), size))
    assert any((found == expected).all() for expected in numpy_augment.resizes(image[3:43, 4:34], size, size))


@pytest.mark.parametrize(("shape", "sides", "corner"), [((60, 40), (54, 36), (11, 2)), ((40, 61), (36, 54), (2, 11))])
def test_evaluation_scales_the_short_side_and_crops_the_centre(shape, sides, corner):
    image = picture(*shape)
    found = evaluation_crop(image, 32)  # 32 / 0.875 = 36.57
    scaled = np.asarray(Image.fromarray(image).resize(sides[::-1], Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found, scaled[corner[0] : corner[0] + 32, corner[1] : corner[1] + 32])


def test_uniform_numbers_are_philox_by_place_and_uniform():
    """NumPy's generator is held to the published answer of Random123 (philox4x64, 10 rounds, counter and key zero)."""
    raw = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    first = np.random.Philox(key=np.zeros(2, np.uint64), counter=np.full(4, 2**64 - 1, np.uint64)).random_raw(4)
    assert first.tolist() == raw
    assert uniforms(1, 2, 3, 3).tolist() == [0.7189388877276963, 0.4112659742133145, 0.046238573686141204]
    drawn = np.stack([uniforms(1, 2, index, 30) for index in range(2000)])
    assert drawn.min() > 0 and drawn.max() < 1 and np.unique(drawn).size == drawn.size
    assert drawn.mean() == pytest.approx(0.5, abs=0.006) and drawn.var() == pytest.approx(1 / 12, rel=0.02)
    places = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (3, 2, 1)]
    assert len({tuple(uniforms(*place, 4)) for place in places}) == len(places)


def test_an_image_follows_from_its_place_alone():
    """However many are drawn, in whatever order: what resuming, hosts and workers change."""
    augment, image = HostAugmentation(size=32), picture(50, 37)
    places = [(epoch, index) for epoch in (0, 1) for index in (0, 1, 2**40)]
    forwards = {place: augment(image, seed=5, epoch=place[0], index=place[1]) for place in places}
    for epoch, index in reversed(places):
        np.testing.assert_array_equal(augment(image, seed=5, epoch=epoch, index=index), forwards[epoch, index])
    assert len({images.tobytes() for images in forwards.values()}) == len(places)


def test_an_image_is_cropped_mirrored_and_augmented_in_this_order():
    augment, image = HostAugmentation(size=24), picture(40, 30)
    seen = set()
    for index in range(30):
        u = uniforms(7, 1, index, 31)
        expected = resized_crop(image, augment.crop.box(40, 30, u[:22]), 24)
        if u[22] < 0.5:
            expected = Image.fromarray(np.asarray(expected)[:, ::-1])
        for name, magnitude, negative in augment.rand_augment.choices(u[23:]):
            expected = apply_operation(expected, name, magnitude, negative)
            seen.add(name)
        np.testing.assert_array_equal(augment(image, seed=7, epoch=1, index=index), expected)
    assert len(seen) > 5
    plain = dataclasses.replace(augment, rand_augment=None, flip=0.0)
    grey = plain(image[..., :1], seed=7, epoch=1, index=0)
    assert grey.shape == (24, 24, 1)
    expected = resized_crop(image[..., :1], augment.crop.box(40, 30, uniforms(7, 1, 0, 22)), 24)
    np.testing.assert_array_equal(grey[..., 0], expected)


def test_rand_augment_draws_with_replacement_at_normal_magnitudes():
    policy = RandAugment()
    layers = [policy.choices(uniforms(0, 0, index, policy.draws)) for index in range(4000)]
    chosen = [choice for layer in layers for choice in layer]
    assert len(chosen) / 8000 == pytest.approx(0.5, abs=0.025)
    counts = [sum(name == other for name, *_ in chosen) for other in OPERATIONS]
    assert min(counts) > 0.75 * len(chosen) / 15 and max(counts) < 1.25 * len(chosen) / 15
    assert any(len(layer) == 2 and layer[0][0] == layer[1][0] for layer in layers)
    magnitudes = [magnitude for _, magnitude, _ in chosen]
    assert max(magnitudes) == 10 and statistics.median(magnitudes) == pytest.approx(9, abs=0.03)
    below = sum(magnitude < 8.5 for magnitude in magnitudes) / len(magnitudes)
    assert below == pytest.approx(0.1587, abs=0.025)
    assert sum(negative for *_, negative in chosen) / len(chosen) == pytest.approx(0.5, abs=0.035)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(("make", "message"), [
    (lambda: RandomResizedCrop(area=(0.0, 1.0)), r"area must be a range above 0 and up to 1, found \(0.0, 1.0\)"),
    (lambda: RandomResizedCrop(aspect=(2.0, 1.0)), r"aspect must be a range above 0, found \(2.0, 1.0\)"),
    (lambda: RandAugment(magnitude=11.0), r"magnitude of RandAugment must be in 0..10, found 11.0"),
    (lambda: RandAugment(probability=1.5), r"a probability in 0..1, found 2, 0.5 and 1.5"),
    (lambda: evaluation_crop(picture(8, 8), 8, 0.0), r"must be above 0 and up to 1, found 0.0"),
    (lambda: HostAugmentation(size=8)(np.zeros((8, 8, 3), np.float32), seed=0, epoch=0, index=0),
     r"must be uint8 \[H, W, C\] with C 1 or 3 .*, found float32 \[8, 8, 3\]"),
])  # fmt: skip
def test_wrong_settings_and_images_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
