"""Features are prepared in the order of the images and of their latents, survive a stop to the byte, and follow the
image and the view that training is shown."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from gspn_jax import prepare
from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data import DataError, make_loader, make_source
from gspn_jax.data.digits import DigitsSource
from gspn_jax.data.features import Featured, FeatureSet
from gspn_jax.data.folder import FolderSource
from gspn_jax.data.latents import LatentMetadata, LatentSource, write_synthetic
from gspn_jax.data.set_metadata import METADATA
from gspn_jax.prepare import shards
from gspn_jax.tables import FEATURE_NETWORKS
from tests.prepare.toy_network import TOY
from tests.training import aligned

SIDE, GRID, COUNT = 8, 4, 14


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(FEATURE_NETWORKS, "toy", TOY)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    """14 PNG in three classes, larger than what is seen and not square."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(COUNT):
        path = root / f"n{i * 3 // COUNT}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (11 + i, 24, 3), np.uint8)).save(path)
    return root


def flags(output, **options) -> list[str]:
    options = {
        "output": output,
        "network": "toy",
        "weights": 2.0,
        "image_size": SIDE,
        "tokens": GRID,
        "shard_size": 4,
        "batch_size": 8,
        "threads": 2,
    } | options
    words = ["features"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [] if value is None else [flag, str(value)]
    return words


def truth(pixels: np.ndarray) -> np.ndarray:
    x = pixels[None].astype(np.float64).reshape(1, GRID, 2, GRID, 2, 3) / 255
    return 2 * np.concatenate([x.mean((2, 4)), x[:, :, 0, :, 0] - x[:, :, 1, :, 1]], axis=-1)[0]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def said(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        prepare.main(list(arguments))
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_features_are_those_of_both_views_of_every_image_and_go_on_to_the_byte(images, tmp_path, capsys, monkeypatch):
    prepare.main(flags(tmp_path / "out", images=images))
    assert "features of 14 images in" in capsys.readouterr().out
    found, originals = FeatureSet(str(tmp_path / "out")), FolderSource(str(images), SIDE, 3)
    assert len(found) == COUNT and found.metadata.images == originals.fingerprint
    assert found.metadata.network_sha256 == TOY.digest(TOY.read("2.0")) and found.metadata.shape == (GRID, GRID, 6)
    for i in range(COUNT):
        pixels = originals[i]["image"]
        for view, wanted in enumerate((pixels, pixels[:, ::-1])):
            np.testing.assert_allclose(found.view(i, bool(view)), truth(wanted), rtol=2**-10, atol=1e-6)
    assert sorted(contents(tmp_path / "out")) == [
        *(f"features-{i:05}-of-00004.array_record" for i in range(4)),
        METADATA,
    ]
    prepare.main(flags(tmp_path / "out", images=images))
    assert "is complete: features of 14 images" in capsys.readouterr().out

    class Stopped(Exception):
        pass

    def stop(path, *_, sha256_of=shards.sha256_of):
        if path.name.startswith("features-00002"):
            raise Stopped
        return sha256_of(path)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(shards, "sha256_of", stop)
        prepare.main(flags(tmp_path / "cut", images=images))
    assert METADATA not in contents(tmp_path / "cut")
    prepare.main(flags(tmp_path / "cut", images=images))
    assert contents(tmp_path / "cut") == contents(tmp_path / "out")
    for host in (1, 0):
        prepare.main(flags(tmp_path / "shared", images=images, host=host, num_hosts=2))
    assert contents(tmp_path / "shared") == contents(tmp_path / "out")

    for changes, what in (
        ({"images": images, "weights": 3.0}, "with other settings (network_sha256)"),
        ({"images": images, "tokens": 2}, "with other settings (tokens)"),
        ({"digits": True}, "with other settings (images)"),
        ({"images": images, "network": "inception"}, "--weights must be"),
        ({"images": images, "network": "nothing"}, "--network must be one of 'inception', 'dinov2', 'clip', 'toy'"),
        ({}, "one of --images, --tars, --tfds, --records and --digits must be given"),
    ):
        assert what in said(capsys, *flags(tmp_path / "out", **changes))


class Numbered:
    """Features of image i that are 2i, and of its mirror image 2i + 1."""

    bytes = 2

    def view(self, index: int, mirrored: bool) -> np.ndarray:
        return np.full((1, 1, 1), 2 * index + mirrored, np.float32)  # float16 counts to 2,048


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "read"])
@pytest.mark.parametrize("flip", [True, False])
def test_a_row_has_the_features_of_the_image_and_the_view_that_it_shows(in_memory, flip):
    config = DataConfig(flip=flip, in_memory=in_memory)
    source, originals = make_source(config), DigitsSource(8, 1)
    with (
        make_loader(config, source, batch_size=32, seed=3, start_step=2, features=Numbered()) as loader,
        make_loader(config, source, batch_size=32, seed=3, start_step=2) as plain,
    ):
        views = set()
        for batch, other in itertools.islice(zip(loader, plain, strict=True), 3):
            np.testing.assert_array_equal(batch["image"], other["image"])
            for image, feature in zip(batch["image"], batch["features"].ravel(), strict=True):
                index, mirrored = divmod(int(feature), 2)
                views.add(mirrored)
                np.testing.assert_array_equal(image, originals[index]["image"][:, :: -1 if mirrored else 1])
    assert views == ({0, 1} if flip else {0})


