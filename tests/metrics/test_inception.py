"""Inception features: resizing and layers against float64 loops, and files of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gspn_jax.metrics import inception
from gspn_jax.state_dict import WeightsError


@functools.cache
def weights():
    return inception.random_state_dict(0)


def bilinear(image: np.ndarray) -> np.ndarray:
    """TensorFlow 1 to 299x299, one pixel after the other: position i * size / 299 in float32, the end clamped."""
    height, width = image.shape[:2]
    result = np.empty((299, 299, 3))
    for i in range(299):
        y = float(np.float32(i) * (np.float32(height) / np.float32(299)))
        top, bottom = image[int(y)].astype(float), image[min(int(y) + 1, height - 1)].astype(float)
        row = top + (bottom - top) * (y - int(y))
        for j in range(299):
            x = float(np.float32(j) * (np.float32(width) / np.float32(299)))
            left, right = row[int(x)], row[min(int(x) + 1, width - 1)]
            result[i, j] = left + (right - left) * (x - int(x))
    return result


@pytest.mark.parametrize("size", [(8, 8), (32, 20), (256, 256), (299, 299), (301, 640)], ids=str)
def test_images_are_resized_as_by_tensorflow_1(size):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    found = np.asarray(jax.jit(inception.resize)(images))
    truth = (np.stack([bilinear(image) for image in images]) - 128) / 128
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-6)  # roundings of 255 in float32, over 128
    if size == (299, 299):
        np.testing.assert_array_equal(found, (images.astype(np.float32) - 128) / 128)
    else:
        half_pixel = (jax.image.resize(images.astype(np.float32), found.shape, "bilinear", antialias=False) - 128) / 128
        assert np.abs(found - half_pixel).max() > 0.01


def test_a_layer_is_convolution_normalisation_and_relu():
    name, (width, channels) = "Mixed_7c.branch3x3_2a", (384, 384)
    x = np.random.default_rng(0).normal(size=(1, 2, 4, channels))
    found = inception._conv(
        {k: jnp.asarray(v) for k, v in inception.from_state_dict(weights()).items()},
        name,
        jnp.asarray(x, jnp.float32),
        width,
        (1, 3),
        stride=1,
        padding="SAME",
    )
    w = {k.removeprefix(name + "."): v.astype(np.float64) for k, v in weights().items() if k.startswith(name + ".")}
    truth = np.zeros((1, 2, 4, width))
    for tap in range(3):
        for column in range(4):
            if 0 <= column + tap - 1 < 4:
                truth[:, :, column] += x[:, :, column + tap - 1] @ w["conv.weight"][:, :, 0, tap].T
    truth = (truth - w["bn.running_mean"]) / np.sqrt(w["bn.running_var"] + 1e-3) * w["bn.weight"] + w["bn.bias"]
    np.testing.assert_allclose(np.asarray(found), np.maximum(truth, 0), rtol=0, atol=1e-5)


def test_pooling_at_the_border_counts_the_pixels_that_exist():
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
    average, largest = np.empty_like(x), np.empty_like(x)
    for i in range(4):
        for j in range(5):
            window = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            average[:, i, j], largest[:, i, j] = window.mean((1, 2)), window.max((1, 2))
    np.testing.assert_allclose(inception._average_pool(jnp.asarray(x)), average, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(inception._max_pool(jnp.asarray(x), stride=1, padding="SAME"), largest)


def test_the_weights_are_as_many_as_in_the_published_file():
    shapes = inception.expected_shapes()
    assert len(shapes) == inception.TENSORS == 472
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == inception.VALUES == 23_885_392
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_6d.branch7x7dbl_2.conv.weight"] == (160, 160, 7, 1)
    assert shapes["Mixed_7c.branch_pool.bn.running_var"] == (192,)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 1), np.uint8), np.zeros((8, 8, 3), np.uint8)],
    ids=["float", "grey", "single"],
)
def test_only_uint8_colour_images_are_taken(images):
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, H, W, 3\], found"):
        inception.resize(images)


def changed(**changes) -> dict[str, np.ndarray]:
    return {name: value for name, value in (weights() | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fc.bias": None}, "must have 'fc.bias', found 471 tensors without it"),
        ({"fc.bias": None, "fc.weight": None}, "must have 'fc.bias', found 470 tensors without it (and 1 more such)"),
        ({"AuxLogits.fc.bias": np.zeros(3, np.float32)}, "found 'AuxLogits.fc.bias'"),
        (
            {"fc.weight": np.zeros((1000, 2048), np.float32)},
            "'fc.weight' must have shape (1008, 2048), found (1000, 2048); "
            "torchvision's Inception-v3 is another network",
        ),
        (
            {"Mixed_5b.branch1x1.bn.bias": np.full(64, np.nan, np.float32)},
            "'Mixed_5b.branch1x1.bn.bias' must be finite, found NaN or infinity",
        ),
        (
            {"Mixed_5b.branch1x1.bn.running_var": np.full(64, -1, np.float32)},
            "'Mixed_5b.branch1x1.bn.running_var' must be 0 or more, found -1.0",
        ),
    ],
    ids=["missing", "two missing", "unknown", "shape", "NaN", "variance"],
)
def test_a_file_of_other_weights_is_named_with_what_is_wrong(changes, said, tmp_path):
    save_file(changed(**changes), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as raised:
        inception.load(tmp_path / "w.safetensors")
    assert str(raised.value).startswith(f"{tmp_path / 'w.safetensors'}: ") and said in str(raised.value)


def test_weights_survive_a_file_and_have_one_digest(tmp_path):
    save_file(weights(), tmp_path / "w.safetensors")
    inception.convert(tmp_path / "w.safetensors", tmp_path / "again.safetensors")
    params = inception.load(tmp_path / "again.safetensors")
    for name, value in inception.random_params(0).items():
        np.testing.assert_array_equal(params[name], value)
    assert inception.digest(inception.read(tmp_path / "again.safetensors")) == inception.digest(weights())
    assert inception.digest(inception.random_state_dict(1)) != inception.digest(weights())
