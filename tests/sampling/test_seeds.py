"""The noise of an image: no two sets of seeds share any, all 64 bits count, and what 64 bits do not hold is refused."""

import jax
import numpy as np
import pytest

from gspn_jax.config import ConfigError, EvalConfig, TrainConfig
from gspn_jax.sampling import seeds

SEEDS = (0, 1, 2, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1)


def keys(seed, count=1000):
    found = jax.jit(seeds.image_keys)(seeds.words(seed), np.arange(count, dtype=np.uint32))
    return np.asarray(jax.random.key_data(found))


def test_no_two_images_of_any_seeds_have_the_same_noise():
    """Image k of seed 1 was image k + 1 of seed 0, and seed 2**32 was seed 0 again."""
    found = np.concatenate([keys(seed) for seed in SEEDS])
    assert len(np.unique(found, axis=0)) == 1000 * len(SEEDS)


def test_a_key_is_that_of_the_number_folded_into_the_seed():
    for seed in (0, 7, 2**32 - 1):  # which JAX's own keys hold
        truth = jax.vmap(lambda n, seed=seed: jax.random.fold_in(jax.random.key(seed), n))(np.arange(5))
        np.testing.assert_array_equal(keys(seed, 5), jax.random.key_data(truth))
    assert seeds.words(2**40 + 3).tolist() == [2**8, 3]


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_a_seed_of_more_than_64_bits_is_refused(seed):
    with pytest.raises(ConfigError, match=rf"--seed must be in 0..2\*\*64-1, found {seed}"):
        seeds.check(seed)


def test_seeds_of_a_config_are_refused_where_bits_would_not_count():
    with pytest.raises(ConfigError, match=r"train\.seed must be 0 or more and below 2"):
        TrainConfig(seed=2**32)
    with pytest.raises(ConfigError, match=r"eval\.seed must be .*, found 18446744073709551616"):
        EvalConfig(seed=2**64)
    with pytest.raises(ConfigError, match=r"noise for 2\*\*32 images, found 4294967297"):
        seeds.check(0, 2**32 + 1)
