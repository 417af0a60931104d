"""Coarse to fine is the published procedure, step by step, on a toy network."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.config import ConfigError
from gspn_jax.diffusion import coarse_to_fine
from gspn_jax.diffusion.scheduler_config import SchedulerConfig
from gspn_jax.tables import STABLE_DIFFUSION_SAMPLERS
from tests.diffusion import numpy_coarse_to_fine

EULER, DDIM, PNDM, DPM = (STABLE_DIFFUSION_SAMPLERS[name] for name in ("euler", "ddim", "pndm", "dpm++"))
SCHEDULER = SchedulerConfig.from_json(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
)
TOLERANCE = 1e-5  # largest error over the largest value, float32 against float64


def toy(xp):
    """A network that is neither linear nor the same at every pixel, time and dilation."""

    def predict(x, time, dilated):
        neighbour = xp.roll(x, 2 if dilated else 1, axis=-3)
        return xp.tanh(0.7 * x - 0.4 * neighbour + time / 2000) + 0.1 * x

    return predict


@pytest.mark.parametrize(("kept", "strength"), [(1, 0.02), (4, 0.38), (10, 1.0)], ids=str)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_every_step_is_that_of_the_published_procedure(kind, kept, strength):
    rng = np.random.default_rng(0)
    z0, noise = rng.standard_normal((2, 2, 6, 5, 4))
    z0 = 0.5 * z0 + rng.standard_normal(4)
    scheduler = dataclasses.replace(SCHEDULER, prediction=kind)
    table = coarse_to_fine.rows(EULER, scheduler, 10, strength)
    assert len(table.time) == kept
    found = coarse_to_fine.refine(
        EULER, scheduler, table, toy(jnp), z0.astype(np.float32), noise.astype(np.float32), sigma=0.8
    )
    for i in range(2):
        truth = numpy_coarse_to_fine.refine(toy(np), z0[i], noise[i], 10, kept, kind=kind, sigma=0.8)
        assert np.abs(found[i] - truth).max() < TOLERANCE * np.abs(truth).max()


def test_a_perfect_network_leaves_the_image_as_it_is():
    """One that knows z0 and the noise: a and b are both on the line between them."""
    rng = np.random.default_rng(1)
    z0, noise = (rng.standard_normal((1, 4, 4, 2)).astype(np.float32) for _ in range(2))
    for sampler in (EULER, DDIM):
        table = coarse_to_fine.rows(sampler, SCHEDULER, 20, 0.5)
        found = coarse_to_fine.refine(sampler, SCHEDULER, table, lambda *_: jnp.asarray(noise), z0, noise)
        np.testing.assert_allclose(found, z0, atol=1e-4)


def test_what_does_not_fit_gets_a_sentence():
    for sampler in (PNDM, DPM):
        with pytest.raises(ConfigError, match="--sampler must be euler or ddim for coarse to fine"):
            coarse_to_fine.rows(sampler, SCHEDULER, 10, 0.5)
    for strength in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"the strength of coarse to fine must be in \(0, 1\], found"):
            coarse_to_fine.rows(EULER, SCHEDULER, 10, strength)
