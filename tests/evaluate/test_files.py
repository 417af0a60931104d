"""Folders of samples: what cannot be read is an error or left out, and the result says so."""

import numpy as np
import pytest
from PIL import Image

from gspn_jax.data import DataError
from gspn_jax.evaluate.files import FileFlags, _folder


def test_bad_samples_are_left_out_and_counted(tmp_path):
    (tmp_path / "!.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    for i in range(5):
        Image.new("RGB", (6, 5), (i,) * 3).save(tmp_path / f"{i}.{'jpg' if i > 3 else 'png'}")
    samples = _folder(FileFlags(samples=str(tmp_path), bad_images="skip"), tmp_path)
    images = np.concatenate(list(samples.chunks))
    assert samples.size == (5, 6) and sorted(images[:, 0, 0, 0]) == list(range(5))
    left_out, lossy, bad = samples.warnings
    assert left_out == "left out of the folder: 1 .txt" and lossy.startswith("1 .jpg of the samples")
    assert bad == "1 of the 6 files could not be read and were left out"
    with pytest.raises(DataError, match=r"!\.png is not a usable image: the file is empty"):
        _folder(FileFlags(samples=str(tmp_path)), tmp_path)
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match="must hold 4 images or more that can be read, found 3"):
        list(_folder(FileFlags(samples=str(tmp_path), bad_images="skip"), tmp_path).chunks)
