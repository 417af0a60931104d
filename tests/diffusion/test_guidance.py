import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.config import ConfigError, DiffusionConfig, SamplerConfig
from gspn_jax.diffusion import sample
from gspn_jax.diffusion.guidance import guided, guided_steps
from gspn_jax.diffusion.samplers import make_table
from tests.diffusion import gaussian_oracle as oracle

NULL = 3
MEANS = [-1.0, 0.5, 2.0, 0.25]  # three classes and the null class
STD = 0.5


def draw(config, diffusion, denoise, labels, shape=(4, 4, 1), learn_sigma=False, guide=None):
    labels = jnp.asarray(labels, jnp.int32)
    keys = jax.random.split(jax.random.key(0), len(labels))
    step = jax.jit(
        lambda labels, keys: sample(
            config, diffusion, denoise, shape, labels, keys, null=NULL, learn_sigma=learn_sigma, guide=guide
        )
    )
    return np.asarray(step(labels, keys))


def flow_sample(labels, steps=4, **guidance):
    config = SamplerConfig(name="euler", steps=steps, **guidance)
    return draw(config, DiffusionConfig(objective="flow"), oracle.velocity_denoiser(MEANS, STD), labels)


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_scale_moves_the_mean_of_a_gaussian_class_in_proportion(objective, scale):
    """Classes of one width have outputs linear in their mean, so guided samples are those of a class with the mean
    null + scale (class - null), with the same noise: equal to 1e-4.
    """
    labels = [0, 1, 2, 0]
    moved = [MEANS[NULL] + scale * (MEANS[c] - MEANS[NULL]) for c in range(3)] + [0.0]
    diffusion = DiffusionConfig(objective=objective)
    name = "dpm++" if objective == "ddpm" else "heun"
    guided, expected = (
        draw(
            SamplerConfig(name=name, steps=20, guidance_scale=w),
            diffusion,
            oracle.epsilon_denoiser(1000, means, STD) if objective == "ddpm" else oracle.velocity_denoiser(means, STD),
            labels,
        )
        for w, means in ((scale, MEANS), (1.0, moved))
    )
    np.testing.assert_allclose(guided, expected, atol=1e-4)


def test_guided_sample_mean_is_the_closed_form():
    """1,600 values a class: standard error 0.0125; the tolerance of 0.06 also holds 20 steps of discretisation."""
    found = flow_sample([0] * 100 + [2] * 100, steps=50, guidance_scale=2.0)
    np.testing.assert_allclose(found[:100].mean(), 0.25 + 2.0 * (-1.0 - 0.25), atol=0.06)
    np.testing.assert_allclose(found[100:].mean(), 0.25 + 2.0 * (2.0 - 0.25), atol=0.06)
    np.testing.assert_allclose(found[:100].std(), STD, rtol=0.06)


def test_guidance_of_an_interval_that_no_step_visits_is_none():
    """Euler's four steps are at noise times 1, 0.75, 0.5, 0.25."""
    missed = flow_sample([0, 1], guidance_scale=4.0, guidance_interval=(0.8, 0.9))
    np.testing.assert_array_equal(missed, flow_sample([0, 1]))


def test_guidance_acts_inside_its_interval_only():
    found = flow_sample([0, 2], guidance_scale=4.0, guidance_interval=(0.4, 0.75))
    keys = jax.random.split(jax.random.key(0), 2)
    start = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (4, 4, 1)))(keys)
    for image, label in enumerate([0, 2]):
        x = np.asarray(start[image], np.float64)
        for t in (1.0, 0.75, 0.5, 0.25):
            scale = 4.0 if 0.4 <= t <= 0.75 else 1.0
            mean = MEANS[NULL] + scale * (MEANS[label] - MEANS[NULL])
            x0 = oracle.expected_x0(x, 1 - t, t, mean, STD)
            x = x - 0.25 * ((x - (1 - t) * x0) / t - x0)
        np.testing.assert_allclose(found[image], x, atol=1e-5)


def test_ddpm_interval_is_a_fraction_of_the_trained_timesteps():
    """Two DDIM steps of 1000 timesteps are at 0 and 999: an interval of the lower half leaves the first unguided."""
    diffusion = DiffusionConfig()
    means = [0.0, 0.0, 1.0, -1.0]

    def run(interval):
        config = SamplerConfig(name="ddim", steps=2, guidance_scale=3.0, guidance_interval=interval)
        return draw(config, diffusion, oracle.epsilon_denoiser(1000, means, STD), [2])

    both, lower = run((0.0, 1.0)), run((0.0, 0.5))
    assert np.abs(both - lower).max() > 0.1
    np.testing.assert_array_equal(
        guided_steps(
            SamplerConfig(guidance_scale=3.0, guidance_interval=(0.5, 1.0)),
            np.array([1.0, 0.5, 0.49, 0.0]),
            np.ones(4),
            np.ones(4),
        ),
        [True, True, False, False],
    )


