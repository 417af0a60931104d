"""The sides that are held beside one another do the same work."""

import importlib
import pathlib
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.torch
BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "train_dit": {"hidden": 16, "depth": 2, "heads": 2, "batch_size": 8},
    "sample_dit": {"hidden": 16, "depth": 2, "heads": 2, "batch_size": 8, "steps": 2},
    "train_gspn": {"hidden": 16, "depth": 2, "batch_size": 8},
    "fid_moments": {"rows": 50, "size": 8, "batch_size": 16},
    "fid_distance": {"rows": 50, "size": 8},
    "precision_recall": {"rows": 50, "size": 8},
}


@pytest.fixture
def sides(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    yield {name: importlib.import_module(f"peers_{name}") for name in ("jax", "torch")}
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "torch_fidelity")]:
        del sys.modules[name]  # an empty one and what was imported beside it


def test_the_line_loop_of_pytorch_is_the_operator(sides):
    import torch

    from gspn_jax.kernels import propagate

    loop = sides["torch"].LineLoop(hidden=6, proxy=3, chunk=2)
    x = torch.randn(2, 4, 4, 6)
    proxy = loop.proxy(x)
    terms = [linear(proxy).detach().numpy() for linear in (loop.gates, loop.scale, loop.out_gate)]
    gates, scale, out_gate = (a.reshape(2, 4, 4, 4, *rest) for a, rest in zip(terms, ((3, 6), (6,), (6,)), strict=True))
    expected = propagate(x.numpy(), gates, 1 + scale, 1 + out_gate, np.full(4, 0.25, np.float32), chunk=2)
    np.testing.assert_allclose(loop(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_models_have_as_many_parameters(sides):
    from gspn_jax import models
    from gspn_jax.config import ModelConfig

    torch_side = sides["torch"]
    for model, trunk in (
        (ModelConfig(preset="DiT-S/2", hidden=32, depth=2, heads=2, learn_sigma=False), torch_side.DiTTrunk(32, 2, 2)),
        (ModelConfig(preset="GSPN-S/2", hidden=32, depth=2, learn_sigma=False), torch_side.GSPNTrunk(32, 2)),
    ):
        theirs = sum(p.numel() for p in torch_side.Denoiser(trunk, 32).parameters())
        assert models.count_parameters(sides["jax"]._config(model, 2)) == theirs


@pytest.mark.parametrize("case", SMALL)
def test_both_sides_of_a_case_run(sides, case):
    found = {name: getattr(side, case)(**SMALL[case])() for name, side in sides.items()}
    if case == "fid_distance":
        assert found["jax"] == pytest.approx(found["torch"], rel=1e-3)
    if case == "fid_moments":
        np.testing.assert_allclose(found["jax"].cov, found["torch"]["sigma"], atol=1e-6)
    if case == "precision_recall":
        assert found["jax"] == pytest.approx(found["torch"], abs=0.1)  # float16 beside float32
