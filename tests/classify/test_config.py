"""Configs of classifiers: published recipes, schedules at given updates, what decays, and wrong settings."""

import dataclasses
import json
import math

import jax
import pytest

from gspn_jax.classify.config import AugmentConfig, ClassifierConfig, ClassifyConfig, ValidationConfig
from gspn_jax.classify.network import Network, decayed, resolve
from gspn_jax.cli import load_config
from gspn_jax.config import ConfigError, DataConfig, from_dict, to_dict
from gspn_jax.models.classifier import MIXERS
from gspn_jax.training.optimizer import learning_rate

DATA = DataConfig(source="folder", path="images", image_size=32, channels=3, num_classes=10)


@pytest.mark.parametrize(
    ("name", "peak", "start", "final", "epoch"),
    [("gspn_t", 2e-3, 2e-6, 2e-5, 625), ("gspn_s", 1.2e-3, 2e-6, 1.2e-5, 625), ("gspn_b", 1e-3, 1e-6, 1e-5, 1251)],
)
def test_learning_rates_are_those_of_the_published_recipe(name, peak, start, final, epoch):
    """lr(t) = start + t (peak - start) / w for t < w, then half a cosine over the other updates."""
    config = load_config(name, ClassifyConfig)
    schedule, warmup, steps = learning_rate(config.optimizer, config.train.steps), 20 * epoch, 300 * epoch
    assert config.train.steps == steps
    for t in (0, 1, epoch, warmup - 1, warmup, warmup + 1, 100 * epoch, steps - 1, steps):
        expected = start + t * (peak - start) / warmup
        if t >= warmup:
            expected = final + (peak - final) * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))) / 2
        assert float(schedule(t)) == pytest.approx(expected, rel=2e-4), t  # float32


@pytest.mark.parametrize("name", ["gspn_t", "gspn_s", "gspn_b", "classify_cifar10"])
def test_a_config_comes_back_from_json(name):
    config = load_config(name, ClassifyConfig)
    assert from_dict(json.loads(json.dumps(to_dict(config))), ClassifyConfig) == config
    assert config.run_dir == f"runs/{name}"
    with pytest.raises(ConfigError, match="task of the run must be 'diffusion', found 'classification'"):
        from_dict(to_dict(config))


def test_networks_that_are_compared_have_equal_parameters_within_two_percent():
    counts = {}
    for mixer in MIXERS:
        config = ClassifyConfig(run_dir=".", model=ClassifierConfig(preset="GSPN-mini", mixer=mixer), data=DATA)
        network = Network(config)
        counts[mixer] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(network.shapes))
        assert network.parameters == counts[mixer]
    assert counts["gspn"] == 865_822  # that of the reference's own sketch
    assert max(counts.values()) < 1.02 * min(counts.values())


def test_only_kernels_of_linears_and_convolutions_decay():
    """Not biases, norms, GRN's scale and shift, and merge weights, although stacks make matrices of them."""
    shapes = Network(ClassifyConfig(run_dir=".", model=ClassifierConfig(preset="GSPN-mini"), data=DATA)).shapes
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(decayed(shapes))
    }
    without = {name.rpartition("/")[2] for name, decays in names.items() if not decays}
    assert without == {"bias", "scale", "gamma", "beta", "merge"}
    assert {name.rpartition("/")[2] for name, decays in names.items() if decays} == {"kernel"}
    assert names["backbone/stage1/blocks/mixer/conv/kernel"] and names["head/linear/kernel"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"preset": "GSPN-XL"}}, "model.preset must be one of 'GSPN-T'"),
        ({"data": {"flip": True}}, "data.flip must be False: augment.flip mirrors images"),
        ({"data": {"in_memory": True}}, "data.in_memory must be False"),
        ({"augment": {"crop_area": (0.5, 0.2)}}, "augment.crop_area must be .low, high."),
        ({"augment": {"erasing": 1.5}}, r"augment.erasing must be in \[0, 1\], found 1.5"),
        ({"augment": {"mean": (0.5,)}}, "augment.mean must be 3 numbers, one a channel"),
        ({"eval": {"every": 1}}, "eval.path must be the folder of images to evaluate on, found None"),
        ({"eval": {"crop": 0.0}}, "eval.crop must be from 0.01 to 1"),
        ({"optimizer": {"warmup_start": 1.0}}, "optimizer.warmup_start must be between 0 and optimizer.learning_rate"),
    ],
)
def test_wrong_settings_are_one_sentence(change, said):
    config = ClassifyConfig(run_dir=".", data=DATA, eval=ValidationConfig(), augment=AugmentConfig())
    ((section, fields),) = change.items()
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def test_options_of_scans_need_scans():
    config = ClassifyConfig(run_dir=".", model=ClassifierConfig(mixer="none", skip=True), data=DATA)
    with pytest.raises(ConfigError, match="choices of line scans, found a mixer without them: 'none'"):
        resolve(config)
