import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.config import ConfigError, DiffusionConfig, SamplerConfig
from gspn_jax.diffusion import respace, sample
from gspn_jax.diffusion.samplers import ddim, ddpm, make_table
from gspn_jax.diffusion.schedules import linear_schedule
from tests.diffusion import gaussian_oracle as oracle

MEAN, STD = 0.7, 0.6
NULL = 10
SAMPLERS = [("ddpm", "ddpm"), ("ddpm", "ddim"), ("ddpm", "dpm++"), ("flow", "euler"), ("flow", "heun")]
SAMPLERS += [("flow", "sde")]


def sampler(config, diffusion, denoise, shape, learn_sigma=False, **options):
    return jax.jit(
        lambda labels, keys: sample(
            config, diffusion, denoise, shape, labels, keys, null=NULL, learn_sigma=learn_sigma, **options
        )
    )


def draw(config, diffusion, denoise, count, shape=(8, 8, 1), seed=0, **options):
    run = sampler(config, diffusion, denoise, shape, **options)
    return np.asarray(run(jnp.zeros(count, jnp.int32), jax.random.split(jax.random.key(seed), count)))


def start_noise(count, shape=(8, 8, 1), seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)
    return np.asarray(noise, np.float64)


def gaussian(objective, timesteps=1000, mean=MEAN, std=STD):
    if objective == "flow":
        return oracle.velocity_denoiser([mean], std)
    return oracle.epsilon_denoiser(timesteps, [mean], std)


def assert_moments(images, mean, std, discretisation=0.0):
    """Within 4.5 standard errors of each, plus the named discretisation error."""
    error = std / np.sqrt(images.size)
    np.testing.assert_allclose(images.mean(), mean, atol=4.5 * error + discretisation)
    np.testing.assert_allclose(images.std(), std, atol=4.5 * error / np.sqrt(2) + discretisation)


def chain_moments(timesteps, steps, mean, std, noise_std):
    """Mean and deviation of ancestral sampling on Gaussian data: each step is affine in x with independent noise."""
    visited = respace(linear_schedule(timesteps), steps).timesteps
    cumulative = oracle.alphas_cumprod(timesteps)[visited]
    m, v = 0.0, 1.0
    for i in range(steps - 1, -1, -1):
        previous = cumulative[i - 1] if i else 1.0
        on_x0, on_xt, variance = oracle.bayes_posterior(cumulative[i], previous)
        signal, sigma = np.sqrt(cumulative[i]), np.sqrt(1 - cumulative[i])
        slope = on_xt + on_x0 * (
            oracle.expected_x0(1.0, signal, sigma, mean, std) - oracle.expected_x0(0.0, signal, sigma, mean, std)
        )
        m = slope * m + on_x0 * oracle.expected_x0(0.0, signal, sigma, mean, std)
        v = slope**2 * v + (noise_std(variance, cumulative[i] / previous) ** 2 if i else 0.0)
    return m, np.sqrt(v)


@pytest.mark.parametrize("steps", [100, 25, 2])
def test_ddpm_has_the_moments_of_its_markov_chain(steps):
    images = draw(SamplerConfig(name="ddpm", steps=steps), DiffusionConfig(timesteps=100), gaussian("ddpm", 100), 600)
    assert_moments(images, *chain_moments(100, steps, MEAN, STD, lambda posterior, alpha: np.sqrt(posterior)))


@pytest.mark.parametrize(("edge", "variance"), [(-1.0, lambda p, a: np.sqrt(p)), (1.0, lambda p, a: np.sqrt(1 - a))])
def test_learned_range_spans_posterior_to_beta(edge, variance):
    denoise = oracle.epsilon_denoiser(100, [MEAN], STD, np.full(100, edge))
    images = draw(SamplerConfig(steps=10), DiffusionConfig(timesteps=100), denoise, 600, learn_sigma=True)
    assert_moments(images, *chain_moments(100, 10, MEAN, STD, variance))


@pytest.mark.parametrize("steps", [100, 10])
def test_best_learned_variance_samples_a_gaussian_exactly_in_any_number_of_steps(steps):
    """The reverse kernel of Gaussian data is Gaussian; its variance lies in the learned range. Only the last step,
    which adds no noise, shrinks the deviation by the factor std / sqrt(std^2 + sigma_0^2 / signal_0^2).
    """
    schedule = respace(linear_schedule(100), steps)
    cumulative = schedule.alphas_cumprod
    ranges = np.zeros(100)
    for i in range(1, steps):
        on_x0, _, posterior = oracle.bayes_posterior(cumulative[i], cumulative[i - 1])
        uncertain = STD**2 * (1 - cumulative[i]) / (cumulative[i] * STD**2 + 1 - cumulative[i])
        fraction = np.log((posterior + on_x0**2 * uncertain) / posterior) / np.log(
            (1 - cumulative[i] / cumulative[i - 1]) / posterior
        )
        assert 0 <= fraction <= 1
        ranges[schedule.timesteps[i]] = 2 * fraction - 1
    denoise = oracle.epsilon_denoiser(100, [MEAN], STD, ranges)
    images = draw(SamplerConfig(steps=steps), DiffusionConfig(timesteps=100), denoise, 600, learn_sigma=True)
    last = STD**2 / np.sqrt(STD**2 + (1 - cumulative[0]) / cumulative[0])
    # The process starts from N(0, 1), not from q(x_T): the mean is off by less than signal_T, 0.007, of the true one.
    assert_moments(images, MEAN, last, discretisation=0.003)


