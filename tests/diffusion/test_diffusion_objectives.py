import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from gspn_jax.config import DiffusionConfig
from gspn_jax.diffusion import ddpm, drop_condition, flow, loss, make_schedule
from gspn_jax.diffusion.schedules import linear_schedule
from tests.diffusion import gaussian_oracle as oracle

T = 100
SCHEDULE = linear_schedule(T)
SHAPE = (4, 2, 3, 1)


def batch(seed=0, shape=SHAPE):
    image_key, noise_key = jax.random.split(jax.random.key(seed))
    x0 = jax.random.uniform(image_key, shape, minval=-1.0, maxval=1.0)
    return x0, jax.random.normal(noise_key, shape), jnp.zeros(shape[0], jnp.int32)


def ddpm_loss(output, t, seed=0, shape=SHAPE):
    x0, noise, y = batch(seed, shape)
    return jitted_loss(lambda *_: output(noise), x0, y, t, noise)


def jitted_loss(denoise, x0, y, t, noise):
    return jax.jit(lambda: ddpm.training_loss(denoise, SCHEDULE, x0, y, t=jnp.asarray(t), noise=noise))()


def test_denoiser_sees_the_noisy_image_and_its_timestep():
    x0, noise, y = batch()
    seen = []
    ddpm.training_loss(
        lambda *args: seen.append(args) or args[0], SCHEDULE, x0, y, t=jnp.array([0, 7, 50, 99]), noise=noise
    )
    ((x_t, time, labels),) = seen
    signal = oracle.alphas_cumprod(T)[[0, 7, 50, 99], None, None, None]
    expected = np.sqrt(signal) * np.asarray(x0) + np.sqrt(1 - signal) * np.asarray(noise)
    np.testing.assert_allclose(x_t, expected, atol=1e-6)
    assert time.dtype == jnp.float32 and time.tolist() == [0.0, 7.0, 50.0, 99.0]
    assert labels is y


def test_plain_loss_is_the_mean_squared_error_of_epsilon():
    value, metrics = ddpm_loss(lambda noise: noise + 0.5, [0, 1, 50, 99])
    np.testing.assert_allclose(value, 0.25, rtol=1e-5)
    assert set(metrics) == {"mse"}


