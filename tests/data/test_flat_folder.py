"""A folder of another program's images: read as they are, in order, and refused when they differ in size."""

import numpy as np
import pytest
from PIL import Image

from gspn_jax.config import ConfigError
from gspn_jax.data.decoding import DataError
from gspn_jax.data.flat_folder import FlatFolder


def save(path, height=5, width=4, seed=0, mode="RGB") -> np.ndarray:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    image = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return image


def test_images_anywhere_below_are_read_as_they_are(tmp_path):
    first, second = save(tmp_path / "a" / "b" / "0.png"), save(tmp_path / "c.png", seed=1)
    save(tmp_path / ".hidden.png", 9)
    grey = save(tmp_path / "d.png", mode="L")
    (tmp_path / "labels.txt").write_text("not an image")
    folder = FlatFolder(tmp_path)
    assert len(folder) == 3 and folder.shape == (5, 4, 3)
    for index, wanted in enumerate((first, second, np.repeat(grey[..., None], 3, axis=2))):
        np.testing.assert_array_equal(folder[index]["image"], wanted)


def test_images_of_several_sizes_are_named_or_fitted(tmp_path):
    save(tmp_path / "0.png")
    save(tmp_path / "1.png", 6, 4)
    with pytest.raises(ConfigError, match=r"1\.png must be of 5x4 as .*0\.png is, found 6x4: --image-size fits all"):
        FlatFolder(tmp_path)[1]
    fitted = FlatFolder(tmp_path, 3)
    assert [fitted[i]["image"].shape for i in range(2)] == [(3, 3, 3)] * 2


def test_the_fingerprint_is_of_names_and_sizes_wherever_the_folder_lies(tmp_path):
    for name in ("here", "there"):
        save(tmp_path / name / "a" / "0.png")
    here, there = (FlatFolder(tmp_path / name).fingerprint for name in ("here", "there"))
    assert here == there
    (tmp_path / "there" / "a" / "0.png").rename(tmp_path / "there" / "a" / "1.png")
    assert FlatFolder(tmp_path / "there").fingerprint != here


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a folder of images must hold JPEG, PNG, .* files, found none below"):
        FlatFolder(tmp_path)


def test_a_bad_first_file_does_not_hide_the_others(tmp_path):
    (tmp_path / "!.png").write_bytes(b"")
    image = save(tmp_path / "0.png")
    assert len(FlatFolder(tmp_path, 3)) == 2  # nothing is decoded to know the size
    with pytest.raises(DataError, match="the file is empty"):
        FlatFolder(tmp_path)
    folder = FlatFolder(tmp_path, skip_bad=True)
    assert folder.shape == (5, 4, 3)
    np.testing.assert_array_equal(folder[1]["image"], image)