@pytest.mark.parametrize(
    ("objective", "name", "steps", "tolerance"),
    [
        ("ddpm", "ddpm", 250, 0.01),
        ("ddpm", "ddim", 100, 0.01),
        ("ddpm", "dpm++", 50, 0.003),
        ("flow", "euler", 200, 0.01),
        ("flow", "heun", 25, 0.003),
        ("flow", "sde", 250, 0.01),
    ],
)
def test_samples_have_the_moments_of_the_data(objective, name, steps, tolerance):
    images = draw(SamplerConfig(name=name, steps=steps), DiffusionConfig(objective=objective), gaussian(objective), 600)
    assert_moments(images, MEAN, STD, discretisation=tolerance)


def test_stochastic_ddim_has_the_moments_of_the_data():
    images = draw(SamplerConfig(name="ddim", steps=100, ddim_eta=0.5), DiffusionConfig(), gaussian("ddpm"), 600)
    assert_moments(images, MEAN, STD, discretisation=0.01)


def flow_error(objective, name, steps):
    """Largest distance to the closed-form flow map of the same start noise, for 4 images."""
    found = draw(SamplerConfig(name=name, steps=steps), DiffusionConfig(objective=objective), gaussian(objective), 4)
    x = start_noise(4)
    if objective == "flow":
        exact = oracle.flow_map(x, (0.0, 1.0), (1.0, 0.0), MEAN, STD)
    else:  # the discrete samplers take x_0 at timestep 0 as it is predicted
        cumulative = oracle.alphas_cumprod(1000)
        levels = [(np.sqrt(cumulative[t]), np.sqrt(1 - cumulative[t])) for t in (999, 0)]
        exact = oracle.expected_x0(oracle.flow_map(x, *levels, MEAN, STD), *levels[1], MEAN, STD)
    return np.abs(found - exact).max()


@pytest.mark.parametrize(
    ("objective", "name", "order"),
    [("flow", "euler", 1), ("flow", "heun", 2), ("ddpm", "ddim", 1), ("ddpm", "dpm++", 2)],
)
def test_error_to_the_flow_map_falls_with_the_order_of_the_method(objective, name, order):
    """Doubling the steps divides the error by 2^order, within 20 % (higher terms, rounding to whole timesteps)."""
    coarse, middle, fine = (flow_error(objective, name, steps) for steps in (32, 64, 128))
    np.testing.assert_allclose([coarse / middle, middle / fine], 2.0**order, rtol=0.2)
    assert fine < (5e-2 if order == 1 else 1e-3)


def test_full_eta_ddim_is_ddpm():
    schedule = respace(linear_schedule(1000), 50)
    for mine, theirs in zip(ddim(schedule, 1.0), ddpm(schedule), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-9)


def test_sampling_with_all_steps_is_the_unspaced_process():
    table = make_table(SamplerConfig(name="ddpm", steps=100), DiffusionConfig(timesteps=100))
    np.testing.assert_array_equal(table.time, np.arange(100)[::-1])
    np.testing.assert_allclose(table.on_noise[:-1] ** 2, linear_schedule(100).posterior_variance[:0:-1], rtol=1e-9)


@pytest.mark.parametrize(("objective", "name"), SAMPLERS)
def test_denoiser_is_told_the_times_that_it_was_trained_on(objective, name):
    told = []

    def denoise(x, t, y):
        jax.debug.callback(lambda t: told.append(float(t[0])), t)
        return x * 0.0

    draw(SamplerConfig(name=name, steps=4), DiffusionConfig(objective=objective), denoise, 2, (1, 1, 1))
    jax.effects_barrier()
    expected = {"euler": [1000, 750, 500, 250], "heun": [1000, 750, 750, 500, 500, 250, 250]}
    expected["sde"] = np.float32([1000, 680, 360, 40]).tolist()
    told = np.sort(told)[::-1]
    if name == "dpm++":  # even in log SNR, between the timesteps
        assert told[0] == 999 and told[-1] == 0
        told = np.interp(told, np.arange(1000), oracle.log_snr(1000))
        np.testing.assert_allclose(np.diff(told), (told[-1] - told[0]) / 3, rtol=1e-5)
    else:
        assert told.tolist() == expected.get(name, [999, 666, 333, 0])


