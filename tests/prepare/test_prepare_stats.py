"""Reference statistics are prepared from what people have, survive a kill to the byte, and mistakes get a sentence."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gspn_jax import prepare, tables
from gspn_jax.metrics import extractor, inception, reference
from gspn_jax.metrics.reference import read_reference
from gspn_jax.prepare import stats

METRICS = tuple(name for name, metric in tables.METRICS.items() if metric.network == "inception")

SIDE, COUNT = 12, 11


class SmallExtractor:
    """In place of Inception: few features of an image, its random projections, and NaN where a batch is padded."""

    def __init__(self, params, *, batch_size, network=inception):
        self.batch_size = batch_size

    def __call__(self, images):
        padded = np.full((self.batch_size, 3 * SIDE * SIDE), np.nan, np.float32)
        padded[: len(images)] = images.reshape(len(images), -1) / 255
        projection = np.random.default_rng(1).standard_normal((3 * SIDE * SIDE, POOL + SPATIAL + 4))
        found = jnp.asarray(padded @ projection.astype(np.float32))
        return (
            inception.Features(*jnp.split(found, [POOL, POOL + SPATIAL], axis=1)),
            np.arange(self.batch_size) < len(images),
        )


POOL, SPATIAL = 16, 9


def use_small_extractor(patch):
    patch.setattr(extractor, "Extractor", SmallExtractor)
    patch.setattr(inception, "read", lambda path: {})
    patch.setattr(inception, "from_state_dict", lambda state_dict: {})
    patch.setattr(reference, "_SIZES", {"pool": POOL, "spatial": SPATIAL})


@pytest.fixture(autouse=True)
def small_extractor(request, monkeypatch):
    if "slow" not in request.keywords:
        use_small_extractor(monkeypatch)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    path.write_bytes(b"")
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    """11 PNGs in two class folders, of the size of the samples."""
    root = tmp_path_factory.mktemp("images")
    for i, image in enumerate(pixels()):
        path = root / ("a" if i < 6 else "b") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return root


def pixels():
    return np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)


def flags(weights, output, **options) -> list[str]:
    options = {
        "inception": weights,
        "output": output,
        "image_size": SIDE,
        "batch_size": 8,
        "save_every": 5,
        "keep": 4,
        "threads": 2,
    } | options
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [] if value is None else [flag, str(value)]
    return ["stats", *words]


def said(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        prepare.main(list(arguments))
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.fixture(scope="module")
def made(weights, images, tmp_path_factory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("made") / "ref.npz"
    with pytest.MonkeyPatch.context() as patch:
        use_small_extractor(patch)
        prepare.main(flags(weights, output, images=images, keep_images=True))
    return output


def assert_are_statistics_of(path, truth):
    found = read_reference(path)
    assert {*found.allowed} == {*METRICS, "fd_dinov2"} and found.num_images == COUNT
    for gaussian, features in ((found.pool, truth.pool), (found.spatial, truth.spatial)):
        features = np.asarray(features, np.float64)
        # batches and one call round float32 differently: 1e-5 of the largest value
        assert np.abs(gaussian.mean - features.mean(0)).max() < 1e-5 * np.abs(features).max()
        cov = np.cov(features, rowvar=False)
        assert np.abs(gaussian.cov - cov).max() < 1e-5 * np.abs(cov).max()
    chosen = [0, 3, 6, 10]
    truth = np.asarray(truth.pool)[chosen]
    np.testing.assert_allclose(found.features, truth, atol=1e-5 * np.abs(truth).max())
    np.testing.assert_array_equal(np.concatenate(list(found.images.batches(8))), pixels()[chosen])


def test_statistics_are_those_of_all_images(made):
    features, _ = SmallExtractor({}, batch_size=COUNT)(pixels())
    assert_are_statistics_of(made, features)
    read_reference(made).check_weights("inception", inception.digest({}))


@pytest.mark.slow
def test_statistics_are_those_of_inception(images, tmp_path):
    state_dict = inception.random_state_dict(0)
    save_file(state_dict, tmp_path / "inception.safetensors")
    prepare.main(flags(tmp_path / "inception.safetensors", tmp_path / "ref.npz", images=images, keep_images=True))
    assert_are_statistics_of(
        tmp_path / "ref.npz", jax.jit(inception.apply)(inception.from_state_dict(state_dict), pixels())
    )
    read_reference(tmp_path / "ref.npz").check_weights("inception", inception.digest(state_dict))


def test_a_killed_preparation_goes_on_and_ends_in_the_same_bytes(made, weights, images, tmp_path, monkeypatch):
    """Killed after the first save, within the second part, and while it is taken in."""

    class Killed(BaseException):
        pass

    output, save, add, unlink, counted = (
        tmp_path / "ref.npz",
        stats._Progress.save,
        stats._Sums.add,
        pathlib.Path.unlink,
        [],
    )

    def kill_after_save(self, number, computed):
        save(self, number, computed)
        raise Killed

    def kill_within_part(self, *batch):
        add(self, *batch)
        raise Killed

    def kill_before_removal(self, **options):
        if self.name == "part-00001.npz":
            raise Killed
        unlink(self, **options)

    def count(self, features, mask, chosen):
        counted.append(len(chosen))
        add(self, features, mask, chosen)

    for owner, name, replacement in (
        (stats._Progress, "save", kill_after_save),
        (stats._Sums, "add", kill_within_part),
        (pathlib.Path, "unlink", kill_before_removal),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, replacement)
            prepare.main(flags(weights, output, images=images, keep_images=True))
        assert not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr(stats._Sums, "add", count)
        prepare.main(flags(weights, output, images=images, keep_images=True))
    assert sum(counted) == COUNT - 10  # the first two parts were not computed again
    assert output.read_bytes().replace(str(output).encode(), b"") == made.read_bytes().replace(str(made).encode(), b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ref.npz"]


def test_images_of_an_npz_give_the_same_statistics(made, weights, tmp_path):
    np.savez_compressed(tmp_path / "images.npz", arr_0=pixels())
    prepare.main(flags(weights, tmp_path / "ref.npz", npz=tmp_path / "images.npz", image_size=None, keep_images=True))
    ours, theirs = read_reference(tmp_path / "ref.npz"), read_reference(made)
    np.testing.assert_array_equal(ours.pool.cov, theirs.pool.cov)
    np.testing.assert_array_equal(ours.features, theirs.features)
    np.testing.assert_array_equal(np.concatenate(list(ours.images.batches(3))), pixels()[[0, 3, 6, 10]])


def test_a_bad_image_is_named_or_left_out_and_counted(weights, images, tmp_path, capsys):
    broken = tmp_path / "images"
    for path in images.rglob("*.png"):
        target = broken / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes()[: 40 if path.name == "03.png" else None])
    assert "03.png is not a usable image" in said(capsys, *flags(weights, tmp_path / "ref.npz", images=broken))
    prepare.main(flags(weights, tmp_path / "skipped.npz", images=broken, bad_images="skip"))
    assert "statistics of 10 images of 12x12" in (out := capsys.readouterr().out) and "left out: 1" in out
    found = read_reference(tmp_path / "skipped.npz")
    assert found.num_images == 10 and len(found.features) == 3 and found.images is None


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"images": None}, "one of --images, --tars, --tfds and --npz must be given"),
        (
            {"image_size": None},
            "--image-size must be given, as the size of the samples, unless the images are those of "
            "--npz, found --image-size None",
        ),
        ({"images": None, "npz": "x.npz"}, "unless the images are those of --npz, found --image-size 12"),
        ({"images": None, "npz": "/absent.npz", "image_size": None}, "--npz must be an .npz file, found nothing at"),
        ({"output": "ref.pkl"}, "--output must end in .npz, found 'ref.pkl'"),
        ({"output": "/absent/ref.npz"}, "--output must lie in a folder that exists"),
        ({"save_every": 0}, "--save-every must be 1 or more, found 0"),
        ({"keep": -1}, "--keep must be 0 or more, found -1"),
        ({"inception": None}, "--inception must be the Inception-v3 weights of 2015-12-05"),
        ({"images": "/absent"}, "the folder '/absent' cannot be read: No such file"),
    ],
)
def test_a_mistake_gets_one_sentence_and_code_2(weights, images, tmp_path, capsys, options, wanted):
    text = said(capsys, *flags(**{"weights": weights, "output": tmp_path / "ref.npz", "images": images} | options))
    assert wanted in text and "Traceback" not in text
    assert not (tmp_path / "ref.npz.gspn-partial").exists()


def test_other_settings_and_a_finished_file_are_left_alone(made, weights, images, tmp_path, capsys, monkeypatch):
    assert "exists already: choose another --output" in said(capsys, *flags(weights, made, images=images))
    with monkeypatch.context() as patch:
        patch.setattr(stats._Sums, "add", lambda self, *batch: np.zeros(1)[1])  # fails in the first batch
        with pytest.raises(IndexError):
            prepare.main(flags(weights, tmp_path / "ref.npz", images=images))
    prepare_settings = flags(weights, tmp_path / "ref.npz", images=images, keep=3)
    monkeypatch.setattr(stats._Sums, "add", lambda self, *batch: None)
    with pytest.raises(SystemExit):
        prepare.main(prepare_settings)  # saves, finds no images in the end
    assert "was begun with other settings (keep)" in said(capsys, *flags(weights, tmp_path / "ref.npz", images=images))
