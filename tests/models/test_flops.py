import dataclasses

import jax
import pytest

from gspn_jax import models
from gspn_jax.config import ModelConfig
from gspn_jax.models import forward_flops, resolve
from tests.models.model_cases import DIT, DIT_GSPN, MODERN, PAPER, make_config, random_inputs
from tests.models.traced import traced_products


@pytest.mark.parametrize("change", [{}, {"groups": 2}, {"skip": True}])
@pytest.mark.parametrize("model", [PAPER, DIT, MODERN, DIT_GSPN], ids=["paper", "dit", "modern", "dit_gspn"])
def test_products_are_those_of_the_traced_program(model, change):
    """Exactly, once the depthwise convolutions and scans, which are not products, are taken off by hand."""
    if model in (DIT, MODERN) and change:
        model, change = dataclasses.replace(model, depth=5), {}
    config = make_config(dataclasses.replace(model, **change))
    arch = resolve(config.model)
    graphdef, params = models.abstract(config)
    inputs = random_inputs(1, 8, 12)
    jaxpr = jax.make_jaxpr(lambda p, *args: models.apply(graphdef, p, *args))(params, *inputs).jaxpr
    pointwise = 0
    if arch.mixer == "gspn":
        scan = 4 * (10 + 2 * arch.options.skip)  # lam, 3 multiply-adds, out_gate, merge and sum; skip: a multiply-add
        convolutions = 2 * 49 + (2 * 9 if arch.layout == "paper" else 0)
        pointwise = arch.blocks * 4 * 6 * arch.hidden * (scan + convolutions)
    assert forward_flops(arch, 3, 8, 12) - pointwise == pytest.approx(traced_products(jaxpr), rel=1e-9)


def test_dit_is_what_xla_counts():
    """XLA also counts norms, activations and softmax; at this width they are below 4 percent."""
    config = make_config(ModelConfig(preset="DiT-S/2", hidden=192, depth=1, heads=2))
    graphdef, params = models.abstract(config)
    compiled = jax.jit(lambda p, *a: models.apply(graphdef, p, *a)).lower(params, *random_inputs(1, 8, 8)).compile()
    counted = compiled.cost_analysis()["flops"]
    assert forward_flops(resolve(config.model), 3, 8, 8) == pytest.approx(counted, rel=0.04)


# Multiply-adds at 256 px in 1e9: DiT-XL/2 118.6 (arXiv 2212.09748, table 4); GSPN about 177 and 114, counted
# from the authors' code with its skip term.
@pytest.mark.parametrize(
    ("preset", "skip", "giga"), [("DiT-XL/2", False, 118.6), ("GSPN-XL/2", True, 177), ("GSPN-L/2", True, 114)]
)
def test_known_costs(preset, skip, giga):
    flops = forward_flops(resolve(ModelConfig(preset=preset, skip=skip)), 4, 32, 32)
    assert flops / 2e9 == pytest.approx(giga, rel=0.05 if skip else 1e-3)