def test_outside_the_interval_the_network_runs_on_the_plain_batch():
    """Batch sizes seen while tracing: both branches of the condition, and only the one needed where it is constant."""

    def sizes(**guidance):
        seen = set()
        denoise = oracle.velocity_denoiser(MEANS, STD)
        draw(
            SamplerConfig(name="euler", steps=4, **guidance),
            DiffusionConfig(objective="flow"),
            lambda x, t, y: seen.add(len(x)) or denoise(x, t, y),
            [0, 1, 2],
        )
        return seen

    assert sizes() == {3}
    assert sizes(guidance_scale=2.0) == {6}
    assert sizes(guidance_scale=2.0, guidance_interval=(0.3, 0.6)) == {3, 6}


def test_first_three_channels_are_guided_and_the_rest_is_conditional():
    conditional, unconditional = jax.random.normal(jax.random.key(0), (2, 5, 2, 2, 8))
    first3, every = guided(conditional, unconditional, 4.0, 3), guided(conditional, unconditional, 4.0, 4)
    expected = np.asarray(unconditional + 4.0 * (conditional - unconditional))
    np.testing.assert_allclose(first3[..., :3], expected[..., :3], rtol=1e-6)
    np.testing.assert_array_equal(first3[..., 3:], conditional[..., 3:])
    np.testing.assert_allclose(every[..., :4], expected[..., :4], rtol=1e-6)
    np.testing.assert_array_equal(every[..., 4:], conditional[..., 4:])


@pytest.mark.parametrize(("channels", "guided"), [(4, 3), (1, 1)])
def test_first3_samples_differ_from_all_in_the_fourth_channel_only(channels, guided):
    diffusion = DiffusionConfig()
    denoise = oracle.epsilon_denoiser(1000, MEANS, STD)

    def run(**guidance):
        return draw(SamplerConfig(name="ddim", steps=5, **guidance), diffusion, denoise, [0, 2], (2, 2, channels))

    plain, every = run(), run(guidance_scale=3.0)
    first3 = run(guidance_scale=3.0, guidance_channels="first3")
    np.testing.assert_allclose(first3[..., :guided], every[..., :guided], atol=1e-5)
    np.testing.assert_allclose(first3[..., guided:], plain[..., guided:], atol=1e-5)
    assert np.abs(first3[..., :guided] - plain[..., :guided]).min() > 0.5


def test_variance_comes_from_the_conditional_branch():
    """The null class asks for the other end of the variance range; guidance must not see it."""
    diffusion = DiffusionConfig(timesteps=100)
    epsilon = oracle.epsilon_denoiser(100, [0.3] * 4, STD)

    def denoise(null_range):
        def call(x, t, y):
            ranges = jnp.where(y == NULL, null_range, -1.0)[:, None, None, None]
            return jnp.concatenate([epsilon(x, t, y), jnp.broadcast_to(ranges, x.shape)], -1)

        return call

    config = SamplerConfig(steps=5, guidance_scale=2.0)
    low, high = (draw(config, diffusion, denoise(r), [0, 1], learn_sigma=True) for r in (-1.0, 1.0))
    np.testing.assert_array_equal(low, high)


# --- the interval as noise levels


def test_an_interval_of_noise_levels_is_that_of_times_in_other_units():
    """Euler's four steps are at t = 1, 0.75, 0.5, 0.25, where sigma = t / (1 - t) is infinite, 3, 1, 1/3; an interval
    has its upper end and not its lower one (arXiv 2404.07724, equation 5)."""

    def found(**interval):
        return flow_sample([0, 2], guidance_scale=4.0, **interval)

    np.testing.assert_array_equal(found(guidance_sigmas=(1 / 3, 3.0)), found(guidance_interval=(0.4, 0.75)))
    np.testing.assert_array_equal(found(guidance_sigmas=(0.3, 2.9)), found(guidance_interval=(0.25, 0.5)))
    np.testing.assert_array_equal(found(guidance_sigmas=(0.0, 1e9)), found(guidance_interval=(0.25, 0.75)))


