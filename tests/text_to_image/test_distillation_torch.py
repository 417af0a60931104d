"""The loss of distillation and its gradients are those of PyTorch, of diffusers' U-Net with its attentions replaced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.config import MeshConfig
from gspn_jax.diffusion.scheduler_config import SchedulerConfig, alphas_cumprod
from gspn_jax.parallel import sharding
from gspn_jax.text_to_image import gspn_layers
from gspn_jax.text_to_image.distillation import LayersTask
from gspn_jax.text_to_image.folder import read_unet_config
from gspn_jax.text_to_image.gspn_layers import LayerOptions
from tests.text_to_image import distilling
from tests.text_to_image.tiny_folder import FIRST, SECOND, write_folder
from tests.unet import numpy_unet

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

TOLERANCE = 1e-4  # of the loss, and of the largest value of each gradient; theirs in float64
ONE = dataclasses.replace(
    numpy_unet.CONVOLUTIONS, channels=(8, 16), layers=1, depths=(1, 0), heads=(2, 4), middle_depth=1
)
XL = dataclasses.replace(numpy_unet.LINEAR, in_channels=4, out_channels=4, depths=(0, 1), middle_depth=1, heads=(2, 2))
CASES = {
    "1, pure": ((ONE, (FIRST,)), LayerOptions(form="pure", proxy_ratio=4, chunks=(2, 0))),
    "XL, q, k and v, skip": ((XL, (FIRST, SECOND)), LayerOptions(form="qkv", proxy_ratio=8, chunks=(2,), skip=True)),
}
SIZE = (6, 5)


def torch_terms(folder, params, options, batch, times, noise, sizes):
    """(the three terms of the loss, the parameters whose gradients are asked for)."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    from tests.text_to_image.torch_gspn_layer import Layer

    def double(value):
        return torch.tensor(np.asarray(value), dtype=torch.float64)

    config = read_unet_config(folder)
    leaves = {name: double(value).requires_grad_() for name, value in params.items()}
    alpha = double(alphas_cumprod(SchedulerConfig(prediction="v_prediction", **BETAS)))[torch.tensor(times)]
    signal, sigma = (part.sqrt()[:, None, None, None] for part in (alpha, 1 - alpha))
    clean, noise = (double(value).permute(0, 3, 1, 2) for value in (batch["image"], noise))
    call = {"encoder_hidden_states": double(batch["context"])}
    if "pooled" in batch:
        call["added_cond_kwargs"] = {"text_embeds": double(batch["pooled"]), "time_ids": double(batch["sizes"])}
    results = []
    for student in (False, True):
        net = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").double().eval()
        for one in net.parameters():
            one.requires_grad_(False)
        seen = {}
        for name in gspn_layers.attention_widths(config):
            parent = net.get_submodule(name.removesuffix(".attn1"))
            if student:
                own = {part.removeprefix(f"{name}."): leaf for part, leaf in leaves.items() if part.startswith(name)}
                parent.attn1 = Layer(own, options.form, options.chunk(gspn_layers.level_of(name, config)), sizes)
            parent.attn1.register_forward_hook(
                lambda module, inputs, output, name=name, seen=seen: seen.__setitem__(name, output)
            )
        results.append((net(signal * clean + sigma * noise, torch.tensor(times), **call).sample, seen))
    (teacher, attended), (student, mixed) = results
    square = torch.nn.functional.mse_loss
    terms = {
        "noise": square(student, signal * noise - sigma * clean),
        "teacher": square(student, teacher),
        "features": torch.stack([square(mixed[name], attended[name]) for name in attended]).mean(),
    }
    return terms, leaves


BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "betas": "linear"}
"""Diffusers' own, which the tiny folder leaves alone."""


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradients_are_those_of_pytorch(case, tmp_path):
    """On a map of 6x5, which at the second level is one of 3x3."""
    kind, options = CASES[case]
    folder = write_folder(tmp_path / "model", *kind)
    task = LayersTask(distilling.config(tmp_path / "run", folder, "nowhere", gspn=options))
    params = jax.jit(task.init)(jax.random.key(3))
    params = {name: value + 0.05 * jax.random.normal(jax.random.key(i), value.shape)
              for i, (name, value) in enumerate(params.items())}  # fmt: skip
    (frozen,) = task.frozen(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.standard_normal((2, *SIZE, 4)).astype(np.float32),
        "context": rng.standard_normal((2, 7, kind[0].context_width)).astype(np.float32),
    }
    if kind[0].added_width is not None:
        batch["pooled"] = rng.standard_normal((2, kind[0].pooled_width)).astype(np.float32)
        batch["sizes"] = rng.integers(0, 1025, (2, 6)).astype(np.int32)
    noise, times = rng.standard_normal((2, *SIZE, 4)).astype(np.float32), np.array([901, 33])

    def loss(params):
        terms = task.losses(params, frozen, jax.tree.map(jnp.asarray, batch), jnp.asarray(times), jnp.asarray(noise))
        return terms["noise"] + 0.5 * terms["teacher"] + 0.5 * terms["features"], terms

    (value, terms), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    sizes = {30: SIZE, 9: (3, 3)}
    theirs, leaves = torch_terms(folder, params, options, batch, times, noise, sizes)
    for name, term in theirs.items():
        assert float(terms[name]) == pytest.approx(term.item(), rel=TOLERANCE), name
    total = theirs["noise"] + 0.5 * theirs["teacher"] + 0.5 * theirs["features"]
    assert float(value) == pytest.approx(total.item(), rel=TOLERANCE)
    total.backward()
    assert gradients.keys() == leaves.keys() and len(gradients) > 20
    for name, found in gradients.items():
        truth = leaves[name].grad.numpy()
        assert np.abs(truth).max() > 0, name
        assert np.abs(np.asarray(found) - truth).max() < TOLERANCE * np.abs(truth).max(), name
