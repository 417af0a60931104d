"""Agreement with diffusers' AutoencoderKL on shared random weights."""

import jax
import numpy as np
import pytest

from gspn_jax.autoencoder import AutoencoderConfig, TiledAutoencoder, decode, encode, from_state_dict, load, model
from tests.autoencoder.numpy_vae import TINY, random_state_dict

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

TOLERANCE = 1e-4  # largest error over the largest output, float32 against float32


def diffusers_autoencoder(config: AutoencoderConfig, weights):
    diffusers = pytest.importorskip("diffusers")
    import torch

    levels = len(config.channels)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    theirs.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return theirs.eval()


SIZES = pytest.mark.parametrize(
    ("config", "side"),
    [(TINY, 8), pytest.param(AutoencoderConfig(), 64, marks=pytest.mark.slow)],
    ids=["tiny", "full size"],
)


@SIZES
def test_moments_and_images_are_those_of_diffusers(config, side, tmp_path):
    weights = random_state_dict(config)
    theirs = diffusers_autoencoder(config, weights)
    import torch

    params = from_state_dict(weights, config)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    latents = rng.standard_normal((2, side // config.factor, side // config.factor, 4), np.float32)
    with torch.no_grad():
        moments = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist.parameters
        decoded = theirs.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample
    for ours, truth in (
        (jax.jit(encode, static_argnums=1)(params, config, images), moments),
        (jax.jit(decode, static_argnums=1)(params, config, latents), decoded),
    ):
        truth = truth.numpy().transpose(0, 2, 3, 1)
        assert ours.shape == truth.shape
        assert np.abs(np.asarray(ours) - truth).max() < TOLERANCE * np.abs(truth).max()


@SIZES
def test_every_layer_and_block_gives_what_that_of_diffusers_gives(config, side, monkeypatch):
    """By name, from one image and one latent that go through both networks whole: what each layer, residual block,
    attention, down- and upsampler and middle gives, as it is fed there."""
    import torch
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D

    weights, ours, theirs = random_state_dict(config), {}, {}

    def recorded(function):
        def record(params, name, *rest, **options):
            ours[name] = out = function(params, name, *rest, **options)
            return out

        return record

    for name in ("_conv", "_linear", "_group_norm", "_residual", "_middle", "_attention"):
        monkeypatch.setattr(model, name, recorded(getattr(model, name)))
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    latents = rng.standard_normal((1, side // config.factor, side // config.factor, 4), np.float32)
    params = from_state_dict(weights, config)
    encode(params, config, images)
    decode(params, config, latents)

    network = diffusers_autoencoder(config, weights)
    for name, module in network.named_modules():
        if list(module.parameters(recurse=False)) or isinstance(module, (Attention, ResnetBlock2D, UNetMidBlock2D)):
            module.register_forward_hook(lambda _, inputs, out, name=name: theirs.update({name: out.numpy()}))
    with torch.no_grad():
        network.encode(torch.tensor(images.transpose(0, 3, 1, 2)))
        network.decode(torch.tensor(latents.transpose(0, 3, 1, 2)))
    assert ours.keys() == theirs.keys()
    for name, truth in theirs.items():
        channels_first = truth.ndim == 4 or name.endswith("group_norm")  # attention's linears see [B, N, C]
        truth = np.moveaxis(truth, 1, -1) if channels_first else truth
        error = np.abs(np.asarray(ours[name]).reshape(truth.shape) - truth).max()
        assert error < TOLERANCE * np.abs(truth).max(), f"{name}: {error:.2g} of {np.abs(truth).max():.2g}"


def test_tiles_that_fit_exactly_are_those_of_diffusers():
    """Tiles of 8 latents, a quarter shared: 8, 14 and 20 positions are one, two and three of them."""
    weights = random_state_dict()
    theirs = diffusers_autoencoder(TINY, weights)
    import torch

    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 8, 16
    ours = TiledAutoencoder(from_state_dict(weights, TINY), TINY, 8)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (28, 40, 3), np.uint8)
    pixels = torch.tensor((image / 127.5 - 1).astype(np.float32).transpose(2, 0, 1)[None])
    with torch.no_grad():
        mean = theirs.encode(pixels).latent_dist.mean[0].permute(1, 2, 0).numpy() * TINY.scaling_factor
        decoded = theirs.decode(torch.tensor(mean.transpose(2, 0, 1)[None]) / TINY.scaling_factor).sample[0]
    found = ours.encode(image)
    # Theirs has one more tile along each axis, of the last 2 positions alone; and where four tiles meet it blends the
    # upper right one twice, as it blends in place.
    rows, columns = np.arange(12) // 2 == 3, np.isin(np.arange(18) // 2, (3, 6))
    compared = ~(rows[:, None] & columns)
    assert np.abs(found - mean)[:12, :18][compared].max() < TOLERANCE * np.abs(mean).max()
    truth = np.clip(127.5 * decoded.permute(1, 2, 0).numpy() + 127.5, 0, 255)
    compared = compared.repeat(2, axis=0).repeat(2, axis=1)
    assert np.abs(ours.decode(mean) - truth)[:24, :36][compared].max() < 0.6


@pytest.mark.parametrize("safe", [True, False])
def test_files_that_diffusers_writes_load(tmp_path, safe):
    weights = random_state_dict()
    diffusers_autoencoder(TINY, weights).save_pretrained(tmp_path, safe_serialization=safe)
    (path,) = [path for path in tmp_path.iterdir() if path.suffix != ".json"]
    params, config = load(path)
    expected = from_state_dict(weights, TINY)
    assert config == TINY and params.keys() == expected.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
