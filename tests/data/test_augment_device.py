"""Erasing and mixing of batches at given boxes and lambdas beside NumPy loops, and what their draws are like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gspn_jax.data.augment.device import DeviceAugmentation, normalise
from gspn_jax.data.augment.erasing import Boxes, RandomErasing
from gspn_jax.data.augment.mixing import Mixing, cutmix, mixup, smoothed
from tests.data import numpy_augment

HEIGHT, WIDTH, CLASSES = 12, 9, 5


def batch(count=4, seed=0):
    random = np.random.default_rng(seed)
    return (random.integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8), random.integers(0, CLASSES, count))


def test_pixels_are_normalised_by_channel():
    images, _ = batch()
    expected = (images / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    found = normalise(jnp.asarray(images))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_targets_are_smoothed_over_all_classes():
    found = np.asarray(smoothed(jnp.array([2, 0]), 5, 0.1))
    np.testing.assert_allclose(found, [[0.02, 0.02, 0.92, 0.02, 0.02], [0.92, 0.02, 0.02, 0.02, 0.02]], rtol=1e-6)


@pytest.mark.parametrize("centre", [None, (0, 0), (5, 4), (11, 8), (3, 8)])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.72, 1.0])
def test_mixing_at_a_given_lambda_is_that_of_a_loop(lam, centre):
    images, labels = batch(3)
    images = normalise(jnp.asarray(images))
    targets = smoothed(jnp.asarray(labels), CLASSES, 0.1)
    mixture = mixup(lam) if centre is None else cutmix(lam, *centre, HEIGHT, WIDTH)
    expected, expected_targets = numpy_augment.mixed(images, targets, lam, centre)
    np.testing.assert_allclose(mixture.images(images), expected, atol=1e-6)
    np.testing.assert_allclose(mixture.targets(targets, HEIGHT, WIDTH), expected_targets, atol=1e-6)


def test_boxes_are_erased_by_the_rule_and_only_they():
    erasing = RandomErasing()
    u = np.random.default_rng(1).uniform(size=(400, 23)).astype(np.float32)
    u[:3, 0] = 0.1
    u[0, 3:] = 1.0  # too high in all tries
    found = np.stack(jax.jit(erasing.boxes, static_argnums=(1, 2))(jnp.asarray(u), HEIGHT, 31), 1)
    expected = [numpy_augment.erased_box(HEIGHT, 31, row.astype(np.float64)) for row in u]
    assert expected[0] is None and sum(box is not None for box in expected) == pytest.approx(100, abs=35)
    for box, truth in zip(found.tolist(), expected, strict=True):
        assert tuple(box) == truth if truth else (box[0], box[2]) == (box[1], box[3])
    mask = np.asarray(Boxes(*jnp.asarray(found.T)).mask(HEIGHT, 31))[..., 0]
    for one, truth in zip(mask, expected, strict=True):
        assert one.sum() == (0 if truth is None else (truth[1] - truth[0]) * (truth[3] - truth[2]))
        assert truth is None or one[truth[0] : truth[1], truth[2] : truth[3]].all()


def test_erased_pixels_are_normal_noise_and_the_others_are_kept():
    images = jnp.full((512, 16, 16, 3), 7.0)
    found = np.asarray(jax.jit(RandomErasing())(images, jax.random.key(0)))
    erased = (found != 7).any(-1)
    assert (found[~erased] == 7).all() and (found[erased] != 7).all()
    assert erased.any((1, 2)).mean() == pytest.approx(0.25, abs=0.1)
    noise = found[erased]
    assert noise.size > 10_000 and np.unique(noise).size > 0.99 * noise.size
    assert noise.mean() == pytest.approx(0, abs=0.05) and noise.std() == pytest.approx(1, abs=0.05)


def test_batches_are_mixed_by_either_at_their_lambdas():
    """Quantiles beside those of NumPy's draws, of the weights of Mixup and of the shares that boxes of CutMix cover."""
    draw = jax.jit(jax.vmap(lambda key: Mixing(switch=0.75).draw(key, 256, 192)))
    weight, (top, bottom, left, right) = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), 8000)))
    shares = (bottom - top) * (right - left) / (256 * 192)
    is_mixup = weight < 1
    assert is_mixup.mean() == pytest.approx(0.25, abs=0.025) and not shares[is_mixup].any()
    random, at = np.random.default_rng(0), np.linspace(0.05, 0.95, 10)
    sides, centres = np.sqrt(1 - random.beta(1, 1, (100_000, 1))), random.uniform(size=(100_000, 2))
    expected = (np.minimum(centres + sides / 2, 1) - np.maximum(centres - sides / 2, 0)).prod(1)
    np.testing.assert_allclose(np.quantile(shares[~is_mixup], at), np.quantile(expected, at), atol=0.03)
    expected = random.beta(0.8, 0.8, 100_000)
    np.testing.assert_allclose(np.quantile(weight[is_mixup], at), np.quantile(expected, at), atol=0.05)


def test_a_batch_may_stay_unmixed_and_either_kind_may_be_left_out():
    keys = jax.random.split(jax.random.key(0), 2000)
    weight, box = jax.jit(jax.vmap(lambda key: Mixing(mixup=0, probability=0.25).draw(key, 32, 32)))(keys)
    assert (np.asarray(weight) == 1).all()
    assert (np.asarray(box.bottom) > box.top).mean() == pytest.approx(0.25, abs=0.05)


def test_a_batch_is_the_same_however_it_is_split_over_devices():
    images, labels = (jnp.asarray(a) for a in batch(8))
    augment = jax.jit(DeviceAugmentation(CLASSES))
    key = jax.random.fold_in(jax.random.key(0), 3)
    whole = augment(images, labels, key)
    mesh = jax.make_mesh((8,), ("data",))
    where = NamedSharding(mesh, PartitionSpec("data"))
    split = augment(*jax.device_put((images, labels), where), key)
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(whole[1].sum(1), 1, rtol=1e-5)
    other = augment(images, labels, jax.random.key(1))
    assert (other[0] != whole[0]).any()


def test_parts_can_be_left_out():
    images, labels = batch()
    x, targets = DeviceAugmentation(CLASSES, smoothing=0.0, erasing=None, mixing=None)(
        jnp.asarray(images), jnp.asarray(labels), jax.random.key(0)
    )
    np.testing.assert_array_equal(x, normalise(jnp.asarray(images)))
    np.testing.assert_array_equal(targets, np.eye(CLASSES)[labels])


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Mixing(mixup=0, cutmix=0), "one of them above, found 0 and 0"),
    (lambda: Mixing(switch=2.0), r"in 0..1, found switch 2.0 and probability 1.0"),
    (lambda: RandomErasing(probability=-1.0), r"must be in 0..1, found -1.0"),
    (lambda: RandomErasing(area=(0.5, 0.1)), r"must be a range above 0, found \(0.5, 0.1\)"),
])  # fmt: skip
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
