"""Every file in configs/ loads, and builds the model that it names."""

import dataclasses
import pathlib

import pytest

from gspn_jax import cli, models
from gspn_jax.config import DiffusionConfig, SamplerConfig
from gspn_jax.data.latents import record_type
from gspn_jax.diffusion import samplers
from gspn_jax.tables import MIXERS, OBJECTIVES, SAMPLERS, SOURCES, samplers_of

ROOT = pathlib.Path(__file__).parents[1]
OTHERS = ("gspn_t", "gspn_s", "gspn_b", "classify_cifar10", "gspn_sd15", "unet_cifar10", "gspn_unet_cifar10")
"""Configs of other tasks, which tests/classify and tests/text_to_image look at."""
FILES = sorted(path for path in (ROOT / "configs").glob("[!_]*.py") if path.stem not in OTHERS)
PUBLISHED = {
    "gspn_b_2": 137e6,
    "gspn_l_2": 443e6,
    "gspn_xl_2": 690e6,
    "dit_xl_2": 675e6,
    "gspn_l_2_512": 443e6,
    "gspn_xl_2_512": 690e6,
    "dit_xl_2_512": 675e6,
}
"""Parameters, from the papers of GSPN (arXiv 2501.12381) and DiT (arXiv 2212.09748); to be met within 1 %."""
IMAGENET = 1_281_167
"""Images of the training set of ILSVRC 2012."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_builds(path):
    config = cli.load_config(path)
    count = models.count_parameters(config)
    assert count == pytest.approx(PUBLISHED.get(path.stem, count), rel=0.01)
    assert len(samplers.make_table(config.sampler, config.diffusion).time) > 0
    assert config.run_dir == f"runs/{path.stem}"
    assert f"--config configs/{path.stem}.py" in (ROOT / "configs" / path.name).read_text()


@pytest.mark.parametrize(("ending", "latents"), [("_2", 32), ("_2_512", 64)])
def test_the_imagenet_recipes_differ_in_the_model_only_where_they_say_so(ending, latents):
    recipes = {name: cli.load_config(ROOT / "configs" / f"{name}.py") for name in PUBLISHED if name.endswith(ending)}
    assert len(recipes) >= 3
    reference = recipes[f"gspn_xl{ending}"]
    assert reference.data.image_size == latents
    for name, config in recipes.items():
        assert config.data == reference.data and config.diffusion == reference.diffusion
        assert config.train == reference.train and config.sampler == reference.sampler
        if name.startswith("gspn"):
            assert config.optimizer == reference.optimizer


@pytest.mark.parametrize("name", ["gspn_l_2", "gspn_xl_2", "dit_xl_2"])
def test_512_pixels_are_the_recipe_of_256_on_larger_latents(name):
    small, large = (cli.load_config(ROOT / "configs" / f"{stem}.py") for stem in (name, f"{name}_512"))
    data = dataclasses.replace(small.data, image_size=64, path="data/imagenet512_latents")
    # four times the tokens leave no room for what "names" keeps
    model = dataclasses.replace(small.model, remat="full" if small.model.remat == "names" else small.model.remat)
    assert large == dataclasses.replace(small, run_dir=f"runs/{name}_512", model=model, data=data)
    text = (ROOT / "configs" / f"{name}_512.py").read_text()
    record = record_type((64, 64, 4), flips=True).itemsize
    assert f"{IMAGENET * record / 1e9:.0f} GB" in text and "--image-size 512" in text


def test_what_a_table_names_is_there():
    """Lines are imported when they are first asked for; every sampler of an objective gives a table."""
    assert all(table[name] is not None for table in (SOURCES, MIXERS, OBJECTIVES, SAMPLERS) for name in table)
    assert {name: samplers_of(name) for name in OBJECTIVES} == {
        "ddpm": ("ddpm", "ddim", "dpm++"),
        "flow": ("heun", "euler", "sde"),
        "x_prediction": ("heun", "euler", "sde"),
        "mean_flow": ("mean_flow", "euler", "heun", "sde"),
    }
    for objective in OBJECTIVES:
        for name in samplers_of(objective):
            table = samplers.make_table(SamplerConfig(name=name, steps=5), DiffusionConfig(objective=objective))
            assert len(table.time) >= 5
