"""Accuracy: counts are NumPy's, every image counts once on any mesh, and other classes are refused."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.classify.config import ClassifyConfig
from gspn_jax.classify.scoring import Scorer, check_classes, count_batch
from gspn_jax.config import ConfigError, DataConfig, MeshConfig
from gspn_jax.data.augment.crops import evaluation_crop
from gspn_jax.parallel import sharding


def by_sorting(logits, labels, top):
    """Labels among the first `top` of a stable sort; rows with a NaN never."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top]
    return (order == labels[:, None]).any(1) & ~np.isnan(logits).any(1)


def test_counts_are_those_of_a_stable_sort_also_with_ties_and_nan():
    random = np.random.default_rng(0)
    logits = random.integers(6, size=(500, 9)).astype(np.float32)  # many ties
    logits[3, 2] = logits[4, 0] = np.nan
    labels, real = random.integers(9, size=500).astype(np.int32), np.arange(500) < 480
    first, among_five, _, confusion = count_batch(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(real))
    assert first == by_sorting(logits, labels, 1)[:480].sum()
    assert among_five == by_sorting(logits, labels, 5)[:480].sum()
    expected = np.zeros((9, 9), int)
    np.add.at(expected, (labels[:480], logits[:480].argmax(1)), 1)
    np.testing.assert_array_equal(confusion, expected)


class Source:
    """Images of different sizes, numbered by their class and brightness."""

    class_names, fingerprint = tuple("abcdefg"), "0"

    def __len__(self):
        return 45

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(256, size=(9 + index % 5, 12 - index % 4, 3), dtype=np.uint8)
        return {"image": image, "label": np.int32(index % 7)}


@pytest.mark.parametrize("devices", [1, 8])
def test_every_image_counts_once_whatever_the_batch_and_the_devices(devices):
    """45 images in batches of 16: of each set of parameters the counts of a loop over the images."""
    config = ClassifyConfig(run_dir=".", data=DataConfig(source="folder", path=".", channels=3, num_classes=7))
    weights = [np.random.default_rng(s).standard_normal((8 * 8 * 3, 7)).astype(np.float32) for s in range(2)]
    network = types.SimpleNamespace(
        apply=lambda params, x: x.reshape(len(x), -1) @ params["w"], shapes={"w": weights[0]}, dtype="float32"
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    scorer = Scorer(config, network, Source(), mesh, size=8, crop=0.9, batch_size=16)
    found = scorer([jax.device_put({"w": w}, sharding.replicated(mesh)) for w in weights], show=False)
    source = Source()
    images = np.stack([evaluation_crop(source[i]["image"], 8, 0.9) for i in range(45)]) / 255
    x = (images - np.array(config.augment.mean)) / np.array(config.augment.deviation)
    labels = np.arange(45) % 7
    for scores, w in zip(found, weights, strict=True):
        logits = x.reshape(45, -1) @ w.astype(np.float64)
        assert scores.images == scores.confusion.sum() == 45
        assert (scores.first, scores.among_five) == tuple(by_sorting(logits, labels, top).sum() for top in (1, 5))
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(45), labels]
        assert scores.loss == pytest.approx(losses.mean(), rel=1e-5)
        assert scores.top1 == pytest.approx(100 * scores.first / 45)
    assert scorer([{"w": weights[0]}], lambda: "SIGTERM", show=False) is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a", "b"), "must have the 3 classes that the network is trained on, found 2 classes.*one side only: c"),
        (("a", "c", "b"), "in another order"),
        (("a", "b", "d"), "one side only: d"),
    ],
)
def test_other_classes_are_refused(names, said):
    with pytest.raises(ConfigError, match=said):
        check_classes(types.SimpleNamespace(class_names=names), ("a", "b", "c"), "the images")
