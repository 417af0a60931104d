"""Each metric is the published definition's on the same activations (tests/metrics/adm.py)."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gspn_jax import tables
from gspn_jax.config import ConfigError
from gspn_jax.metrics import neighbours, reference
from gspn_jax.metrics.frechet import Gaussian
from gspn_jax.metrics.inception_score import InceptionScore
from gspn_jax.metrics.kid import kernel_distance
from gspn_jax.metrics.neighbours import precision_recall, radii
from gspn_jax.metrics.reference import Reference
from gspn_jax.metrics.scores import Collector
from tests.metrics import adm

METRICS = tuple(name for name, metric in tables.METRICS.items() if metric.network == "inception")

SIZE = 12


def dyadic(rng, count, size=SIZE, scale=8.0, shift=0.0):
    """Activations whose distances are exact in float32: equality is then exact too, ties included."""
    return (np.round((rng.standard_normal((count, size)) + shift) * scale) / scale).astype(np.float32)


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return types.SimpleNamespace(
        real=dyadic(rng, 130),
        samples=dyadic(rng, 170, shift=0.3),
        spatial=rng.standard_normal((170, 7)).astype(np.float32),
        logits=(4 * rng.standard_normal((170, 10))).astype(np.float32),
    )


def test_fid_from_streams_is_that_of_the_matrix_root(features):
    collector = Collector(["fid"])
    for part in np.split(features.samples, [50, 51]):
        collector.add(types.SimpleNamespace(pool=part), np.ones(len(part), bool))
    real = features.real.astype(np.float64)
    target = Reference("ref", "", pool=Gaussian(real.mean(0), np.cov(real, rowvar=False)))
    assert collector.scores(target)["fid"] == pytest.approx(adm.fid(features.real, features.samples), rel=1e-6)


@pytest.mark.parametrize("split", [50, 64, 170, 5000])
def test_inception_score_has_adms_consecutive_splits(features, split):
    score = InceptionScore(split)
    for part in np.split(features.logits, [3, 120, 121]):
        score.add(part)
    assert score.score() == pytest.approx(adm.inception_score(features.logits, split), rel=1e-10)


def test_inception_score_of_certain_predictions_is_finite():
    score = InceptionScore()
    score.add(np.where(np.eye(4), 0, -1e4).astype(np.float32))
    assert score.score() == pytest.approx(4)


@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize(("block", "tile"), [(10_000, 1000), (50, 7)])
def test_precision_and_recall_are_exactly_adms(features, monkeypatch, float16, block, tile):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    monkeypatch.setattr(neighbours, "TILE", tile)
    found = precision_recall(features.real, features.samples, float16=float16)
    assert found == adm.precision_recall(features.real, features.samples, float16=float16)
    assert 0 < found[0] < 1 and 0 < found[1] < 1


def test_float16_decides_ties_as_adm_does_and_gives_way_to_an_overflow():
    rng = np.random.default_rng(1)
    x, y = dyadic(rng, 200, 64, scale=64.0, shift=3), dyadic(rng, 200, 64, scale=64.0, shift=3.05)
    assert precision_recall(x, y, float16=True) == adm.precision_recall(x, y, float16=True)
    assert precision_recall(x, y, float16=True) != precision_recall(x, y)
    small = 2.0**-8 * dyadic(rng, 100, 64)  # squares below the normal numbers of float16
    assert precision_recall(small, small[:50], float16=True) == adm.precision_recall(small, small[:50], float16=True)
    x[7] *= 100  # |x|^2 beyond 65,504, in one block of four
    assert precision_recall(x, y, float16=True) == adm.precision_recall(x, y, float16=True)


def test_an_overflow_takes_only_its_own_block_out_of_float16(monkeypatch):
    rng = np.random.default_rng(2)
    x, y = dyadic(rng, 120, 64, scale=64.0, shift=3), dyadic(rng, 150, 64, scale=64.0, shift=3.05)
    x[7] *= 100
    monkeypatch.setattr(neighbours, "BLOCK", 40)
    found = precision_recall(x, y, float16=True)
    assert found == adm.precision_recall(x, y, float16=True, block=40)
    assert found != adm.precision_recall(x, y, float16=True)


def test_a_point_on_the_border_is_inside():
    line = np.arange(8, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(radii(line), [9, 4, 4, 4, 4, 4, 4, 9])
    inside, outside = np.full((4, 1), -3, np.float32), np.full((4, 1), -3.125, np.float32)
    assert precision_recall(line, inside)[0] == 1 and precision_recall(line, outside)[0] == 0


def test_kid_is_torch_fidelitys_estimate(features):
    settings = {"subsets": 5, "seed": 3}
    found = kernel_distance(features.samples, features.real, subset_size=60, **settings)
    assert found == pytest.approx(adm.kid(features.samples, features.real, size=60, **settings), rel=1e-10)
    # no more than there are: a subset is then all of one side
    found = kernel_distance(features.samples, features.real, subset_size=1000, **settings)
    assert found == pytest.approx(adm.kid(features.samples, features.real, size=130, **settings), rel=1e-10)


def test_fd_dinov2_is_frechets_distance_of_class_tokens():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((90, SIZE))
    samples = (1.5 * rng.standard_normal((70, SIZE)) + 1).astype(np.float32)
    collector = Collector(["fd_dinov2"])
    for rows in (slice(0, 50), slice(50, 100)):
        padded = np.pad(samples[rows], ((0, 50 - len(samples[rows])), (0, 0)), constant_values=np.nan)
        collector.add(padded, np.arange(50) < len(samples[rows]), "dinov2")
    target = Reference("ref", "", dinov2=Gaussian(real.mean(0), np.cov(real, rowvar=False)))
    assert collector.scores(target)["fd_dinov2"] == pytest.approx(adm.fid(real, samples), rel=1e-5)
    with pytest.raises(ConfigError, match="the reference ref must have mu_dinov2 and sigma_dinov2 for fd_dinov2"):
        Reference("ref", "", pool=target.dinov2).check(["fd_dinov2"])


@pytest.mark.parametrize("devices", [1, 8])
def test_all_metrics_at_once_skip_padded_rows(features, devices):
    split = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec("data"))
    collector = Collector(METRICS)
    for start in range(0, 170, 64):
        rows = slice(start, min(start + 64, 170))
        padded = [
            np.pad(a[rows], ((0, 64 - len(a[rows])), (0, 0)), constant_values=1e9)
            for a in (features.samples, features.spatial, features.logits)
        ]
        pool, spatial, logits = (jax.device_put(a, split) for a in padded)
        collector.add(
            types.SimpleNamespace(pool=pool, spatial=spatial, logits=logits),
            jax.device_put(np.arange(64) < len(features.samples[rows]), split),
        )
    assert collector.count == 170
    real, other = features.real.astype(np.float64), features.spatial.astype(np.float64) + 0.1
    target = Reference(
        "ref",
        "",
        pool=Gaussian(real.mean(0), np.cov(real, rowvar=False)),
        features=features.real,
        spatial=Gaussian(other.mean(0), np.cov(other, rowvar=False)),
    )
    scores = collector.scores(target)
    assert tuple(scores) == METRICS
    assert scores["fid"] == pytest.approx(adm.fid(features.real, features.samples), rel=1e-6)
    assert scores["sfid"] == pytest.approx(SIZE_SPATIAL * 0.1**2, rel=1e-5)  # a shift alone
    assert scores["is"] == pytest.approx(adm.inception_score(features.logits, 5000), rel=1e-10)
    assert (scores["precision"], scores["recall"]) == adm.precision_recall(features.real, features.samples)
    assert scores["kid"] == pytest.approx(
        adm.kid(features.samples, features.real, subsets=100, size=130, seed=2020), rel=1e-10
    )


SIZE_SPATIAL = 7


def test_only_what_the_names_need_is_kept_and_asked_for(features):
    collector = Collector(("is",))
    collector.add(types.SimpleNamespace(logits=features.logits), np.ones(len(features.logits), bool))
    assert list(collector.scores()) == ["is"]
    with pytest.raises(ConfigError, match="fid, recall must have a reference, found none"):
        Collector(("fid", "is", "recall")).scores()
    target = Reference("stats.npz", "", pool=Gaussian(np.zeros(2), np.eye(2)))
    with pytest.raises(
        ConfigError,
        match=r"stats.npz must have mu_s and sigma_s for sfid, and arr_0 \(images\) or "
        r"features for kid and recall; found what allows fid and is only",
    ):
        Collector(("fid", "sfid", "kid", "recall")).scores(target)


@pytest.mark.parametrize("names", [(), ("fid", "fid"), ("fid", "FID")])
def test_wrong_names_get_a_sentence(names):
    with pytest.raises(
        ConfigError, match="must be some of fid, sfid, is, kid, precision, recall, fd_dinov2, clip, each once, found"
    ):
        Collector(names)


def test_the_references_radii_and_root_are_computed_once(features, monkeypatch):
    real = features.real.astype(np.float64)
    target = Reference("ref", "", pool=Gaussian(real.mean(0), np.cov(real, rowvar=False)), features=features.real)
    counted = []
    monkeypatch.setattr(reference, "radii", lambda *a, **k: counted.append("radii") or radii(*a, **k))
    monkeypatch.setattr(np.linalg, "eigh", lambda a, eigh=np.linalg.eigh: counted.append("root") or eigh(a))
    for _ in range(2):
        collector = Collector(("fid", "precision"))
        collector.add(types.SimpleNamespace(pool=features.samples), np.ones(len(features.samples), bool))
        collector.scores(target)
    assert counted == ["root", "radii"]


@pytest.mark.parametrize("sides", [(4, 3), (3, 4)])
def test_too_few_images_get_a_sentence(sides):
    with pytest.raises(ValueError, match="more than 3 images a side, found 3"):
        precision_recall(*(np.zeros((count, 2), np.float32) for count in sides))
    with pytest.raises(ValueError, match="at least 2 images a side, found 1 and 5"):
        kernel_distance(np.zeros((1, 2), np.float32), np.zeros((5, 2), np.float32))
