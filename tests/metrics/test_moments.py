"""Moments that stream through float32 sums on any number of devices are NumPy's in float64, and go on after a kill."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gspn_jax.metrics import moments
from gspn_jax.metrics.moments import Moments

# float32 sums of at most thousands of rows: 1e-6 of the largest covariance; without the shift it would be 1e-2
TOLERANCE = 1e-6


def activations(count=1500, size=24):
    """Correlated, and with means far from zero, as features after a ReLU have them."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((count, size)) @ rng.standard_normal((size, size)) / size + 20).astype(np.float32)


def assert_are_moments_of(gaussian, x):
    np.testing.assert_allclose(gaussian.mean, x.astype(np.float64).mean(0), rtol=1e-8)
    truth = np.cov(x.astype(np.float64), rowvar=False)
    assert np.abs(gaussian.cov - truth).max() < TOLERANCE * np.abs(truth).max()
    assert gaussian.cov.dtype == np.float64


@pytest.mark.parametrize("drain", [64, 10_000])
def test_batches_of_any_size_give_numpys_mean_and_covariance(monkeypatch, drain):
    monkeypatch.setattr(moments, "DRAIN_ROWS", drain)
    x, streamed = activations(), Moments()
    for part in np.split(x, [100, 101, 250, 1024]):
        streamed.add(part)
    assert streamed.count == len(x)
    assert_are_moments_of(streamed.gaussian(), x)


def test_parts_summed_apart_are_added_up_as_one():
    x, total = activations(), Moments()
    for part in np.split(x, [0, 100, 101, 700]):  # the first is empty; each is shifted by a mean of its own
        summed = Moments()
        if len(part):
            summed.add(part)
        total.merge(summed.state())
    assert total.count == len(x)
    assert_are_moments_of(total.gaussian(), x)


def test_rows_that_are_masked_count_for_nothing_on_any_mesh():
    x = activations(100)
    padded = np.concatenate(
        [x[:60], np.full((4, x.shape[1]), np.nan, np.float32), x[60:], np.full((24, x.shape[1]), 1e30, np.float32)]
    )
    mask = np.concatenate([np.arange(64) < 60, np.arange(64) < 40])
    for devices in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        split = NamedSharding(mesh, PartitionSpec("data"))
        streamed = Moments()
        for rows in (slice(0, 64), slice(64, 128)):
            streamed.add(jax.device_put(padded[rows], split), jax.device_put(mask[rows], split))
        assert streamed.count == 100
        assert_are_moments_of(streamed.gaussian(), x)


def test_a_state_goes_on_to_the_same_bits():
    x, whole, first, second = activations(300), Moments(), Moments(), Moments()
    assert first.state() == {}
    for part in np.split(x, 3):
        whole.add(part)
        whole.state()  # drains, as saving does
    first.add(x[:100])
    second.restore(first.state())
    for part in np.split(x, 3)[1:]:
        second.add(part)
        second.state()
    np.testing.assert_array_equal(second.gaussian().cov, whole.gaussian().cov)
    np.testing.assert_array_equal(second.gaussian().mean, whole.gaussian().mean)


def test_fewer_than_two_rows_get_a_sentence():
    streamed = Moments()
    with pytest.raises(ValueError, match="at least 2 rows, found 0"):
        streamed.gaussian()
    streamed.add(activations(3), np.array([True, False, False]))
    with pytest.raises(ValueError, match="at least 2 rows, found 1"):
        streamed.gaussian()
