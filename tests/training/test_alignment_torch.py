"""Gradients of the alignment are those of PyTorch in float64."""

import jax
import numpy as np
import pytest
from flax import nnx

from gspn_jax.training.alignment import Projector, cosine

pytestmark = pytest.mark.torch


def test_gradients_of_projector_and_tokens_are_those_of_pytorch():
    import torch

    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((3, 2, 2, 8)).astype(np.float32)
    features = rng.standard_normal((3, 2, 2, 5)).astype(np.float16)
    graphdef, state = nnx.split(Projector(8, 16, 5, dtype="float32", rngs=nnx.Rngs(1)))
    params = nnx.to_pure_dict(state)

    def loss(params, tokens):
        return cosine(nnx.merge(graphdef, params)(tokens), features).mean()

    value, (found, of_tokens) = jax.value_and_grad(loss, argnums=(0, 1))(params, tokens)

    theirs = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 16), torch.nn.SiLU(), torch.nn.Linear(16, 5)
    ).double()
    with torch.no_grad():
        for number, name in ((0, "fc1"), (2, "fc2"), (4, "fc3")):
            theirs[number].weight.copy_(torch.tensor(np.asarray(params[name]["kernel"]).T))
            theirs[number].bias.copy_(torch.tensor(np.asarray(params[name]["bias"])))
    x = torch.tensor(tokens, dtype=torch.float64, requires_grad=True)
    y = torch.tensor(features.astype(np.float64))
    truth = torch.nn.functional.cosine_similarity(theirs(x), y, dim=-1).mean()
    truth.backward()
    assert float(value) == pytest.approx(truth.item(), abs=1e-6)
    np.testing.assert_allclose(of_tokens, x.grad.numpy(), rtol=1e-4, atol=1e-7)
    for number, name in ((0, "fc1"), (2, "fc2"), (4, "fc3")):
        np.testing.assert_allclose(found[name]["kernel"], theirs[number].weight.grad.numpy().T, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found[name]["bias"], theirs[number].bias.grad.numpy(), rtol=1e-4, atol=1e-7)
