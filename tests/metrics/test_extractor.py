"""Features in batches: the same numbers for any batch size and number of devices, and none from padding."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from gspn_jax.metrics import inception
from gspn_jax.metrics.extractor import Extractor

TOLERANCE = 1e-5  # of the largest feature: float32 sums in another order


@functools.cache
def params():
    return inception.random_params(0)


@functools.cache
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 16, 12, 3), np.uint8)


@functools.cache
def one_by_one() -> inception.Features:
    network = jax.jit(inception.network)
    each = [network(params(), inception.resize(images()[i : i + 1])) for i in range(3)]
    return inception.Features(*(np.concatenate(parts) for parts in zip(*each, strict=True)))


def check(batches, counts: list[int]) -> None:
    """Masks have `counts` images, and what they keep are the features of the images one by one."""
    batches = list(batches)
    masks = [np.asarray(mask) for _, mask in batches]
    assert [int(mask.sum()) for mask in masks] == counts
    for name, truth in one_by_one()._asdict().items():
        kept = np.concatenate(
            [np.asarray(getattr(features, name))[mask] for (features, _), mask in zip(batches, masks, strict=True)]
        )
        assert kept.shape == truth.shape
        np.testing.assert_allclose(kept, truth, rtol=0, atol=TOLERANCE * np.abs(truth).max(), err_msg=name)


def test_features_do_not_depend_on_the_size_of_batches():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    extractor = Extractor(params(), batch_size=2, mesh=mesh)
    check(extractor.stream(images()[start:stop] for start, stop in ((0, 1), (1, 3))), [2, 1])


def test_eight_devices_give_the_features_of_one_and_keep_them():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    extractor = Extractor(params(), batch_size=5, mesh=mesh)
    assert extractor.batch_size == 8
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    padded = np.concatenate([images(), np.zeros((5, 16, 12, 3), np.uint8)])
    drawn = jax.device_put(padded, split)  # as a training run leaves its samples
    with jax.transfer_guard_device_to_host("disallow"):
        features, mask = extractor(drawn)
    assert np.asarray(mask).all() and {len(a.sharding.device_set) for a in (*features, mask)} == {8}
    check([(features, np.arange(8) < 3)], [3])


@pytest.mark.wrong_shapes
def test_other_images_are_refused():
    extractor = Extractor(params(), batch_size=1)
    with pytest.raises(ValueError, match="images must be 1 to 8, found 9"):
        extractor(np.zeros((9, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="images must be uint8"):
        extractor(np.zeros((8, 4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="batch_size must be 1 or more, found 0"):
        Extractor(params(), batch_size=0)