def test_a_latent_has_the_features_of_its_image_and_its_view(tmp_path):
    """Moments without variance, whose mean says the record and the view."""
    write_synthetic(tmp_path, records=20, shards=2, latent_shape=(4, 4, 1), num_classes=3)
    config = DataConfig(source="latents", path=str(tmp_path), image_size=4, channels=1, num_classes=3, flip=True)

    class Known(LatentSource):
        def __getitem__(self, index):
            moments = np.full((2, 4, 4, 2), -30, np.float16)
            moments[..., 0] = np.array([2 * index, 2 * index + 1])[:, None, None]
            return {"moments": moments, "label": np.int32(0)}

    source = Known(config)
    with make_loader(config, source, batch_size=16, seed=1, features=Numbered()) as loader:
        for batch in itertools.islice(loader, 3):
            found = np.rint(batch["image"][:, 0, 0, 0] / source.metadata.scaling_factor)
            np.testing.assert_array_equal(found, batch["features"].ravel())
            assert len(set(found % 2)) == 2


def test_features_of_the_images_of_latents_are_told_from_others(tmp_path):
    latents = tmp_path / "latents"
    write_synthetic(latents, records=20, latent_shape=(8, 8, 1), num_classes=3)
    config = DataConfig(source="latents", path=str(latents), image_size=8, channels=1, num_classes=3)
    features = aligned.write(tmp_path / "features", np.ones((20, 2, 4, 4, 3)), images="abcd", image_size=64)

    def check():
        features.check(make_source(config), config, 4)

    with pytest.raises(ConfigError, match="do not note theirs, as sets of an earlier version"):
        check()
    metadata = LatentMetadata.read(latents)
    dataclasses.replace(metadata, images="abcd").write(latents)
    check()
    one = Featured(make_source(config), features)
    assert one.fingerprint != make_source(config).fingerprint and one.metadata.images == "abcd"
    dataclasses.replace(metadata, images="dcba").write(latents)
    with pytest.raises(ConfigError, match=r"\(20, fingerprint dcba\), found features of 20 with fingerprint abcd"):
        check()
    dataclasses.replace(metadata, images="abcd", image_size=128).write(latents)
    with pytest.raises(ConfigError, match="of images of 128 pixels, as those that are trained on, found 64"):
        check()


def test_a_damaged_set_gets_one_sentence(tmp_path):
    folder = tmp_path / "set"
    aligned.write(folder, np.ones((6, 1, 2, 2, 3)))
    with pytest.raises(DataError, match="must be finite in float16"):
        aligned.write(tmp_path / "nan", np.full((4, 1, 2, 2, 3), np.nan))
    text = (folder / METADATA).read_text()
    about = json.loads(text)
    for changes, what in (
        ({"format": "gspn-jax latents"}, "must be of the format 'gspn-jax features', version 1"),
        ({"count": 7}, "must count the same images in all and in its shards, found 7 and 6"),
        ({"shape": "2x2"}, "must be the metadata of a set of features, but"),
        ({"shards": [about["shards"][0] | {"name": "../a"}]}, "which is no path within the folder"),
    ):
        (folder / METADATA).write_text(json.dumps(about | changes))
        with pytest.raises(ConfigError, match=what):
            FeatureSet(str(folder))
    (folder / METADATA).write_text(text)
    shard = folder / about["shards"][1]["name"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="must be a shard of"):
        FeatureSet(str(folder))
