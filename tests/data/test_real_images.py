"""Real photographs, where they are at hand: CIFAR-10 as JPEG files and a sample of ImageNet."""

import itertools
import pathlib
import tarfile

import numpy as np
from PIL import Image

from gspn_jax.config import DataConfig
from gspn_jax.data import make_loader, make_source
from tests.real_images import archive


def unpack(name: str, target: pathlib.Path, wanted) -> None:
    """Unpacks the images among the archive's first members for which wanted(member name) holds."""
    with tarfile.open(archive(name)) as tar:
        for member in itertools.islice(tar, 2000):
            if member.isfile() and wanted(member.name):
                tar.extract(member, target, filter="data")


def test_imagenet_photographs_of_any_size_become_256_pixel_squares(tmp_path):
    kept = itertools.count()
    unpack("imagenet_250.tar", tmp_path, lambda name: next(kept) < 24)
    (root,) = {path.parent.parent for path in tmp_path.rglob("*.JPEG")}
    classes = len(list(root.iterdir()))
    data = DataConfig(source="folder", path=str(root), image_size=256, channels=3, num_classes=classes, flip=True)
    source = make_source(data)
    assert len(source) == 24
    with make_loader(data, source, batch_size=24, seed=0) as loader:
        batch = next(loader)
    assert batch["image"].shape == (24, 256, 256, 3)
    assert sorted(batch["label"]) == sorted(int(source[i]["label"]) for i in range(24))
    # photographs, not noise or blanks: neighbours agree, and the picture varies
    pixels = batch["image"].astype(np.float32)
    assert (pixels.std((1, 2, 3)) > 10).all()
    assert (np.abs(np.diff(pixels, axis=2)).mean((1, 2, 3)) < pixels.std((1, 2, 3))).all()


def test_cifar_pictures_are_read_pixel_by_pixel(tmp_path):
    unpack("cifar10_images.tar.gz", tmp_path, lambda name: "bird/00" in name)
    (root,) = {path.parent.parent for path in tmp_path.rglob("*.jpg")}
    data = DataConfig(source="folder", path=str(root), image_size=32, channels=3, num_classes=1)
    source = make_source(data)
    assert source.class_names == ("bird",) and len(source) >= 50
    files = sorted((root / "bird").iterdir())
    for i in (0, 20, 49):
        np.testing.assert_array_equal(source[i]["image"], np.asarray(Image.open(files[i])))
