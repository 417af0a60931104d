"""x prediction and mean flow: losses and samplers of Gaussian data, whose fields and flows have closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.config import DiffusionConfig, SamplerConfig
from gspn_jax.diffusion import flow, loss, sample
from tests.diffusion import gaussian_oracle as oracle

MEAN, STD = 0.7, 0.6
SHAPE = (6, 3, 4, 1)
KEYS = jax.random.split(jax.random.key(0), 5)


def draw(objective, denoise, **settings):
    """(images, the noise that they began with) of five samples."""
    config, diffusion = SamplerConfig(**settings), DiffusionConfig(objective=objective)
    run = jax.jit(lambda labels: sample(config, diffusion, denoise, (4, 4, 1), labels, KEYS, null=1, learn_sigma=False))
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (4, 4, 1)))(KEYS)
    return np.asarray(run(jnp.zeros(5, jnp.int32))), np.asarray(noise, np.float64)


def exact_clean(x, time, _):
    t = time[:, None, None, None] / flow.TIME_SCALE
    return oracle.expected_x0(x, 1 - t, t, MEAN, STD)


def exact_mean_velocity(x, told, _):
    """(x_t - x_r) / (t - r) of the flow map, for a span that may be 0: written out, so that nothing is divided by it.

    With k(t) = std of x_t the map is x_r = (1-r) m + k(r)/k(t) (x - (1-t) m), and
    1 - k(r)/k(t) = (k(t)^2 - k(r)^2) / (k(t) (k(t) + k(r))), whose numerator has the factor t - r.
    """
    t, span = (part[:, None, None, None] for part in (told[:, 0], told[:, 1]))
    r = t - span
    k_t, k_r = (jnp.sqrt((1 - s) ** 2 * STD**2 + s**2) for s in (t, r))
    share = ((1 + STD**2) * (t + r) - 2 * STD**2) / (k_t * (k_t + k_r))
    return share * (x - (1 - t) * MEAN) - MEAN


def test_loss_of_a_predicted_x0_is_that_of_its_velocity():
    """At times above and below the one at which the division stops; of a constant error of 0.3."""
    x0, noise = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    t = jnp.array([0.0, 0.01, 0.05, 0.3, 0.9, 1.0])
    found, metrics = jax.jit(lambda: flow.clean_loss(lambda *_: x0 + 0.3, x0, jnp.zeros(6), t=t, noise=noise))()
    np.testing.assert_allclose(found, 0.09 / np.maximum(t, 0.05) ** 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["clean_mse"], 0.09, rtol=1e-5)


def test_the_best_x_prediction_leaves_the_conditional_variance():
    """Var(x_0 | x_t) = (1 / std^2 + (1-t)^2 / t^2)^-1, over the square of the time; within 5 standard errors."""
    shape = (4, 100, 100, 1)
    noise_of_data, noise = jax.random.normal(jax.random.key(2), (2, *shape))
    t = np.array([0.02, 0.2, 0.5, 0.95])
    x0, times = MEAN + STD * noise_of_data, jnp.asarray(t, jnp.float32)
    found, _ = jax.jit(lambda: flow.clean_loss(exact_clean, x0, jnp.zeros(4), t=times, noise=noise))()
    wanted = 1 / (1 / STD**2 + (1 - t) ** 2 / t**2) / np.maximum(t, 0.05) ** 2
    np.testing.assert_allclose(found, wanted, rtol=5 * np.sqrt(2 / 10_000))


def test_times_and_noise_are_those_of_flow_matching_with_the_laws_mean_and_deviation():
    seen = {}

    def denoise(x, time, y, features=()):
        seen["t"] = time / flow.TIME_SCALE
        return x * 0

    config = DiffusionConfig(objective="x_prediction", time_mean=0.8, time_std=0.5)
    loss(config, denoise, jnp.zeros((20_000, 1, 1, 1)), jnp.zeros(20_000), jax.random.key(0))
    logits = np.log(seen["t"] / (1 - seen["t"]))
    np.testing.assert_allclose([logits.mean(), logits.std()], [0.8, 0.5], atol=0.02)


@pytest.mark.parametrize("name", ["heun", "sde"])
def test_samples_of_the_best_x_prediction_are_those_of_the_best_velocity(name):
    settings = {"name": name, "steps": 10, "sde_last_size": 0.1}
    found, _ = draw("x_prediction", exact_clean, **settings)
    wanted, _ = draw("flow", oracle.velocity_denoiser([MEAN], STD), **settings)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def pairs():
    """(t, span) of six images: flow matching's, inner ones, and the whole way."""
    return jnp.array([0.3, 0.9, 0.5, 0.8, 1.0, 1.0]), jnp.array([0.0, 0.0, 0.2, 0.8, 0.1, 1.0])