@pytest.mark.parametrize(("objective", "name"), SAMPLERS)
def test_clipping_keeps_predictions_in_range(objective, name):
    """Data at 2, narrower than the last noise level: the last prediction is above 1 whatever x, and is returned."""
    clipped = draw(
        SamplerConfig(name=name, steps=10, clip_denoised=True, sde_last="euler"),
        DiffusionConfig(objective=objective),
        gaussian(objective, mean=2.0, std=0.003),
        4,
    )
    np.testing.assert_allclose(clipped, 1.0, atol=1e-5)


def mixing_denoiser(classes=NULL + 1):
    """A nonlinear function of the whole image, its time and label, so that a mistake anywhere shows."""
    weights = 0.3 * jax.random.normal(jax.random.key(9), (9, 9))
    embedding = jax.random.normal(jax.random.key(8), (classes, 9))

    def denoise(x, t, y):
        flat = x.reshape(len(x), 9)
        hidden = jnp.tanh(jnp.einsum("bi,ij->bj", flat, weights) + embedding[y] + t[:, None] / 1000.0)
        return (0.5 * x + 0.5 * hidden.reshape(x.shape)).astype(jnp.float32)

    return denoise


@pytest.mark.parametrize(("objective", "name"), SAMPLERS)
def test_an_image_depends_on_its_key_and_label_only(objective, name):
    """Alone, in a batch, in another order, over 8 devices: equal to 1e-5."""
    config = SamplerConfig(name=name, steps=6, guidance_scale=2.0, guidance_interval=(0.0, 0.8), ddim_eta=0.5)
    run = sampler(config, DiffusionConfig(objective=objective), mixing_denoiser(), (3, 3, 1))
    labels, keys = jnp.arange(16, dtype=jnp.int32) % 10, jax.random.split(jax.random.key(4), 16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard = jax.NamedSharding(mesh, jax.P("data"))

    reference = np.asarray(run(labels, keys))
    sharded = jax.device_put((labels, keys), shard)
    over_devices = run.lower(*sharded).compile()
    assert not any(word in over_devices.as_text() for word in ("all-", "collective-permute", "reduce-scatter"))
    spread = over_devices(*sharded)
    assert {piece.data.shape for piece in spread.addressable_shards} == {(2, 3, 3, 1)}
    scale = np.abs(reference).max()
    assert len(np.unique(reference[:, 0, 0, 0])) == 16
    np.testing.assert_allclose(spread, reference, atol=1e-5 * scale)
    np.testing.assert_allclose(run(labels[3:4], keys[3:4]), reference[3:4], atol=1e-5 * scale)
    order = jnp.array([7, 2, 11])
    np.testing.assert_allclose(run(labels[order], keys[order]), reference[order], atol=1e-5 * scale)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("objective", "name", "total"), [("ddpm", "ddim", 5), ("flow", "heun", 9)])
def test_progress_reports_every_evaluation_once(objective, name, total, devices):
    calls = []
    run = sampler(
        SamplerConfig(name=name, steps=5),
        DiffusionConfig(objective=objective),
        lambda x, t, y: 0.5 * x,
        (2, 2, 1),
        progress=lambda done, total: calls.append((done, total)),
    )
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    shard = jax.NamedSharding(mesh, jax.P("data"))
    run(*jax.device_put((jnp.zeros(8, jnp.int32), jax.random.split(jax.random.key(0), 8)), shard))
    jax.effects_barrier()
    assert sorted(calls) == [(done, total) for done in range(1, total + 1)]
    assert all(type(done) is int for done, _ in calls)


def test_default_samplers_are_those_of_the_objective():
    for objective, name in (("ddpm", "ddpm"), ("flow", "heun")):
        diffusion = DiffusionConfig(objective=objective)
        chosen, named = (make_table(SamplerConfig(name=n, steps=5), diffusion) for n in (None, name))
        np.testing.assert_array_equal(np.array(chosen), np.array(named))


def sit(velocity, start, noise, *, diffusion, last, steps, last_size):
    """SiT's sampler in its own terms: time s from 0 (noise) to 1 (clean), velocity dx/ds, score by its formula.

    `noise(i)` is that of step i; float64.
    """
    forms = {
        "constant": lambda s: 1.0,
        "sigma": lambda s: 1.0 - s,
        "decreasing": lambda s: 0.25 * (np.cos(np.pi * s) + 1.0) ** 2,
        "increasing-decreasing": lambda s: np.sin(np.pi * s) ** 2,
    }

    def drift(x, s, strength):
        v, sigma = velocity(x, s), 1.0 - s
        score = (s * v - x) / (sigma**2 + s * sigma)  # alpha = s and sigma = 1 - s with slopes 1 and -1
        return v + strength * score

    x, step = start, (1.0 - last_size) / (steps - 1)
    for i in range(steps - 1):
        s = i * step
        x = x + step * drift(x, s, forms[diffusion](s)) + np.sqrt(2 * forms[diffusion](s) * step) * noise(i)
    s = 1.0 - last_size
    return x + last_size * drift(x, s, forms[diffusion](s) if last == "mean" else 0.0)


