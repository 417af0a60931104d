"""The self-test: what it vouches for on this machine and of a file, and what it says it cannot tell."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from gspn_jax.config import ConfigError
from gspn_jax.files import sha256_of
from gspn_jax.metrics import inception, self_test
from gspn_jax.metrics.known_features import KNOWN_FEATURES, STRIDE


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights of which no features are stored."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(inception.random_state_dict(5), path)
    return path


def test_this_machine_gives_the_stored_features_of_pytorch():
    check = self_test.check_machine()
    assert check.passed, check.text


def test_a_machine_or_version_that_computes_something_else_fails(monkeypatch):
    right, extract = inception.resize, self_test.extract

    def mistaken(extractor, images):  # the smallest of the known mistakes
        monkeypatch.setattr(extractor, "_resize", lambda images: (right(images) * 128 + 0.5) / 127.5)
        return extract(extractor, images)

    monkeypatch.setattr(self_test, "extract", mistaken)
    check = self_test.check_machine()
    assert check.passed is False and "relative L2 pool" in check.text


def test_a_sound_file_passes_and_is_not_vouched_for(weights, tmp_path):
    checks = list(self_test.check_file(weights, record=tmp_path / "features.npz"))
    said = "\n".join(check.text for check in checks)
    assert all(check.passed is not False for check in checks), said
    assert "472 tensors, 23,885,392 values" in said
    assert "no features of these weights are stored in this program" in said
    assert "no file that this program knows" in said
    with np.load(tmp_path / "features.npz") as recorded:
        assert recorded["pool"].shape == (3, 2048) and str(recorded["made_by"]).startswith("JAX ")
        assert str(recorded["tensors_sha256"]) == inception.digest(inception.random_state_dict(5))


@pytest.mark.slow
def test_features_are_compared_with_recorded_ones(weights, tmp_path):
    list(self_test.check_file(weights, record=tmp_path / "features.npz"))
    with np.load(tmp_path / "features.npz") as recorded:
        changed = dict(recorded)
    changed["logits"] = changed["logits"] * 1.001
    np.savez(tmp_path / "changed.npz", **changed)
    *_, same_weights, compared = self_test.check_file(weights, compare=tmp_path / "changed.npz")
    assert same_weights.passed and compared.passed is False
    assert "changed.npz (JAX" in compared.text and "pool 0.0e+00, spatial 0.0e+00, logits 1.0e-03" in compared.text


def test_what_is_known_of_a_file_is_said_and_no_more(weights, tmp_path, monkeypatch):
    sha256 = sha256_of(weights)
    monkeypatch.setitem(self_test.KNOWN_FILES, sha256[:8], "THE FILE")
    known = self_test._known_file(weights, sha256)
    assert known.passed and "first 8 digits are those of THE FILE" in known.text
    inception.convert(weights, tmp_path / "converted.safetensors")
    converted = self_test._known_file(tmp_path / "converted.safetensors", sha256_of(tmp_path / "converted.safetensors"))
    assert converted.passed is None and "says that it was converted from THE FILE" in converted.text


def test_a_recording_is_not_overwritten_and_must_be_one(weights, tmp_path):
    (tmp_path / "precious.npz").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists already"):
        next(self_test.check_file(weights, record=tmp_path / "precious.npz"))
    np.savez(tmp_path / "other.npz", pool=np.zeros(3))
    with pytest.raises(ConfigError, match="must be a file that --record wrote, found no tensors_sha256, made_by, spat"):
        next(self_test.check_file(weights, compare=tmp_path / "other.npz"))


@pytest.mark.torch
def test_the_stored_features_are_those_of_the_independent_network():
    from tests.metrics import torch_inception

    weights = inception.random_state_dict(self_test.RANDOM_SEED)
    stored = KNOWN_FEATURES[inception.digest(weights)]
    for number, image in enumerate(self_test.fixed_images()):
        for name, truth in torch_inception.features(weights, image).items():
            np.testing.assert_allclose(stored[name][number], truth[0, ::STRIDE], rtol=1e-6, atol=1e-7)
