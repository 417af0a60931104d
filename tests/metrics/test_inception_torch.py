"""Inception features against an independent PyTorch implementation in float64, on shared random weights."""

import functools

import jax
import numpy as np
import pytest

from gspn_jax.metrics import inception
from gspn_jax.state_dict import WeightsError

torch = pytest.importorskip("torch")
from tests.metrics import torch_inception  # noqa: E402

pytestmark = pytest.mark.torch

TOLERANCE, CAUGHT = 1e-5, 2e-4  # relative L2, float32 against float64; the smallest known mistake is 5e-4


@functools.cache
def weights():
    return inception.random_state_dict(3)


@functools.cache
def jitted():
    return jax.jit(inception.apply)


def pictures(height: int, width: int) -> np.ndarray:
    """Smooth colours with edges and some noise: what resizing and rounding act on."""
    rng = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(x / width * a + y / height * b) for a, b in rng.uniform(2, 20, (6, 2))]
    images = np.stack(waves, -1).reshape(height, width, 2, 3).transpose(2, 0, 1, 3) + rng.normal(0, 10, (2, 1, 1, 3))
    images[1, : height // 2] = 255 - images[1, : height // 2]
    return np.clip(images + rng.normal(0, 5, images.shape), 0, 255).astype(np.uint8)


def error(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (256, 256), (299, 299), (400, 512)], ids=str)
def test_features_are_those_of_the_pytorch_network(size):
    images = pictures(*size)
    truth = torch_inception.features(weights(), images)
    found = jitted()(inception.from_state_dict(weights()), images)
    for name, value in truth.items():
        assert getattr(found, name).shape == value.shape
        assert error(getattr(found, name), value) < TOLERANCE, name


@functools.cache
def found_at_80():
    return jitted()(inception.from_state_dict(weights()), pictures(80, 80))


@pytest.mark.parametrize("mistake", torch_inception.MISTAKES)
def test_each_known_mistake_would_be_caught(mistake):
    found, wrong = found_at_80(), torch_inception.features(weights(), pictures(80, 80), mistake)
    seen = "spatial" if mistake.startswith("spatial") else "logits" if mistake.startswith("logits") else "pool"
    if mistake == "no resize":  # a smaller image has another number of spatial features
        wrong.pop("spatial")
    errors = {name: error(getattr(found, name), value) for name, value in wrong.items()}
    assert errors[seen] > CAUGHT, errors


def test_a_pth_file_and_its_conversion_give_the_same_weights(tmp_path):
    tensors = {name: torch.tensor(value) for name, value in weights().items()}
    tensors |= {
        f"{name.removesuffix('.weight')}.num_batches_tracked": torch.tensor(0)
        for name in weights()
        if name.endswith("bn.weight")
    }
    torch.save(tensors, tmp_path / "w.pth")
    inception.convert(tmp_path / "w.pth", tmp_path / "w.safetensors")
    published, converted = (inception.load(tmp_path / f"w.{kind}") for kind in ("pth", "safetensors"))
    assert published.keys() == converted.keys()
    for name in published:
        np.testing.assert_array_equal(published[name], converted[name])
    assert inception.digest(inception.read(tmp_path / "w.pth")) == inception.digest(weights())


def test_code_in_a_pth_file_is_not_run(tmp_path):
    class Dangerous:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    torch.save({"fc.weight": Dangerous()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth must be a PyTorch file of tensors"):
        inception.load(tmp_path / "w.pth")
    assert not (tmp_path / "harmed").exists()
