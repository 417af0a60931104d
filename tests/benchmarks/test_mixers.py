"""The table of mixers: equal parameters, GSPN as released beside loops, bounds by kind of work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.released_gspn import ReleasedOptions
from gspn_jax import models
from gspn_jax.config import Config, DataConfig, DiffusionConfig
from gspn_jax.tables import MIXERS
from tests.benchmarks import scripts
from tests.models.numpy_gspn import depthwise, linear, scan

mixers = scripts.load("mixers")


@pytest.fixture(autouse=True)
def added(monkeypatch):
    monkeypatch.setitem(MIXERS, "released_gspn", ReleasedOptions)


def parameters(model):
    data = DataConfig(image_size=32, channels=4, num_classes=1000)
    return models.count_parameters(Config("r", model=model, data=data, diffusion=DiffusionConfig(objective="flow")))


@pytest.mark.parametrize("base", [mixers.DIGITS, mixers.GPU], ids=["digits", "DiT-B/2"])
def test_all_rows_have_the_parameters_of_attention(base):
    """Within 2 %, and a network that differs in the mixer only, and in positions where that sees none."""
    found = {name: mixers.matched(row, base) for name, row in mixers.ROWS.items()}
    wanted = parameters(found["attention"])
    for name, model in found.items():
        assert parameters(model) == pytest.approx(wanted, rel=0.02), name
        arch = models.resolve(model)
        wanted_arch = models.resolve(found["attention"])
        assert dataclasses.replace(arch, mixer="attention", options=None, chunks=(), positions=True) == (
            dataclasses.replace(wanted_arch, options=None, chunks=())
        )
    local = models.resolve(found["GSPN"]).chunks
    assert local[-2:] == (None, None) and set(local[:-2]) == {2}
    assert set(models.resolve(found["GSPN as released"]).chunks) == {2}


def turned(x, direction):
    """[H, W, C] so that the scan goes down."""
    x = x if direction in ("down", "up") else x.swapaxes(0, 1)
    return x[::-1] if direction in ("up", "left") else x


def test_gspn_as_released_is_that_of_float64_loops():
    """To 1e-5: each scan goes down a turned map, two lines long, with weights that are not turned, and stays turned."""
    options = ReleasedOptions(groups=8, proxy=3, skip=True)
    graphdef, state = nnx.split(options.build(8, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.4 * rng.standard_normal(leaf.shape)).astype(np.float32), nnx.to_pure_dict(state)
    )
    image = rng.standard_normal((1, 5, 5, 8)).astype(np.float32)
    found = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, image)

    p = jax.tree.map(np.float64, params)
    x = depthwise(linear(p["in_proj"], image[0]), p["conv"]["kernel"])
    proxy = linear(p["proxy"], x)
    gates, lam, out_gate, skip = (linear(p[name], proxy) for name in ("gates", "lam", "out_gate", "skip"))
    y = np.zeros_like(x)
    for k, direction in enumerate(("down", "up", "right", "left")):
        seen = turned(x, direction)
        h = scan((1 + lam[:, :, k]) * seen, gates[:, :, 3 * k : 3 * k + 3], "down", 2)
        y += p["merge"][k] * ((1 + out_gate[:, :, k]) * h + skip[:, :, k] * seen)
    wanted = linear(p["out_proj"], y)
    np.testing.assert_allclose(found[0], wanted, atol=1e-5 * np.abs(wanted).max())
    with pytest.raises(ValueError, match=r"GSPN as released must have square maps, found 4x5"):
        nnx.merge(graphdef, params)(jnp.zeros((1, 4, 5, 8)))


def test_tables_say_how_many_seeds_and_leave_out_what_is_not_there():
    run = {"parameters": 1000, "frechet": 0.5, "conditional_accuracy": 0.9}
    rows = {f"GSPN, seed {seed}": run | {"frechet": 0.5 + 0.1 * seed} for seed in range(3)}
    lines = list(mixers.scores(rows | {"attention, seed 0": run}))
    assert lines[2] == "| attention | 1,000 | 1 | 0.500 (0.500) | 0.900 (0.900) |"
    assert lines[3].startswith("| GSPN | 1,000 | 3 | 0.600 +- 0.100 (0.500, 0.600, 0.700) |") and len(lines) == 4
    compiled = {"parameters": 2_000_000, "batch": 16, "ms": 12.8, "temporary_gb": 3.21}
    (line,) = list(mixers.costs({mixers.key("GSPN", 1024, "training"): compiled}, "training"))[2:]
    assert line == "| GSPN | 2.00M |  | 1,250, 3.2 |  |"
    # an image of a sampler takes four evaluations, and the table has images an evaluation
    timed = {"parameters": 2_000_000, "batch": 16, "evaluation_ms": 8.0, "sampled_images_per_second": 500.0}
    (line,) = list(mixers.costs({mixers.key("GSPN", 256, "sampling"): timed}, "sampling"))[2:]
    assert line == "| GSPN | 2.00M | 2,000 |  |  |"