@pytest.mark.parametrize("edge", [-1.0, 1.0])
def test_exact_epsilon_leaves_only_the_mismatch_of_variances(edge):
    t = np.array([1, 10, 50, 99])
    value, metrics = ddpm_loss(lambda noise: jnp.concatenate([noise, jnp.full_like(noise, edge)], -1), t)
    cumulative = oracle.alphas_cumprod(T)
    posterior = np.array([oracle.bayes_posterior(cumulative[i], cumulative[i - 1])[2] for i in t])
    beta = 1 - cumulative[t] / cumulative[t - 1]
    predicted = beta if edge == 1.0 else posterior
    expected = 0.5 * (np.log(predicted / posterior) - 1 + posterior / predicted) / np.log(2)
    np.testing.assert_allclose(metrics["mse"], 0.0, atol=1e-12)
    np.testing.assert_allclose(metrics["vb"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, metrics["mse"] + metrics["vb"])


def test_variational_bound_is_the_integral_that_it_claims_to_be():
    """The KL by quadrature, the decoder's likelihood from SciPy's normal cdf, both in float64."""
    x0, noise, _ = batch(3)
    x0 = x0.at[0, 0, 0, 0].set(-1.0).at[0, 0, 1, 0].set(1.0)
    error, ranges = 0.3 * jax.random.normal(jax.random.key(7), (2, *SHAPE))
    ranges = jnp.clip(ranges * 3, -1.5, 1.5)
    t = np.array([0, 1, 40, 99])
    output = jnp.concatenate([noise + error, ranges], -1)
    _, metrics = jitted_loss(lambda *_: output, x0, jnp.zeros(4, jnp.int32), t, noise)

    cumulative = np.append(oracle.alphas_cumprod(T), 1.0)  # [-1] is the clean image
    x0, noise, error, ranges = (np.asarray(v, np.float64) for v in (x0, noise, error, ranges))
    expected = []
    for image, step in enumerate(t):
        on_x0, on_xt, variance = oracle.bayes_posterior(cumulative[step], cumulative[step - 1])
        log_low = np.log(variance or oracle.bayes_posterior(cumulative[1], cumulative[0])[2])
        log_high = np.log(1 - cumulative[step] / cumulative[step - 1])
        nats = []
        for x, n, e, v in zip(*(a[image].ravel() for a in (x0, noise, error, ranges)), strict=True):
            x_t = np.sqrt(cumulative[step]) * x + np.sqrt(1 - cumulative[step]) * n
            predicted = x - np.sqrt(1 / cumulative[step] - 1) * e
            std = np.exp(0.5 * ((v + 1) / 2 * log_high + (1 - v) / 2 * log_low))
            p = scipy.stats.norm(on_x0 * predicted + on_xt * x_t, std)
            if step == 0:
                low = p.cdf(x - 1 / 255) if x > -0.999 else 0.0
                high = p.cdf(x + 1 / 255) if x < 0.999 else 1.0
                nats.append(-np.log(max(high - low, 1e-12)))
            else:
                q = scipy.stats.norm(on_x0 * x + on_xt * x_t, np.exp(0.5 * log_low))
                low, high = q.ppf(1e-14), q.isf(1e-14)
                kl = scipy.integrate.quad(lambda u, q=q, p=p: q.pdf(u) * (q.logpdf(u) - p.logpdf(u)), low, high)[0]
                nats.append(kl)
        expected.append(np.mean(nats) / np.log(2))
    np.testing.assert_allclose(metrics["vb"], expected, rtol=2e-4)


def test_variance_range_spans_posterior_to_beta():
    low, high = jnp.asarray(SCHEDULE.posterior_log_variance), jnp.asarray(np.log(SCHEDULE.betas))
    ones = jnp.ones(T)
    cumulative = np.append(1.0, oracle.alphas_cumprod(T))
    posterior = [oracle.bayes_posterior(cumulative[t + 1], cumulative[t])[2] for t in range(1, T)]
    np.testing.assert_allclose(jnp.exp(ddpm.interpolate_log_variance(-ones, low, high))[1:], posterior, rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(ddpm.interpolate_log_variance(ones, low, high)), SCHEDULE.betas, rtol=1e-5)


def test_variational_bound_trains_the_variance_and_only_that():
    x0, noise, y = batch(1)
    t = jnp.array([0, 1, 50, 99])
    output = 0.5 * jax.random.normal(jax.random.key(5), (*SHAPE[:-1], 2))

    def term(output, name):
        loss, metrics = ddpm.training_loss(lambda *_: output, SCHEDULE, x0, y, t=t, noise=noise)
        return jnp.sum({"loss": loss, **metrics}[name])

    mse, vb, total = (jax.jit(jax.grad(term), static_argnums=1)(output, name) for name in ("mse", "vb", "loss"))
    np.testing.assert_array_equal(vb[..., 0], 0.0)
    np.testing.assert_array_equal(mse[..., 1], 0.0)
    assert np.all(np.any(np.asarray(vb[..., 1]) != 0, axis=(1, 2)))
    np.testing.assert_allclose(total, mse + vb, rtol=1e-6)


@pytest.mark.parametrize("t", [0, 1, 99])
def test_gradients_stay_finite_for_a_bad_prediction(t):
    x0 = jnp.array([-1.0, 1.0, 0.0, 0.2]).reshape(1, 2, 2, 1)

    def total(output):
        return ddpm.training_loss(
            lambda *_: output, SCHEDULE, x0, jnp.zeros(1, jnp.int32), t=jnp.array([t]), noise=jnp.ones_like(x0)
        )[0].sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.full((1, 2, 2, 2), 3.0).at[0, 0].set(-5.0))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_far_tail_of_the_decoder_keeps_its_precision():
    """At 5 standard deviations on either side, where both cdfs on the upper side are 1 in float32."""
    x = jnp.array([0.5, -0.5])
    found = ddpm.discretized_normal_log_likelihood(x, jnp.zeros(2), jnp.full(2, np.log(0.1)))
    edges = (np.array([0.5]) + np.array([-1, 1]) / 255) / 0.1
    expected = np.log(scipy.stats.norm.sf(edges[0]) - scipy.stats.norm.sf(edges[1]))
    np.testing.assert_allclose(found, [expected, expected], rtol=1e-4)


def test_wrong_output_width_is_named():
    with pytest.raises(ValueError, match="must give 1 or 2 channels, found 3"):
        ddpm_loss(lambda noise: jnp.repeat(noise, 3, -1), [1, 2, 3, 4])


def test_flow_loss_is_zero_for_the_velocity_of_the_path():
    x0, noise, y = batch()
    t = jnp.array([0.0, 0.25, 0.6, 1.0])

    def denoise(x_t, time, labels):
        np.testing.assert_allclose(time, 1000 * np.asarray(t))
        column = np.asarray(t)[:, None, None, None]
        np.testing.assert_allclose(x_t, (1 - column) * x0 + column * noise, atol=1e-6)
        return noise - x0

    value, metrics = flow.training_loss(denoise, x0, y, t=t, noise=noise)
    np.testing.assert_array_equal(value, 0.0)
    off, _ = flow.training_loss(lambda *a: denoise(*a) - 2.0, x0, y, t=t, noise=noise)
    np.testing.assert_allclose(off, 4.0, rtol=1e-6)
    assert set(metrics) == {"mse"}


