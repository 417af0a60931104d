"""Samplers of Stable Diffusion against timesteps of the papers, Gaussians in closed form and coefficients by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.config import ConfigError
from gspn_jax.diffusion.scheduler_config import SchedulerConfig, alphas_cumprod
from gspn_jax.diffusion.stable_diffusion import guide, make_table, sample
from gspn_jax.tables import STABLE_DIFFUSION_SAMPLERS

LEADING = SchedulerConfig(spacing="leading", steps_offset=1)
MEAN, STD = 0.7, 0.6


def times(name, scheduler, steps):
    return list(make_table(STABLE_DIFFUSION_SAMPLERS[name], scheduler, steps).time)


def test_timesteps_are_those_of_the_spacings():
    trailing, linspace = (dataclasses.replace(LEADING, spacing=spacing) for spacing in ("trailing", "linspace"))
    assert times("ddim", LEADING, 10) == times("euler", LEADING, 10) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert times("ddim", trailing, 3) == times("dpm++", trailing, 3) == [999, 666, 332]
    assert times("dpm++", linspace, 3) == [999, 666, 333]
    assert times("dpm++", LEADING, 3) == [751, 501, 251]
    assert times("pndm", LEADING, 4) == [751, 501, 501, 251, 1]
    np.testing.assert_allclose(times("euler", linspace, 5), [999, 749.25, 499.5, 249.75, 0])


def test_betas_are_squares_of_a_line_and_lose_their_last_signal_if_asked():
    product = 1.0
    for i in range(1000):
        product *= 1.0 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
    assert alphas_cumprod(LEADING)[-1] == pytest.approx(product, rel=3e-5)  # of float32 factors
    rescaled = alphas_cumprod(dataclasses.replace(LEADING, zero_snr=True))
    assert rescaled[-1] == 0 and rescaled[0] == pytest.approx(1 - 0.00085, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "steps", "more", "error"),
    [
        ("euler", 100, {"spacing": "trailing"}, 0.04),
        ("ddim", 200, {"prediction": "v_prediction", "spacing": "trailing", "zero_snr": True}, 0.025),
        ("pndm", 50, {}, 0.002),
        ("dpm++", 50, {"karras": True}, 0.002),
    ],
)
def test_a_gaussian_is_drawn_as_its_flow_says(name, steps, more, error):
    """Each value keeps its quantile where the network is E[noise | x] or E[v | x] of N(mean, std^2)."""
    scheduler, sampler = dataclasses.replace(LEADING, **more), STABLE_DIFFUSION_SAMPLERS[name]
    alphas = jnp.asarray(alphas_cumprod(scheduler), jnp.float32)

    def network(x, time, shift):
        alpha = jnp.interp(time, jnp.arange(1000.0), alphas)[:, None, None, None]
        signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
        mean = shift[:, None, None, None]
        x0 = mean + signal * STD**2 / (alpha * STD**2 + 1 - alpha) * (x - signal * mean)
        epsilon = (x - signal * x0) / sigma
        return epsilon if scheduler.prediction == "epsilon" else signal * epsilon - sigma * x0

    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    condition = jnp.full(2, MEAN)
    found = jax.jit(lambda noise: sample(sampler, scheduler, steps, network, noise, condition, null=jnp.zeros(())))(
        noise
    )
    table = make_table(sampler, scheduler, steps)
    signal, sigma = table.signal[0], table.sigma[0]
    start = noise * sampler.start(scheduler, table)
    truth = MEAN + STD * (start - signal * MEAN) / np.sqrt((signal * STD) ** 2 + sigma**2)
    assert np.abs(np.asarray(found) - truth).max() < error, np.abs(np.asarray(found) - truth).max()


def test_guidance_rescale_by_hand():
    conditional, unconditional = np.array([[1.0, 3.0], [0.0, 2.0]]).reshape(2, 1, 1, 2, 1)
    np.testing.assert_allclose(np.ravel(guide(conditional, unconditional, 2.0, 0.0)), [2.0, 4.0])
    conditional, unconditional = np.array([[1.0, 5.0], [0.0, 2.0]]).reshape(2, 1, 1, 2, 1)
    # guided: 2, 8, deviation 3, of the conditional 2: by half of 2/3
    np.testing.assert_allclose(np.ravel(guide(conditional, unconditional, 2.0, 0.5)), [2 * 5 / 6, 8 * 5 / 6])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"timestep_spacing": "even"}, r"timestep_spacing must be one of 'leading', .*, found 'even'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, r"beta_schedule must be one of 'scaled_linear', 'linear', found"),
        ({"beta_end": "0.02"}, r"beta_end must be between 0 and 1, found '0\.02'"),
        ({"steps_offset": -1}, r"steps_offset must be a whole number from 0 to 1,000,000, found -1"),
        ({"algorithm_type": "sde-dpmsolver++"}, r"algorithm_type must be 'dpmsolver\+\+', found"),
    ],
)
def test_a_scheduler_that_is_not_known_gets_a_sentence(content, message):
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig.from_json(content)


def test_steps_that_do_not_fit_get_a_sentence():
    zero = dataclasses.replace(LEADING, zero_snr=True)
    for name, scheduler, steps, message in (
        ("ddim", LEADING, 0, "--steps must be between 1 and the model's 1000 timesteps, found 0"),
        ("ddim", LEADING, 1000, "steps_offset 1 leads beyond its 1000 timesteps"),
        ("pndm", dataclasses.replace(zero, prediction="v_prediction"), 5, "must be sampled by ddim, euler"),
        ("ddim", zero, 5, "must predict v, found one that predicts epsilon"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_table(STABLE_DIFFUSION_SAMPLERS[name], scheduler, steps)