def test_noise_levels_of_a_discrete_schedule_are_those_of_its_products():
    config = SamplerConfig(name="ddim", steps=50, guidance_scale=2.0, guidance_sigmas=(0.28, 2.9))
    table = make_table(config, DiffusionConfig())
    products = oracle.alphas_cumprod(1000)[table.time.astype(int)]
    levels = np.sqrt((1 - products) / products)
    found = guided_steps(config, table.noise_time, table.signal, table.sigma)
    np.testing.assert_array_equal(found, (levels > 0.28) & (levels <= 2.9))
    assert 10 < found.sum() < 40


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"guidance_sigmas": (2.0, 1.0)}, r"sampler.guidance_sigmas must be \(low, high\) with 0 <= low < high"),
        ({"guidance_sigmas": (0.0, 1.0, 2.0)}, r"sampler.guidance_sigmas must be \(low, high\)"),
        ({"guidance_sigmas": (0.1, float("inf"))}, "sampler.guidance_sigmas must be finite, found inf"),
        ({"guidance_sigmas": (1.0, 2.0), "guidance_interval": (0.0, 0.5)}, r"\(0, 1\) beside sampler.guidance_sigmas"),
        ({"guide_step": 3}, "sampler.guide_step must be None without sampler.guide, found 3"),
        ({"guide": ""}, "sampler.guide must be a run directory, or None, found ''"),
        ({"guide": "x", "guide_ema_width": 0.3}, "sampler.guide_ema_width must be greater than 0 and at most 0.2887"),
        ({"guide": "x", "guide_ema": 0.9, "guide_ema_width": 0.1}, "None beside sampler.guide_ema_width, found 0.9"),
    ],
)
def test_wrong_settings_get_one_sentence(fields, said):
    with pytest.raises(ConfigError, match=said):
        SamplerConfig(**fields)


def test_a_sampler_that_tells_no_noise_level_has_no_interval_of_them():
    zeros = np.zeros(3)
    with pytest.raises(ConfigError, match=r"sampler.guidance_sigmas is for samplers with a noise level"):
        guided_steps(SamplerConfig(guidance_scale=2.0, guidance_sigmas=(0.1, 1.0)), zeros, zeros, zeros)


# --- autoguidance

GUIDE_MEANS = [-0.5, 0.0, 1.5, 9.0]  # the null class must not matter


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_a_guide_takes_the_place_of_the_null_class(objective):
    """Classes of one width: guided samples are those of a class with the mean guide + 2.5 (class - guide)."""
    diffusion = DiffusionConfig(objective=objective)
    name = "dpm++" if objective == "ddpm" else "heun"
    moved = [g + 2.5 * (m - g) for m, g in zip(MEANS, GUIDE_MEANS, strict=True)]

    def denoiser(means):
        return (
            oracle.epsilon_denoiser(1000, means, STD) if objective == "ddpm" else oracle.velocity_denoiser(means, STD)
        )

    config = SamplerConfig(name=name, steps=20, guidance_scale=2.5)
    guided_by = draw(config, diffusion, denoiser(MEANS), [0, 1, 2, 0], guide=denoiser(GUIDE_MEANS))
    plain = SamplerConfig(name=name, steps=20)
    np.testing.assert_allclose(guided_by, draw(plain, diffusion, denoiser(moved), [0, 1, 2, 0]), atol=1e-4)


def test_a_guide_acts_inside_the_interval_and_is_evaluated_there_only():
    """Of another width, by a loop of Euler's steps in float64; and the batch is never doubled."""
    wide, seen = 1.25, []
    guide = oracle.velocity_denoiser(GUIDE_MEANS, wide)
    config = SamplerConfig(name="euler", steps=4, guidance_scale=3.0, guidance_interval=(0.4, 0.75))
    main = oracle.velocity_denoiser(MEANS, STD)
    found = draw(
        config,
        DiffusionConfig(objective="flow"),
        lambda x, t, y: seen.append(len(x)) or main(x, t, y),
        [0, 2],
        guide=lambda x, t, y: seen.append(len(x)) or guide(x, t, y),
    )
    assert set(seen) == {2}
    keys = jax.random.split(jax.random.key(0), 2)
    start = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (4, 4, 1)))(keys)
    for image, label in enumerate([0, 2]):
        x = np.asarray(start[image], np.float64)
        for t in (1.0, 0.75, 0.5, 0.25):
            velocities = []
            for mean, std in ((MEANS[label], STD), (GUIDE_MEANS[label], wide)):
                x0 = oracle.expected_x0(x, 1 - t, t, mean, std)
                velocities.append((x - (1 - t) * x0) / t - x0)
            own, other = velocities
            x = x - 0.25 * (other + 3.0 * (own - other) if 0.4 <= t <= 0.75 else own)
        np.testing.assert_allclose(found[image], x, atol=1e-5)


def test_a_guide_without_a_variance_range_guides_a_model_with_one():
    epsilon, other = (oracle.epsilon_denoiser(100, means, STD) for means in (MEANS, GUIDE_MEANS))

    def with_range(x, t, y):
        return jnp.concatenate([epsilon(x, t, y), jnp.full_like(x, 0.3)], -1)

    config, diffusion = SamplerConfig(steps=5, guidance_scale=2.0), DiffusionConfig(timesteps=100)
    one = draw(config, diffusion, with_range, [0, 1], learn_sigma=True, guide=other)
    doubled = draw(
        config,
        diffusion,
        with_range,
        [0, 1],
        learn_sigma=True,
        guide=lambda *inputs: jnp.concatenate([other(*inputs), jnp.full_like(inputs[0], -0.9)], -1),
    )
    np.testing.assert_array_equal(one, doubled)
