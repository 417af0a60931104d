"""Inception as clean-fid feeds it: scaled as Pillow does in float32, and never taken for ADM's."""

import jax
import numpy as np
import pytest
from PIL import Image

from gspn_jax.config import ConfigError
from gspn_jax.metrics import clean_inception, inception


@pytest.mark.parametrize(
    "size", [(32, 32), (512, 384), (299, 299), (300, 211)], ids=lambda size: "x".join(map(str, size))
)
def test_images_are_scaled_as_pillow_scales_floats(size):
    """As clean-fid's `make_resizer("PIL", False, "bicubic", (299, 299))` asks of it; to 1e-3 of 255 levels."""
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    found = np.asarray(jax.jit(clean_inception.resize)(images)) * 128 + 128
    assert found.shape == (2, 299, 299, 3)
    for image, scaled in zip(images, found, strict=True):
        for channel in range(3):
            one = Image.fromarray(image[:, :, channel].astype(np.float32))
            truth = np.asarray(one.resize((299, 299), Image.Resampling.BICUBIC))
            np.testing.assert_allclose(scaled[:, :, channel], truth, atol=1e-3)


def test_a_prefix_names_it_and_statistics_of_the_two_do_not_mix(tmp_path):
    file = tmp_path / "inception.safetensors"
    file.write_bytes(b"")
    assert inception.configured(str(file)) is inception
    assert inception.configured(f"clean:{file}") is clean_inception
    assert inception.require(f"clean:{file}", "--inception") == f"clean:{file}"
    with pytest.raises(ConfigError, match=r"--inception must be the Inception-v3 weights .* found nothing at clean:"):
        inception.require("clean:absent", "--inception")
    weights = {"a": np.zeros(3, np.float32)}
    assert clean_inception.digest(weights) != inception.digest(weights)
