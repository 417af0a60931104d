"""Reference statistics: every dialect is read, what each allows is said, and nothing is unpickled."""

import types

import numpy as np
import pytest

from gspn_jax import tables
from gspn_jax.config import ConfigError
from gspn_jax.metrics import npz
from gspn_jax.metrics.npz import StoredImages
from gspn_jax.metrics.reference import read_reference

POOL, SPATIAL = 2048, 2023
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), np.uint8)

METRICS = tuple(name for name, metric in tables.METRICS.items() if not metric.captions)


def gaussian(size, names, value=1.0):
    """A covariance that is quick to write: a multiple of the identity."""
    return dict(zip(names, (np.full(size, value, np.float32), value * np.eye(size)), strict=True))


def features_of(images):
    """A stand-in for Inception: numbers that tell the images apart, padded as an extractor does."""
    values = images.astype(np.float32).mean((1, 2, 3))[:, None] / 255
    padded = np.pad(values, ((0, 8 - len(images)), (0, 0)), constant_values=np.nan)
    return (
        types.SimpleNamespace(
            pool=padded * np.linspace(1, 2, POOL, dtype=np.float32),
            spatial=padded * np.linspace(2, 3, SPATIAL, dtype=np.float32),
        ),
        np.arange(8) < len(images),
    )


@pytest.mark.parametrize(
    ("arrays", "allowed"),
    [
        (gaussian(POOL, ("mu", "sigma")) | gaussian(SPATIAL, ("mu_s", "sigma_s"), 2.0) | {"arr_0": IMAGES}, METRICS),
        (gaussian(POOL, ("ref_mu", "ref_sigma")), ("fid", "is")),
        (gaussian(POOL, ("mu", "sigma")), ("fid", "is")),
        (gaussian(POOL, ("mu", "sigma")) | gaussian(SPATIAL, ("mu_s", "sigma_s")), ("fid", "sfid", "is")),
        (
            gaussian(POOL, ("mu", "sigma")) | {"features": np.ones((5, POOL))},
            ("fid", "is", "kid", "precision", "recall"),
        ),
        ({"arr_0": IMAGES, "arr_1": np.arange(11)}, METRICS),
    ],
    ids=["ADM", "ref_mu", "pytorch-fid", "both moments", "features", "images"],
)
def test_each_dialect_is_read_and_says_what_it_allows(tmp_path, arrays, allowed):
    np.savez(tmp_path / "ref.npz", **arrays)
    found = read_reference(tmp_path / "ref.npz")
    assert found.allowed == allowed
    found.check(allowed)
    if len(allowed) < len(METRICS):
        with pytest.raises(ConfigError, match=r"ref.npz must have .*; found what allows .* only"):
            found.check(METRICS)
    if found.pool:
        assert found.pool.mean.dtype == found.pool.cov.dtype == np.float64
        np.testing.assert_array_equal(found.pool.mean, np.ones(POOL))
    if found.spatial and "arr_0" in arrays:
        assert found.spatial.cov[0, 0] == 2


def test_the_sentence_for_what_is_missing(tmp_path):
    np.savez(tmp_path / "ref.npz", **gaussian(POOL, ("mu", "sigma")))
    with pytest.raises(ConfigError) as error:
        read_reference(tmp_path / "ref.npz").check(("fid", "sfid", "precision", "recall"))
    assert str(error.value) == (
        f"the reference {tmp_path / 'ref.npz'} must have mu_s and sigma_s for sfid, and arr_0 (images) or features for "
        "precision and recall; found what allows fid and is only"
    )


def test_what_a_file_has_as_images_only_is_computed_once_and_the_rest_left_alone(tmp_path):
    np.savez(tmp_path / "ref.npz", arr_0=IMAGES, **gaussian(POOL, ("mu", "sigma")))
    found = read_reference(tmp_path / "ref.npz").complete(("fid", "sfid", "kid"), {"inception": features_of}, 8)
    np.testing.assert_array_equal(found.pool.mean, np.ones(POOL))  # of the full set, as the file has it
    truth = [features_of(IMAGES[i : i + 1])[0] for i in range(len(IMAGES))]
    np.testing.assert_allclose(found.features, [f.pool[0] for f in truth], rtol=1e-6)
    np.testing.assert_allclose(found.spatial.mean, np.mean([f.spatial[0] for f in truth], axis=0), rtol=1e-6)
    cov = np.cov(np.array([f.spatial[0] for f in truth], np.float64), rowvar=False)
    assert np.abs(found.spatial.cov - cov).max() < 1e-5 * np.abs(cov).max()

    def never(images):
        raise AssertionError

    assert found.complete(("fid", "sfid", "kid"), {"inception": never}, 8) is found


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("start", [0, 5])
def test_images_are_streamed_from_a_file(tmp_path, compressed, start):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "s.npz", arr_0=IMAGES)
    stored = StoredImages(tmp_path / "s.npz", "the samples")
    assert len(stored) == 11 and stored.shape == IMAGES.shape
    batches = list(stored.batches(4, start))
    assert [len(batch) for batch in batches] == ([4, 4, 3] if start == 0 else [4, 2])
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES[start:])


