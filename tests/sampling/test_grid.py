"""Pixels survive the way to the model and back, and grids show what they should."""

import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.pixels import from_uint8, to_uint8
from gspn_jax.sampling.grid import grid


def test_uint8_goes_to_the_models_range_and_back_exactly():
    levels = np.arange(256, dtype=np.uint8)
    x = from_uint8(levels)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, levels.astype(np.float64) / 127.5 - 1, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(to_uint8(x), levels)


def test_to_uint8_truncates_and_clips_as_dit_does():
    x = jnp.array([-9.0, -1.0, -0.999, 0.0, 0.0077, 0.0079, 0.999, 1.0, 9.0])
    expected = [0, 0, 0, 128, 128, 129, 255, 255, 255]  # by hand: trunc(clip(127.5 x + 128, 0, 255))
    np.testing.assert_array_equal(to_uint8(x), np.array(expected, np.uint8))
    assert to_uint8(jnp.zeros((2, 3), jnp.bfloat16)).dtype == jnp.uint8


def black_white_boxes(picture) -> tuple[int, int]:
    """How many rows and columns of the grid hold black, from runs of black pixels."""
    dark = np.asarray(picture.convert("L")) < 40
    runs = [np.diff(dark.any(axis).astype(int), prepend=0).clip(0).sum() for axis in (1, 0)]
    return int(runs[0]), int(runs[1])


def test_grid_has_rows_and_columns_and_enlarges_small_images():
    picture = grid(np.zeros((7, 8, 8, 1), np.uint8), columns=3)
    assert black_white_boxes(picture) == (3, 3)
    assert picture.width >= 3 * 64 and picture.height >= 3 * 64
    assert grid(np.zeros((2, 256, 200, 3), np.uint8)).height < 2 * 256  # large ones keep their size


def test_grid_shows_every_pixel_in_its_place():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    pixels = np.asarray(grid(images, columns=2))
    cell = 64
    gap = (pixels.shape[1] - 2 * cell) // 3
    for i, image in enumerate(images):
        row, column = divmod(i, 2)
        top, left = gap + row * (cell + gap), gap + column * (cell + gap)
        np.testing.assert_array_equal(pixels[top : top + cell : 8, left : left + cell : 8], image)


def test_labels_are_written_above_each_image_or_beside_each_row():
    images = np.full((6, 8, 8, 1), 255, np.uint8)  # white: all that is dark is text
    plain, above, beside = (np.asarray(grid(images, labels, columns=3)) for labels in (None, range(6), ["cat", "dog"]))
    assert plain.min() == 255 and above.min() < 40 and beside.min() < 40
    assert above.shape[0] > plain.shape[0] and above.shape[1] == plain.shape[1]
    assert beside.shape[0] == plain.shape[0] and beside.shape[1] > plain.shape[1]
    assert beside[:, beside.shape[1] - plain.shape[1] + 4 :].min() == 255  # text stays out of the images


@pytest.mark.wrong_shapes
def test_wrong_grids_get_a_sentence():
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, H, W, C\] .*found float32 \[2, 8, 8, 1\]"):
        grid(np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=r"labels must have an entry for each of 6 images or 2 rows, found 4"):
        grid(np.zeros((6, 8, 8, 1), np.uint8), [1, 2, 3, 4], columns=3)
    with pytest.raises(ValueError, match="columns must be 1 or more, found 0"):
        grid(np.zeros((6, 8, 8, 1), np.uint8), columns=0)


def test_pixel_helpers_need_no_grain():
    code = "import sys; sys.modules.update(grain=None, tensorflow_datasets=None); import gspn_jax.sampling.grid"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[2])
