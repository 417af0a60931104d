"""A DINOv2 is the same network from every kind of file; its positions are resized as PyTorch does; mistakes get a
sentence."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gspn_jax import bicubic, evaluate, prepare
from gspn_jax.config import ConfigError
from gspn_jax.metrics.frechet import frechet_distance
from gspn_jax.metrics.reference import read_reference
from gspn_jax.state_dict import WeightsError
from gspn_jax.text.dinov2 import Dinov2Config, load_dinov2, require
from tests.text import tiny_dinov2
from tests.text.tiny_dinov2 import CONFIG

KINDS = {
    "B": CONFIG,
    "g": dataclasses.replace(CONFIG, swiglu=True, hidden=64),
    "registers": dataclasses.replace(CONFIG, registers=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_holds_the_same_network(kind, tmp_path):
    config = dataclasses.replace(KINDS[kind], width=192)  # heads of 64, which a file alone does not tell
    weights = tiny_dinov2.random_state_dict(config)
    folder = tiny_dinov2.write_folder(tmp_path / "folder", config)
    save_file(tiny_dinov2.original(weights), tmp_path / "original.safetensors")
    save_file(tiny_dinov2.published(weights), tmp_path / "published.safetensors")
    found = [
        load_dinov2(path) for path in (folder, tmp_path / "original.safetensors", tmp_path / "published.safetensors")
    ]
    assert [one.config for one in found] == [config] * 3
    assert len({one.digest(one.params) for one in found}) == 1
    assert found[0].params.keys() == weights.keys()
    np.testing.assert_array_equal(
        found[0].params["encoder.layer.1.attention.k_proj.weight"], weights["encoder.layer.1.attention.k_proj.weight"].T
    )


def test_a_filter_of_constants_and_lines_keeps_them():
    """The cubic reproduces lines, away from the edges that PyTorch repeats."""
    for weights in (bicubic.pillow(9, 6), bicubic.torch(9, 6), bicubic.torch(9, 6, 0.1), bicubic.torch(5, 12)):
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    line = bicubic.torch(40, 30) @ np.arange(40.0)
    np.testing.assert_allclose(line[2:-2], ((np.arange(30) + 0.5) * 40 / 30 - 0.5)[2:-2], atol=0.05)


def test_features_are_the_class_token_and_the_tokens_of_patches(tmp_path):
    network = load_dinov2(tiny_dinov2.write_folder(tmp_path / "dinov2"))
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), np.uint8)
    seen = jax.eval_shape(network.resize, images)
    assert jax.eval_shape(network.network, network.params, seen).shape == (2, CONFIG.width)
    patches = network.tokens(3)
    encode = jax.jit(lambda images: patches.network(patches.params, patches.resize(images)))
    found, mirrored = (np.asarray(encode(view)) for view in (images, images[:, :, ::-1]))
    assert found.shape == (2, 3, 3, CONFIG.width)
    assert np.abs(mirrored[:, :, ::-1] - found).max() > 0.1  # positions: a view of its own


@pytest.mark.slow
def test_fd_dinov2_is_the_distance_of_class_tokens(tmp_path, capsys):
    """From images to statistics and to the number, without Inception; other weights are refused."""
    folder = tiny_dinov2.write_folder(tmp_path / "dinov2")
    rng = np.random.default_rng(0)
    sets = {name: rng.integers(0, 256, (count, 30, 30, 3), np.uint8) for name, count in (("real", 9), ("samples", 7))}
    sets["samples"] //= 2
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    reference, output = tmp_path / "ref.npz", tmp_path / "fd.json"
    words = ["stats", "--npz", str(tmp_path / "real.npz"), "--dinov2", str(folder), "--output", str(reference)]
    prepare.main([*words, "--save-every", "4", "--batch-size", "8"])
    assert read_reference(reference).allowed == ("is", "fd_dinov2")

    def scored(weights):
        words = ["--samples", tmp_path / "samples.npz", "--reference", reference, "--metrics", "fd_dinov2"]
        words += ["--networks", f"dinov2={weights}", "--output", output, "--batch-size", "8"]
        evaluate.main(list(map(str, words)))

    scored(folder)
    network, moments = load_dinov2(folder), []
    for images in sets.values():
        tokens = np.asarray(network.network(network.params, network.resize(images)), np.float64)
        moments += [tokens.mean(0), np.cov(tokens, rowvar=False)]
    truth = frechet_distance(*moments)
    found = json.loads(output.read_text())
    assert found["metrics"]["fd_dinov2"] == pytest.approx(truth, rel=1e-3) and truth > 1
    assert found["settings"]["dinov2_sha256"] == network.digest(network.params)
    output.unlink()
    with pytest.raises(SystemExit):
        scored(tiny_dinov2.write_folder(tmp_path / "other", seed=1))
    assert "must be of the DINOv2 weights in use" in " ".join(capsys.readouterr().err.split())


def test_a_mistake_gets_one_sentence(tmp_path):
    folder = tiny_dinov2.write_folder(tmp_path / "dinov2")
    weights = load_file(folder / "model.safetensors")

    def written(name, tensors):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    without = {name: value for name, value in weights.items() if name != "encoder.layer.1.norm2.bias"}
    wrong = weights | {"embeddings.position_embeddings": weights["embeddings.position_embeddings"][:, :-1]}
    for path, error, said in (
        (written("a.safetensors", without), WeightsError, "must have 'encoder.layer.1.norm2.bias'"),
        (written("b.safetensors", wrong), WeightsError, "positions must be of a class token and a square, found 25"),
        (written("c.safetensors", weights | {"head.weight": np.ones(2, np.float32)}), WeightsError, "'head.weight'"),
        (written("d.safetensors", {"a": np.ones(2, np.float32)}), WeightsError, "must have 'embeddings.position"),
        (tmp_path / "absent.safetensors", FileNotFoundError, "found nothing at"),
    ):
        with pytest.raises(error, match=said):
            load_dinov2(path)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match="must be that of a Dinov2Model, found 'vit'"):
        load_dinov2(folder)
    with pytest.raises(ConfigError, match="--networks dinov2=FILE must be a folder of DINOv2"):
        require(None, "--networks dinov2=FILE")
    with pytest.raises(ConfigError, match="multiple of its heads"):
        Dinov2Config(heads=5)
