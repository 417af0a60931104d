import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.config import DiffusionConfig, SamplerConfig
from gspn_jax.diffusion import sample
from gspn_jax.diffusion.guidance import guide, guided_steps
from tests.diffusion import gaussian_oracle as oracle

NULL = 3
MEANS = [-1.0, 0.5, 2.0, 0.25]  # three classes and the null class
STD = 0.5


def draw(config, diffusion, denoise, labels, shape=(4, 4, 1), learn_sigma=False):
    labels = jnp.asarray(labels, jnp.int32)
    keys = jax.random.split(jax.random.key(0), len(labels))
    step = jax.jit(
        lambda labels, keys: sample(config, diffusion, denoise, shape, labels, keys, null=NULL, learn_sigma=learn_sigma)
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
        guided_steps(SamplerConfig(guidance_scale=3.0, guidance_interval=(0.5, 1.0)), np.array([1.0, 0.5, 0.49, 0.0])),
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
    first3, every = guide(conditional, unconditional, 4.0, 3), guide(conditional, unconditional, 4.0, 4)
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
