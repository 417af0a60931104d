import numpy as np
import pytest

from gspn_jax.config import ConfigError, DiffusionConfig
from gspn_jax.diffusion import make_schedule, respace
from gspn_jax.diffusion.schedules import cosine_schedule, linear_schedule, space_timesteps
from tests.diffusion import gaussian_oracle as oracle


@pytest.mark.parametrize("timesteps", [1000, 100])
def test_linear_schedule_is_the_product_of_one_minus_beta(timesteps):
    schedule = linear_schedule(timesteps)
    np.testing.assert_allclose(schedule.alphas_cumprod, oracle.alphas_cumprod(timesteps), rtol=1e-12)
    assert schedule.betas.dtype == np.float64
    np.testing.assert_array_equal(schedule.timesteps, np.arange(timesteps))


def test_linear_schedule_of_1000_steps_has_the_published_ends():
    betas = linear_schedule(1000).betas
    np.testing.assert_allclose([betas[0], betas[-1]], [1e-4, 0.02], rtol=1e-12)


def test_cosine_schedule_follows_the_squared_cosine():
    schedule = cosine_schedule(1000)
    t = np.arange(1, 1001) / 1000
    signal = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    unclipped = schedule.betas < 0.999
    assert unclipped[:998].all()
    np.testing.assert_allclose(schedule.alphas_cumprod[:998], signal[:998], rtol=1e-9)
    assert schedule.betas.max() == 0.999


@pytest.mark.parametrize("schedule", [linear_schedule(1000), respace(linear_schedule(1000), 50), cosine_schedule(100)])
def test_posterior_is_bayes_rule_of_gaussians(schedule):
    previous = 1.0
    for t, cumulative in enumerate(schedule.alphas_cumprod):
        on_x0, on_xt, variance = oracle.bayes_posterior(cumulative, previous)
        np.testing.assert_allclose(schedule.posterior_mean_x0[t], on_x0, rtol=1e-9)
        np.testing.assert_allclose(schedule.posterior_mean_xt[t], on_xt, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(schedule.posterior_variance[t], variance, rtol=1e-9, atol=1e-15)
        previous = cumulative


def test_log_variance_at_zero_takes_the_next_one():
    schedule = linear_schedule(1000)
    assert schedule.posterior_variance[0] == 0.0
    np.testing.assert_allclose(np.exp(schedule.posterior_log_variance[1:]), schedule.posterior_variance[1:], rtol=1e-12)
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]


@pytest.mark.parametrize(("timesteps", "steps"), [(1000, 250), (1000, 50), (1000, 7), (1000, 1000), (100, 33), (5, 2)])
def test_timesteps_are_spaced_as_in_iddpm(timesteps, steps):
    position, expected = 0.0, []
    for _ in range(steps):
        expected.append(round(position))
        position += (timesteps - 1) / (steps - 1)
    found = space_timesteps(timesteps, steps)
    assert found.tolist() == expected
    assert found[0] == 0 and found[-1] == timesteps - 1 and len(set(found.tolist())) == steps


def test_one_step_starts_from_noise():
    assert space_timesteps(1000, 1).tolist() == [999]


def test_respaced_process_keeps_the_noise_level_of_each_timestep():
    whole = linear_schedule(1000)
    spaced = respace(whole, 250)
    np.testing.assert_allclose(spaced.alphas_cumprod, whole.alphas_cumprod[spaced.timesteps], rtol=1e-12)
    assert spaced.num_timesteps == 250 and spaced.trained_timesteps == 1000


def test_respacing_to_all_steps_changes_nothing():
    whole = cosine_schedule(100)
    spaced = respace(whole, 100)
    np.testing.assert_allclose(spaced.betas, whole.betas, rtol=1e-10)
    np.testing.assert_array_equal(spaced.timesteps, whole.timesteps)


def test_config_chooses_the_schedule():
    linear = make_schedule(DiffusionConfig(timesteps=50))
    cosine = make_schedule(DiffusionConfig(timesteps=50, beta_schedule="cosine"))
    np.testing.assert_array_equal(linear.betas, linear_schedule(50).betas)
    np.testing.assert_array_equal(cosine.betas, cosine_schedule(50).betas)


def test_impossible_schedules_are_named():
    with pytest.raises(ConfigError, match=r"diffusion\.timesteps must be greater than 20 .* found 20"):
        linear_schedule(20)
    with pytest.raises(ConfigError, match=r"sampler\.steps must be between 1 and .*\(100\), found 101"):
        respace(linear_schedule(100), 101)