class Trap:
    """What must never happen on reading: code that runs when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the file was unpickled",))


def broken(path, kind):
    if kind == "nothing":
        return
    if kind == "text":
        path.write_text("mu, sigma")
    elif kind == "cut":
        np.savez_compressed(path, arr_0=np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8))
        whole = path.read_bytes()
        path.write_bytes(whole[:5000] + bytes(1000) + whole[6000:])
    else:
        np.savez(
            path,
            **{
                "pickle": {"mu": np.array([Trap()], object), "sigma": np.eye(2)},
                "pickled images": {"arr_0": np.array([Trap()], object)},
                "names": {"mean": np.zeros(3)},
                "sizes": gaussian(64, ("mu", "sigma")),
                "nan": gaussian(POOL, ("mu", "sigma"), np.nan),
                "float images": {"arr_0": IMAGES / 255},
                "features": {"features": np.zeros((3, 64))},
            }[kind],
        )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nothing", "eval.reference must be an .npz file, found nothing at"),
        ("text", "eval.reference must be an .npz file, found .*, which is none"),
        ("pickle", "'mu' in .* cannot be read: it holds Python objects, whose code is not run"),
        ("pickled images", "'arr_0' in .* cannot be read: it holds Python objects"),
        ("names", "must have mu and sigma, ref_mu and ref_sigma, or images as arr_0, found mean in"),
        ("sizes", r"'mu' and 'sigma' in .* must be of 2048 features, found \[64\] and \[64, 64\]"),
        ("nan", "must be finite, found NaN or infinity"),
        ("float images", r"must have images as uint8 \[N, H, W, 3\], found float64 \[11, 6, 5, 3\]"),
        ("features", r"'features' in .* must be numbers \[N, 2048\], found float64 \[3, 64\]"),
    ],
)
def test_a_file_that_cannot_be_used_gets_a_sentence(tmp_path, kind, said):
    broken(tmp_path / "ref.npz", kind)
    with pytest.raises(ConfigError, match=said):
        read_reference(tmp_path / "ref.npz", "eval.reference")


def test_damaged_images_get_a_sentence(tmp_path):
    broken(tmp_path / "ref.npz", "cut")
    with pytest.raises(ConfigError, match=r"'arr_0' in .* cannot be read: "):
        list(StoredImages(tmp_path / "ref.npz", "the samples").batches(16))
    with pytest.raises(ConfigError, match=r"'arr_0' in .* cannot be read: "):
        npz.read(tmp_path / "ref.npz", "arr_0")


def test_other_weights_than_the_references_are_refused(tmp_path):
    np.savez(tmp_path / "ref.npz", **gaussian(POOL, ("mu", "sigma")), inception_sha256="abc", num_images=50_000)
    found = read_reference(tmp_path / "ref.npz")
    assert found.num_images == 50_000
    found.check_weights("inception", "abc")
    with pytest.raises(
        ConfigError,
        match=r"must be of the Inception weights in use \(def\.\.\.\), found statistics of "
        r"abc\.\.\.",
    ):
        found.check_weights("inception", "def")


def test_statistics_know_the_size_of_their_images(tmp_path):
    np.savez(tmp_path / "given.npz", **gaussian(POOL, ("mu", "sigma")), image_size=np.array([256, 192]))
    found = read_reference(tmp_path / "given.npz")
    assert found.image_size == (256, 192)
    found.write(tmp_path / "again.npz", source="x")
    assert read_reference(tmp_path / "again.npz").image_size == (256, 192)
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    assert read_reference(tmp_path / "images.npz").image_size == IMAGES.shape[1:3]
    np.savez(tmp_path / "other.npz", **gaussian(POOL, ("mu", "sigma")))
    assert read_reference(tmp_path / "other.npz").image_size is None
    np.savez(tmp_path / "odd.npz", **gaussian(POOL, ("mu", "sigma")), image_size=np.array([256.5]))
    with pytest.raises(ConfigError, match=r"'image_size' in .* must be integers \[2\], found float64 \[1\]"):
        read_reference(tmp_path / "odd.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_images_in_fortran_order_are_the_same_images(tmp_path, compressed):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "s.npz", arr_0=np.asfortranarray(IMAGES))
    found = list(StoredImages(tmp_path / "s.npz", "the samples").batches(4, 3))
    assert [len(batch) for batch in found] == [4, 4] and all(batch.flags.c_contiguous for batch in found)
    np.testing.assert_array_equal(np.concatenate(found), IMAGES[3:])