@pytest.mark.parametrize("name", ["logit_normal", "uniform"])
def test_times_have_the_quantiles_of_their_distribution(name):
    """40,000 draws: a quantile's standard error is at most 0.0032 here; the tolerance is four of them."""
    times = np.asarray(flow.sample_times(jax.random.key(0), 40_000, name))
    levels = np.array([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    expected = scipy.special.expit(scipy.stats.norm.ppf(levels)) if name == "logit_normal" else levels
    np.testing.assert_allclose(np.quantile(times, levels), expected, atol=0.013)


def test_all_timesteps_are_trained_evenly():
    """20,000 draws over 100 timesteps: chi-square with 99 degrees of freedom, one run in 10,000 would exceed it."""
    seen = []
    config = DiffusionConfig(timesteps=T)
    x0 = jnp.zeros((20_000, 1, 1, 1))
    loss(config, lambda x, t, y: seen.append(t) or x, x0, jnp.zeros(20_000, jnp.int32), jax.random.key(1))
    counts = np.bincount(np.asarray(seen[0]).astype(int), minlength=T)
    assert len(counts) == T
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_loss_at_the_optimum_is_the_conditional_variance(objective):
    """For Gaussian data the best possible loss is known: the mean over t of Var[target | x_t].

    4,000 images of 16 values; the tolerance is 2 %, more than four standard errors.
    """
    mean, std = 0.4, 0.5
    config = DiffusionConfig(objective=objective, timesteps=T, time_distribution="uniform")
    x0 = mean + std * jax.random.normal(jax.random.key(0), (4000, 4, 4, 1))
    if objective == "ddpm":
        denoise = oracle.epsilon_denoiser(T, [mean], std)
        cumulative = oracle.alphas_cumprod(T)
        expected = np.mean(cumulative * std**2 / (cumulative * std**2 + 1 - cumulative))
    else:
        denoise = oracle.velocity_denoiser([mean], std)
        expected = scipy.integrate.quad(lambda t: std**2 / ((1 - t) ** 2 * std**2 + t**2), 0, 1)[0]
    value, _ = loss(config, denoise, x0, jnp.zeros(4000, jnp.int32), jax.random.key(2))
    np.testing.assert_allclose(jnp.mean(value), expected, rtol=0.02)


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_loss_does_not_depend_on_sharding(objective):
    config = DiffusionConfig(objective=objective, timesteps=T)
    x0, _, y = batch(0, (8, 4, 4, 1))
    step = jax.jit(
        lambda x0, y, key: loss(config, lambda x, t, y: jnp.tanh(x) + 1e-3 * t[:, None, None, None], x0, y, key)[0]
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard = jax.NamedSharding(mesh, jax.P("data"))
    alone = step(x0, y, jax.random.key(3))
    spread = step(jax.device_put(x0, shard), jax.device_put(y, shard), jax.random.key(3))
    np.testing.assert_allclose(alone, spread, rtol=1e-6)


def test_images_of_any_type_are_noised_in_float32():
    value, _ = loss(
        DiffusionConfig(timesteps=T),
        lambda x, t, y: x.astype(jnp.bfloat16),
        jnp.zeros((2, 2, 2, 1), jnp.bfloat16),
        jnp.zeros(2, jnp.int32),
        jax.random.key(0),
    )
    assert value.dtype == jnp.float32


def test_dropped_labels_are_null_at_the_asked_rate():
    """10,000 labels: the standard error of the rate is 0.003; the tolerance is four of them."""
    labels = jnp.arange(10_000, dtype=jnp.int32) % 10
    dropped = np.asarray(drop_condition(jax.random.key(0), labels, 0.1, 10))
    assert dropped.dtype == np.int32
    np.testing.assert_allclose(np.mean(dropped == 10), 0.1, atol=0.012)
    kept = dropped != 10
    np.testing.assert_array_equal(dropped[kept], np.asarray(labels)[kept])
    np.testing.assert_array_equal(drop_condition(jax.random.key(0), labels, 0.0, 10), labels)


def test_default_schedule_is_that_of_the_config():
    assert make_schedule(DiffusionConfig()).num_timesteps == 1000


def test_diffusion_needs_jax_and_numpy_only():
    blocked = [
        "flax",
        "optax",
        "orbax",
        "grain",
        "tensorflow",
        "tensorflow_datasets",
        "tyro",
        "tqdm",
        "torch",
        "PIL",
        "sklearn",
        "safetensors",
        "gspn_jax.kernels",
    ]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport gspn_jax.diffusion"
    subprocess.run([sys.executable, "-c", code], check=True)
