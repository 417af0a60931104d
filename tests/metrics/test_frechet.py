"""The Frechet distance against SciPy's matrix root and closed forms."""

import numpy as np
import pytest
import scipy.linalg

from gspn_jax.metrics.frechet import Gaussian, frechet_distance, moments


def random_gaussian(rng, dim):
    a = rng.normal(size=(dim, dim))
    return rng.normal(size=dim), a @ a.T / dim


@pytest.mark.parametrize("dim", [1, 5, 64])
def test_agrees_with_the_matrix_root(dim):
    rng = np.random.default_rng(dim)
    (m1, c1), (m2, c2) = random_gaussian(rng, dim), random_gaussian(rng, dim)
    root = scipy.linalg.sqrtm(c1 @ c2)
    wanted = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root.real)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(wanted, rel=1e-9)


def test_closed_forms():
    mean, cov = random_gaussian(np.random.default_rng(0), 16)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(mean, cov, mean + 2, cov) == pytest.approx(64, rel=1e-9)
    # tr(C + 9C - 2*3C) = 4 tr C
    assert frechet_distance(mean, cov, mean, 9 * cov) == pytest.approx(4 * np.trace(cov), rel=1e-9)


def test_singular_covariances_are_fine():
    features = np.random.default_rng(0).normal(size=(10, 64))  # rank 9 in 64 dimensions
    mean, cov = moments(features)
    assert frechet_distance(mean, cov, mean + 1, cov) == pytest.approx(64, rel=1e-6)


@pytest.mark.parametrize("counts", [(40, 60), (60, 40), (40, 500), (500, 40)])
def test_fewer_images_than_features(counts):
    """Where a covariance is singular, its eigenvalues of zero must not come back as roots of rounding errors."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(count, 300)) * np.geomspace(1, 1e-3, 300) for count in counts)
    # tr (C1 C2)^(1/2) is the sum of the singular values of X1 X2^T, without a root of anything small
    centred = [(a - a.mean(0)) / np.sqrt(len(a) - 1) for a in (x, y)]
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + sum((a**2).sum() for a in centred) - 2 * cross
    one, other = (Gaussian(*moments(a), len(a)) for a in (x, y))
    assert one.distance(other) == pytest.approx(wanted, rel=1e-9)


def test_moments_are_those_of_numpy():
    features = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    mean, cov = moments(features)
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
    centred = features.astype(np.float64) - mean
    np.testing.assert_allclose(cov, centred.T @ centred / 49, rtol=1e-12)


@pytest.mark.wrong_shapes
def test_wrong_input_gets_a_sentence():
    with pytest.raises(ValueError, match=r"N at least 2, found shape \(1, 4\)"):
        moments(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="found 2 and 3"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