def test_the_exact_mean_velocity_has_no_error_along_its_own_path():
    """Where the path's velocity is the field's, the identity of mean flow holds to rounding: x_0 and noise are chosen
    so that noise - x_0 is the marginal velocity at x_t. A wrong tangent, span or sign leaves an error of order 1."""
    t, span = pairs()
    x_t = jax.random.normal(jax.random.key(3), SHAPE)

    @jax.jit
    def along():
        velocity = exact_mean_velocity(x_t, jnp.stack([t, jnp.zeros(6)], 1), None)
        field = oracle.velocity_denoiser([MEAN], STD)(x_t, 1000 * t, jnp.zeros(6, jnp.int32))
        x0 = x_t - t[:, None, None, None] * velocity
        _, metrics = flow.mean_loss(exact_mean_velocity, x0, None, t=t, span=span, noise=x0 + velocity)
        return velocity, field, metrics["mse"]

    velocity, field, mse = along()
    np.testing.assert_allclose(velocity, field, atol=1e-5)
    np.testing.assert_allclose(mse, 0, atol=1e-8)


def test_the_exact_mean_velocity_is_where_the_gradient_vanishes():
    """On data: the mean over x_0 and noise of the error's product with any function of x_t is 0, within 5 standard
    errors; with a mean velocity that is 5 % too large it is not."""
    count = 40_000
    noise_of_data, noise = jax.random.normal(jax.random.key(4), (2, count, 1, 1, 1))
    x0 = MEAN + STD * noise_of_data
    t, span = jnp.full(count, 0.8), jnp.full(count, 0.5)

    def slope(scale):
        def one(shift):
            def denoise(x, told, _):
                return scale * exact_mean_velocity(x, told, None) + shift[:, None, None, None]

            return flow.mean_loss(denoise, x0, None, t=t, span=span, noise=noise)[1]["mse"].sum()

        return np.asarray(jax.jit(jax.grad(one))(jnp.zeros(count)))

    for scale, far in ((1.0, False), (1.05, True)):
        errors = slope(scale)
        assert (abs(errors.mean()) > 5 * errors.std() / np.sqrt(count)) == far


def test_the_target_is_held_constant_and_the_weight_too():
    """Gradient of |e|^2 / const by an amplitude p of the prediction, e = p u - target: 2 e . u / (|e|^2 + 0.001)."""
    t, span = pairs()
    x0, noise = jax.random.normal(jax.random.key(5), (2, *SHAPE))

    def total(p):
        return flow.mean_loss(lambda *a: p * exact_mean_velocity(*a), x0, None, t=t, span=span, noise=noise)[0].sum()

    x_t = (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * noise
    told, step = jnp.stack([t, span], 1), 1e-3
    exact = jax.jit(lambda x, told: exact_mean_velocity(x, told, None))
    ahead, behind = (np.asarray(exact(x_t + s * (noise - x0), told + s), np.float64) for s in (step, -step))
    u = np.asarray(exact(x_t, told), np.float64)
    slope = (ahead - behind) / (2 * step)
    error = 1.3 * u - (noise - x0 - span[:, None, None, None] * 1.3 * slope)
    wanted = (2 * (error * u).sum((1, 2, 3)) / (np.square(error).sum((1, 2, 3)) + 1e-3)).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(total))(1.3), wanted, rtol=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samples_of_the_exact_mean_velocity_are_the_flow_map_in_any_number_of_evaluations(steps):
    found, noise = draw("mean_flow", exact_mean_velocity, steps=steps)
    np.testing.assert_allclose(found, oracle.flow_map(noise, (0.0, 1.0), (1.0, 0.0), MEAN, STD), atol=2e-5)


@pytest.mark.parametrize("name", ["euler", "heun", "sde"])
def test_flow_matchings_samplers_ask_a_mean_velocity_for_the_velocity(name):
    found, _ = draw("mean_flow", exact_mean_velocity, name=name, steps=8)
    wanted, _ = draw("flow", oracle.velocity_denoiser([MEAN], STD), name=name, steps=8)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_guidance_tells_both_of_a_pair_the_same_times():
    """Of scale 2: twice the prediction of class 0 minus that of no class."""

    def denoise(x, told, y):
        return exact_mean_velocity(x, told, None) + y[:, None, None, None].astype(jnp.float32) * told[:, 1].max()

    found, _ = draw("mean_flow", denoise, steps=1, guidance_scale=2.0)
    plain, _ = draw("mean_flow", denoise, steps=1)
    np.testing.assert_allclose(found, plain + 1.0, atol=1e-5)


def test_a_share_of_images_has_two_times_and_none_passes_zero():
    seen = []

    def denoise(x, told, y, features=()):
        jax.debug.callback(seen.append, told)
        return x * 0

    config = DiffusionConfig(objective="mean_flow", span_share=0.4, time_mean=-0.4)
    loss(config, denoise, jnp.zeros((5000, 1, 1, 1)), jnp.zeros(5000), jax.random.key(0))
    jax.effects_barrier()
    t, span = np.asarray(seen[0]).T
    assert (span >= 0).all() and (span <= t).all() and (t < 1).all()
    np.testing.assert_allclose((span > 0).mean(), 0.4, atol=0.03)
