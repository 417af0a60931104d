"""Power-function averages against direct sums over a whole trajectory in float64, and sums of averages of any width."""

import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.runs import power
from gspn_jax.runs.averages import name_of_width
from gspn_jax.training import ema


def weights(width: float, steps: int, total: int) -> np.ndarray:
    """The weight of each of `total` steps in the average after the first `steps`: the integral of its profile over the
    step, with the exponent found by bisection on the variance of a power law, a Beta(g + 1, 1) distribution."""
    low, high = 0.0, 1e4
    for _ in range(200):
        g = (low + high) / 2
        mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
        low, high = (g, high) if square - mean**2 > width**2 else (low, g)
    edges = np.minimum(np.arange(total + 1), steps) / steps
    return np.diff(edges ** (g + 1))


def trajectory(kind: str, total: int) -> np.ndarray:
    """[total, 4] in float64."""
    time = (np.arange(total) + 0.5)[:, None] / total
    smooth = 2.0 + np.sin(3 * time + np.arange(4)) + np.exp(-5 * time * (1 + np.arange(4)))
    rough = np.random.default_rng(0).normal(size=(total, 4)).cumsum(0) / 10
    return {"smooth": smooth, "rough": rough}[kind]


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.25, 0.288])
def test_an_average_that_follows_the_parameters_is_the_direct_sum_over_all_of_them(width):
    path, name = trajectory("rough", 300), name_of_width(width)
    kept = ema.init({"w": jnp.full(4, 7.0)}, [name])  # of which nothing is left after the first step
    for step, value in enumerate(path):
        kept = ema.update(kept, {"w": jnp.asarray(value, jnp.float32)}, jnp.asarray(step))
    np.testing.assert_allclose(kept[name]["w"], weights(width, 300, 300) @ path, rtol=2e-6, atol=2e-6)


def test_the_share_of_a_late_step_keeps_its_digits():
    found = power.share(0.05, jnp.asarray(1_000_000, jnp.int32))
    power_of = power.exponent(0.05) + 1
    np.testing.assert_allclose(found, -np.expm1(power_of * np.log1p(-1e-6)), rtol=1e-6)  # 1 - 0.99998 would be 4e-3 off


def test_products_of_profiles_are_their_integrals():
    steps, widths = np.array([100.0, 100.0, 400.0]), np.array([0.05, 0.2, 0.1])
    found = power.products(*[power.Averages(steps, widths)] * 2)
    parts = 200_000
    profiles = np.stack([weights(w, int(s * parts / 400), parts) for s, w in zip(steps, widths, strict=True)])
    np.testing.assert_allclose(found, profiles @ profiles.T * parts / 400, rtol=1e-6)


def snapshots(every: int, total: int, widths=(0.05, 0.1)) -> power.Averages:
    steps = np.arange(every, total + 1, every, dtype=float)
    return power.Averages(np.repeat(steps, len(widths)), np.tile(widths, len(steps)))


def summed(found: power.Averages, coefficients: np.ndarray, total: int) -> np.ndarray:
    """The weights of all steps in a sum of averages."""
    stored = [weights(w, int(s), total) for s, w in zip(found.steps, found.widths, strict=True)]
    return coefficients @ np.stack(stored)


@pytest.mark.parametrize("width", [0.07, 0.1, 0.12, 0.15])
def test_any_width_is_made_of_snapshots_as_the_direct_average_of_a_smooth_trajectory(width):
    """100 snapshots of two widths: to 1e-6 of the average over all 4,000 steps."""
    found, path = snapshots(40, 4000), trajectory("smooth", 4000)
    made = power.reconstruct(found, 4000, width)
    wanted = weights(width, 4000, 4000) @ path
    np.testing.assert_allclose(summed(found, made.coefficients, 4000) @ path, wanted, rtol=1e-6)
    np.testing.assert_allclose(made.coefficients.sum(), 1.0, rtol=1e-12)
    assert np.abs(made.coefficients).sum() < 3  # rounding of what is stored is not blown up


@pytest.mark.parametrize(("width", "step"), [(0.03, 1000), (0.08, 1000), (0.08, 950), (0.2, 1000)])
def test_the_error_that_is_told_is_that_of_the_profile(width, step):
    """And so bounds that of a rough trajectory; no sum of the same averages comes nearer than by its 1e-2."""
    found = snapshots(100, 1000)
    made = power.reconstruct(found, step, width)
    wanted, profile = weights(width, step, 1000), summed(found, made.coefficients, 1000)
    apart = np.linalg.norm(profile - wanted)
    np.testing.assert_allclose(made.error, apart / np.linalg.norm(wanted), rtol=2e-2)
    stored = np.stack([weights(w, int(s), 1000) for s, w in zip(*found, strict=True)])
    best = np.linalg.norm(np.linalg.lstsq(stored.T, wanted, rcond=None)[0] @ stored - wanted)
    assert apart < 1.1 * best + 1e-4 * np.linalg.norm(wanted)
    path = trajectory("rough", 1000)
    off = np.abs((profile - wanted) @ path)
    assert (off <= apart * np.linalg.norm(path, axis=0)).all()


def test_an_average_that_is_stored_is_taken_as_it_is():
    found = snapshots(100, 1000)
    made = power.reconstruct(found, 700, 0.1)
    np.testing.assert_array_equal(made.coefficients, (found.steps == 700) & (found.widths == 0.1))
    assert made.error == 0.0


def test_of_one_average_the_sum_is_that_one():
    made = power.reconstruct(power.Averages(np.array([500.0]), np.array([0.1])), 1000, 0.05)
    np.testing.assert_allclose(made.coefficients, [1.0], rtol=1e-12)
    assert made.error > 0.5