@pytest.mark.parametrize("last", ["mean", "euler"])
@pytest.mark.parametrize("form", ["constant", "sigma", "decreasing", "increasing-decreasing"])
def test_the_sde_is_sits_with_the_same_noise(form, last):
    """To 1e-5, of a denoiser that is not linear."""
    denoise = mixing_denoiser()
    settings = {"steps": 7, "sde_diffusion": form, "sde_last": last, "sde_last_size": 0.1}
    found = draw(SamplerConfig(name="sde", **settings), DiffusionConfig(objective="flow"), denoise, 3, (3, 3, 1))
    keys = jax.random.split(jax.random.key(0), 3)

    def noise(i):
        drawn = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i + 1), (3, 3, 1)))(keys)
        return np.asarray(drawn, np.float64)

    def velocity(x, s):
        return -np.asarray(denoise(jnp.asarray(x, jnp.float32), jnp.full(3, 1000 * (1 - s)), jnp.zeros(3, int)), float)

    wanted = sit(velocity, noise(-1), noise, diffusion=form, last=last, steps=7, last_size=0.1)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(("form", "norm"), [("constant", 0.5), ("sigma", 1.0), ("increasing-decreasing", 2.0)])
def test_the_sde_has_the_moments_of_its_markov_chain(form, norm):
    """Of Gaussian data each step is affine with independent noise, so that both moments are known exactly; with many
    steps (above) they are those of the data."""
    config = SamplerConfig(name="sde", steps=20, sde_diffusion=form, sde_norm=norm)
    images = draw(config, DiffusionConfig(objective="flow"), gaussian("flow"), 600)
    strength = {
        "constant": lambda t: norm,
        "sigma": lambda t: t,
        "increasing-decreasing": lambda t: 2 * np.sin(np.pi * t) ** 2,
    }
    m, v = 0.0, 1.0
    for i in range(20):
        t, size = (1 - 0.96 * i / 19, 0.96 / 19) if i < 19 else (0.04, 0.04)
        variance = (1 - t) ** 2 * STD**2 + t**2
        speed = (t - (1 - t) * STD**2) / variance  # of the velocity: -MEAN + speed (x - (1 - t) MEAN)
        back = strength[form](t) / variance  # of -D score = D (x - (1 - t) MEAN) / variance
        slope = 1 - size * (speed + back)
        m = slope * m + size * (MEAN + (speed + back) * (1 - t) * MEAN)
        v = slope**2 * v + (2 * strength[form](t) * size if i < 19 else 0.0)
    assert_moments(images, m, np.sqrt(v))


@pytest.mark.parametrize(("objective", "name"), SAMPLERS[:-1])
def test_one_step_samples_are_finite(objective, name):
    images = draw(SamplerConfig(name=name, steps=1), DiffusionConfig(objective=objective), gaussian(objective), 2)
    assert np.all(np.isfinite(images)) and np.abs(images - MEAN).max() < 0.5


@pytest.mark.wrong_shapes
def test_what_does_not_fit_is_named():
    diffusion, labels = DiffusionConfig(), jnp.zeros(3, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)

    def run(config=SamplerConfig(steps=3), labels=labels, keys=keys, learn_sigma=False):  # noqa: B008
        sample(config, diffusion, lambda x, t, y: x, (2, 2, 1), labels, keys, null=NULL, learn_sigma=learn_sigma)

    with pytest.raises(ValueError, match=r"as many typed keys .* found conditions int32\[3\] and keys key<fry>\[2\]"):
        run(keys=keys[:2])
    with pytest.raises(ValueError, match=r"typed keys .* uint32\[3\]"):
        run(keys=jnp.zeros(3, jnp.uint32))
    with pytest.raises(ValueError, match="learn_sigma=True does not fit a denoiser with 1 outputs"):
        run(learn_sigma=True)
    with pytest.raises(ConfigError, match=r"sampler\.name must be one of 'ddpm', 'ddim', 'dpm\+\+' .* found 'euler'"):
        run(SamplerConfig(name="euler", steps=3))
    with pytest.raises(ConfigError, match=r"sampler\.steps must be 2 or more with sampler\.name='sde', found 1"):
        make_table(SamplerConfig(name="sde", steps=1), DiffusionConfig(objective="flow"))
