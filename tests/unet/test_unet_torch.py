"""Agreement with diffusers' UNet2DConditionModel on shared random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.unet import (
    SDXL,
    STABLE_DIFFUSION_1,
    STABLE_DIFFUSION_2,
    Execution,
    UNetConfig,
    apply,
    expected_shapes,
    from_state_dict,
    load_unet,
    split_prediction,
)
from tests.unet.numpy_unet import CONVOLUTIONS, LINEAR, random_state_dict
from tests.unet.unet_cases import TIMESTEPS, as_json, random_inputs

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

TOLERANCE = 1e-4  # largest error over the largest output, float32 against float32


def diffusers_unet(config: UNetConfig, device: str = "cpu"):
    diffusers = pytest.importorskip("diffusers")
    import torch

    with torch.device(device):
        return diffusers.UNet2DConditionModel.from_config(as_json(config)).eval()


def run_diffusers(network, x, context, added):
    """The output as [B, H, W, C] in float32, computed in the type of the network."""
    import torch

    def tensor(array):
        return torch.tensor(array).to(network.dtype)

    more = (
        {}
        if added is None
        else {"added_cond_kwargs": {"text_embeds": tensor(added.pooled), "time_ids": torch.tensor(added.sizes)}}
    )
    with torch.no_grad():
        out = network(tensor(x.transpose(0, 3, 1, 2)), torch.tensor(TIMESTEPS), tensor(context), **more).sample
    return out.float().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("size", [(8, 4), (8, 12), (5, 7), (3, 3)], ids=str)
@pytest.mark.parametrize("config", [CONVOLUTIONS, LINEAR], ids=["convolutions", "linear"])
def test_outputs_are_those_of_diffusers_and_its_folders_load(config, size, tmp_path):
    theirs = diffusers_unet(config)
    import torch

    weights = random_state_dict(config)
    theirs.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    x, context, added = random_inputs(config, *size)
    truth = run_diffusers(theirs, x, context, added)
    params = from_state_dict(weights, config)
    ours = np.asarray(jax.jit(apply, static_argnums=1)(params, config, x, TIMESTEPS, context, added))
    assert ours.shape == truth.shape and np.abs(ours - truth).max() < TOLERANCE * np.abs(truth).max()

    theirs.save_pretrained(tmp_path)
    loaded, found = load_unet(tmp_path)
    assert found == config
    for name, value in params.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)


@pytest.mark.parametrize("config", [CONVOLUTIONS, LINEAR], ids=["convolutions", "linear"])
def test_dilated_calls_are_those_of_diffusers_with_dilated_modules(config):
    """As LinFusion dilates them: dilation and padding of every convolution times the ratio."""
    theirs = diffusers_unet(config)
    import torch

    weights = random_state_dict(config)
    theirs.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.dilation = tuple(2 * size for size in module.dilation)
            module.padding = tuple(2 * size for size in module.padding)
    x, context, added = random_inputs(config, 9, 6)
    truth = run_diffusers(theirs, x, context, added)
    run = jax.jit(apply, static_argnums=1, static_argnames="execution")
    params = from_state_dict(weights, config)
    ours = np.asarray(run(params, config, x, TIMESTEPS, context, added, execution=Execution(dilation=2, pieces=3)))
    assert np.abs(ours - truth).max() < TOLERANCE * np.abs(truth).max()


@pytest.mark.slow
def test_stable_diffusion_1_at_full_size_is_that_of_diffusers():
    theirs, config = diffusers_unet(STABLE_DIFFUSION_1), STABLE_DIFFUSION_1
    inputs = random_inputs(config, 9, 16)
    truth = run_diffusers(theirs, *inputs)
    params = from_state_dict({name: value.numpy() for name, value in theirs.state_dict().items()}, config)
    del theirs
    x, context, _ = inputs
    ours = np.asarray(jax.jit(apply, static_argnums=1)(params, config, x, TIMESTEPS, context))
    assert np.abs(ours - truth).max() < TOLERANCE * np.abs(truth).max()


def test_bfloat16_is_as_near_to_float32_as_that_of_diffusers():
    config = LINEAR
    theirs, step = diffusers_unet(config), jax.jit(apply, static_argnums=1)
    import torch

    errors = []
    for seed in range(8):
        weights = random_state_dict(config, seed)
        theirs.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        x, context, added = random_inputs(config, 8, 4, seed)
        truth = run_diffusers(theirs.float(), x, context, added)
        params = from_state_dict(weights, config, jnp.bfloat16)
        ours = step(params, config, x.astype(jnp.bfloat16), TIMESTEPS, context, added)
        both = np.asarray(ours, np.float32), run_diffusers(theirs.bfloat16(), x, context, added)
        errors.append([np.sqrt(np.square(found - truth).mean() / np.square(truth).mean()) for found in both])
        theirs.float()
    ours, diffusers = np.mean(errors, axis=0)
    assert 0 < ours < 1.5 * diffusers


@pytest.mark.parametrize("config", [STABLE_DIFFUSION_1, STABLE_DIFFUSION_2, SDXL], ids=["1", "2", "XL"])
def test_every_tensor_of_the_full_sizes_is_that_of_diffusers(config):
    theirs = diffusers_unet(config, "meta").state_dict()
    assert {name: tuple(value.shape) for name, value in theirs.items()} == expected_shapes(config)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_both_predictions_are_read_as_diffusers_reads_them(kind):
    diffusers = pytest.importorskip("diffusers")
    import torch

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, prediction_type=kind
    )
    scheduler.set_timesteps(10)
    rng = np.random.default_rng(0)
    output, x = (rng.standard_normal((2, 3, 4, 4)) for _ in range(2))
    for timestep in (900, 500, 100):
        alpha_bar = scheduler.alphas_cumprod[timestep].double().numpy().reshape(1, 1, 1, 1)
        step = scheduler.step(torch.tensor(output), timestep, torch.tensor(x))
        x0, noise = split_prediction(kind, output, x, alpha_bar)
        np.testing.assert_allclose(x0, step.pred_original_sample.numpy(), rtol=1e-6, atol=1e-6)
        before = scheduler.alphas_cumprod[timestep - 100].double().numpy()
        np.testing.assert_allclose(
            before**0.5 * x0 + (1 - before) ** 0.5 * noise, step.prev_sample.numpy(), rtol=1e-6, atol=1e-6
        )
