"""Every file in configs/ loads, and builds the model that it names."""

import pathlib

import pytest

from gspn_jax import cli, models
from gspn_jax.diffusion import samplers

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")
PUBLISHED = {"gspn_b_2": 137e6, "gspn_l_2": 443e6, "gspn_xl_2": 690e6, "dit_xl_2": 675e6}
"""Parameters, from the papers of GSPN (arXiv 2501.12381) and DiT (arXiv 2212.09748); to be met within 1 %."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_builds(path):
    config = cli.load_config(path)
    count = models.count_parameters(config)
    assert count == pytest.approx(PUBLISHED.get(path.stem, count), rel=0.01)
    assert len(samplers.make_table(config.sampler, config.diffusion).time) > 0
    assert config.run_dir == f"runs/{path.stem}"
    assert f"--config configs/{path.stem}.py" in (ROOT / "configs" / path.name).read_text()


def test_the_imagenet_recipes_differ_in_the_model_only_where_they_say_so():
    recipes = {name: cli.load_config(ROOT / "configs" / f"{name}.py") for name in PUBLISHED}
    reference = recipes["gspn_xl_2"]
    for name, config in recipes.items():
        assert config.data == reference.data and config.diffusion == reference.diffusion
        assert config.train == reference.train and config.sampler == reference.sampler
        if name.startswith("gspn"):
            assert config.optimizer == reference.optimizer
