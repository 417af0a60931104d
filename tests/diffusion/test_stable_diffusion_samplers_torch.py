"""Agreement with the schedulers of diffusers, step by step on a toy network, and with their guidance rescale."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.diffusion import stable_diffusion as ours
from gspn_jax.diffusion.scheduler_config import SchedulerConfig
from gspn_jax.tables import STABLE_DIFFUSION_SAMPLERS

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

TOLERANCE = 1e-5  # largest error over the largest latent
THEIRS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
}
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def toy(x, time, tanh):
    """A network that depends on all it is told, smooth and bounded."""
    return tanh(0.8 * x + 0.03 * x**2 + 0.001 * time - 0.4)


def theirs(name, content, steps, noise):
    import diffusers
    import torch

    kind, more = THEIRS[name]
    scheduler = getattr(diffusers, kind).from_config(content | more)
    scheduler.set_timesteps(steps)
    if name == "euler" and content.get("rescale_betas_zero_snr"):
        return euler_in_float64(scheduler.sigmas.double().numpy(), scheduler.timesteps.tolist(), noise)
    x = torch.tensor(noise) * scheduler.init_noise_sigma
    times = []
    for time in scheduler.timesteps:
        times.append(float(time))
        seen = scheduler.scale_model_input(x, time)
        x = scheduler.step(toy(seen, float(time), torch.tanh), time, x).prev_sample
    return x.numpy(), times


def euler_in_float64(sigmas, times, noise):
    """Their steps from v at their noise levels: in float32, as they take them, a state of 4,096 times the noise leaves
    4e-5 of rounding."""
    x = noise.astype(np.float64) * sigmas[0]
    for time, sigma, after in zip(times, sigmas[:-1], sigmas[1:], strict=True):
        v = toy(x / (sigma**2 + 1) ** 0.5, time, np.tanh)
        x0 = x / (sigma**2 + 1) - v * sigma / (sigma**2 + 1) ** 0.5
        x = x + (x - x0) / sigma * (after - sigma)
    return x, times


def assert_same(name, content, steps):
    noise = np.random.default_rng(0).standard_normal((3, 4, 4, 2)).astype(np.float32)
    sampler, scheduler = STABLE_DIFFUSION_SAMPLERS[name], SchedulerConfig.from_json(content)
    found = jax.jit(
        lambda noise: ours.sample(
            sampler,
            scheduler,
            steps,
            lambda x, time, none: toy(x, time[:, None, None, None], jnp.tanh),
            noise,
            jnp.zeros(3),
            null=jnp.zeros(()),
        )
    )(noise)
    truth, times = theirs(name, content, steps, noise)
    np.testing.assert_allclose(ours.make_table(sampler, scheduler, steps).time, times, rtol=0, atol=2e-3)
    error = np.abs(np.asarray(found) - truth).max() / np.abs(truth).max()
    assert error < TOLERANCE, error


@pytest.mark.parametrize(
    ("name", "spacing", "prediction", "steps"),
    [
        (*case, steps)
        for case, steps in zip(
            itertools.product(THEIRS, ("leading", "trailing", "linspace"), ("epsilon", "v_prediction")),
            itertools.cycle((10, 7, 20, 5)),
            strict=False,
        )
    ],
)
def test_every_spacing_and_prediction(name, spacing, prediction, steps):
    pytest.importorskip("diffusers")
    content = STABLE_DIFFUSION | {"timestep_spacing": spacing, "prediction_type": prediction}
    assert_same(name, content, steps)


@pytest.mark.parametrize(
    ("name", "steps", "more"),
    [
        *(
            ("euler", 8, {"use_karras_sigmas": True, "timestep_spacing": s})
            for s in ("leading", "trailing", "linspace")
        ),
        ("dpm++", 8, {"use_karras_sigmas": True}),
        ("dpm++", 25, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
        *(
            (
                name,
                6,
                {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
            )
            for name in ("euler", "ddim", "dpm++")
        ),
        *((name, 4, {"set_alpha_to_one": value}) for name in ("ddim", "pndm") for value in (False, True)),
        *((name, steps, {}) for name in THEIRS for steps in (1, 2)),
        *(
            (name, 50, {"steps_offset": 0, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02})
            for name in THEIRS
        ),
    ],
    ids=str,
)
def test_karras_zero_terminal_snr_last_alpha_and_few_steps(name, steps, more):
    pytest.importorskip("diffusers")
    assert_same(name, STABLE_DIFFUSION | more, steps)


@pytest.mark.parametrize("name", THEIRS)
def test_a_file_that_says_nothing_has_their_defaults(name):
    pytest.importorskip("diffusers")
    assert_same(name, {}, 9)


def test_guidance_rescale():
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    import torch

    conditional, unconditional = np.random.default_rng(1).standard_normal((2, 3, 4, 5, 2)).astype(np.float32)
    for rescale in (0.0, 0.7, 1.0):
        guided = torch.tensor(unconditional + 7.5 * (conditional - unconditional))
        truth = pipeline.rescale_noise_cfg(guided, torch.tensor(conditional), guidance_rescale=rescale).numpy()
        found = ours.guide(jnp.asarray(conditional), jnp.asarray(unconditional), 7.5, rescale)
        np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5)
