"""Tiles of the autoencoder: they cover the image, blend to 1, and are the untiled network where one tile fits."""

import jax
import numpy as np
import pytest

from gspn_jax.autoencoder import TiledAutoencoder, decode, encode, from_state_dict
from gspn_jax.autoencoder.tiles import places
from gspn_jax.pixels import from_uint8, to_uint8
from tests.autoencoder.numpy_vae import TINY, random_state_dict


@pytest.mark.parametrize("finer", [1, 3])
@pytest.mark.parametrize(("length", "side"), [(5, 8), (8, 8), (9, 8), (14, 8), (15, 8), (200, 64), (97, 5)], ids=str)
def test_tiles_cover_every_position_and_their_weights_sum_to_1(length, side, finer):
    found = places(length, side, finer)
    total = np.zeros(finer * length)
    for start, weight in found.each:
        assert 0 <= start <= length - found.side and weight.shape == (finer * found.side,) and weight.min() >= 0
        total[finer * start : finer * (start + found.side)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    shared = [before + found.side - after for before, after in zip(found.starts, found.starts[1:], strict=False)]
    assert found.starts[0] == 0 and found.starts[-1] == length - found.side
    assert all(overlap >= found.side // 4 for overlap in shared)


def test_tiles_that_fit_exactly_are_spaced_and_blended_as_in_diffusers():
    found = places(8 + 2 * 6, 8, finer=2)
    assert found.starts == (0, 6, 12)
    ramp = np.arange(4) / 4
    np.testing.assert_allclose(found.weights[1], [*ramp, *np.ones(8), *(1 - ramp)])
    np.testing.assert_allclose(found.weights[0][-4:], 1 - ramp)


@pytest.fixture(scope="module")
def params():
    return from_state_dict(random_state_dict(), TINY)


def test_one_tile_is_the_untiled_network(params):
    rng, tiled = np.random.default_rng(0), TiledAutoencoder(params, TINY, 8)
    latents = rng.standard_normal((5, 8, 4)).astype(np.float32)
    whole = jax.jit(decode, static_argnums=1)(params, TINY, latents[None] / TINY.scaling_factor)[0]
    difference = tiled.decode(latents).astype(int) - np.asarray(to_uint8(whole))
    assert np.abs(difference).max() <= 1
    image = rng.integers(0, 256, (10, 16, 3), np.uint8)
    mean = jax.jit(encode, static_argnums=1)(params, TINY, from_uint8(image[None]))[0, ..., :4]
    np.testing.assert_allclose(tiled.encode(image), mean * TINY.scaling_factor, rtol=1e-5, atol=1e-6)


def test_tiles_are_the_networks_own_outputs_blended(params):
    rng, tiled = np.random.default_rng(1), TiledAutoencoder(params, TINY, 8)
    latents = rng.standard_normal((11, 19, 4)).astype(np.float32)
    run, truth = jax.jit(decode, static_argnums=1), np.zeros((22, 38, 3))
    rows, columns = places(11, 8, 2), places(19, 8, 2)
    for top, by_row in rows.each:
        for left, by_column in columns.each:
            part = latents[None, top : top + 8, left : left + 8] / TINY.scaling_factor
            pixels = np.asarray(run(params, TINY, part)[0], np.float64)
            for i, j in np.ndindex(16, 16):
                truth[2 * top + i, 2 * left + j] += by_row[i] * by_column[j] * pixels[i, j]
    found = tiled.decode(latents)
    assert found.shape == (22, 38, 3) and np.abs(found - np.clip(127.5 * truth + 127.5, 0, 255)).max() < 1
    moments = tiled.encode(found)
    assert moments.shape == (11, 19, 4) and np.isfinite(moments).all()
    assert tiled.memory(11, 19)["decode"].temp_size_in_bytes > 0
    with pytest.raises(ValueError, match="the side of a tile must be 4 or more, found 3"):
        TiledAutoencoder(params, TINY, 3)
