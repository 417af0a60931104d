"""Images coarse to fine: sizes, the plan of memory, and whole levels against NumPy networks."""

import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

from gspn_jax import text_to_image
from gspn_jax.config import ConfigError
from gspn_jax.sampling import seeds
from gspn_jax.text_to_image.conditions import condition_of, null_condition
from gspn_jax.text_to_image.drawing import Settings, scheduler_of, start_noise
from gspn_jax.text_to_image.folder import load_folder
from gspn_jax.text_to_image.high_resolution import Level, Refinement, RefineOptions, enlarged, make_levels
from tests.autoencoder import numpy_vae
from tests.diffusion import numpy_coarse_to_fine
from tests.text_to_image.tiny_folder import ONE, VAE, XL, write_folder, write_json
from tests.unet import numpy_unet


def write(folder, unet, texts):
    """A folder of a U-Net that was trained on 16 x 16 pixels, sampled by Euler."""
    write_folder(folder, unet, texts)
    config = json.loads((folder / "unet/config.json").read_text())
    write_json(folder / "unet/config.json", config | {"sample_size": 8})
    write_json(
        folder / "scheduler/scheduler_config.json",
        {
            "_class_name": "EulerDiscreteScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "timestep_spacing": "leading",
            "steps_offset": 1,
        },
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("folders") / "XL", *XL)


def test_levels_are_the_published_ones():
    first, levels = make_levels((8192, 16384), 1024, 8, RefineOptions(), 2)
    assert first == (512, 1024)
    assert levels == (
        Level((1024, 2048), 50, 0.42),
        Level((2048, 4096), 50, 0.32),
        Level((4096, 8192), 30, 0.32),
        Level((8192, 16384), 30, 0.28),
    )
    assert make_levels((2048, 2048), 512, 8, RefineOptions(), 1) == (
        (512, 512),
        (Level((1024, 1024), 50, 0.56), Level((2048, 2048), 50, 0.48)),
    )
    options = RefineOptions(steps=(7,), strengths=(0.5, 0.25))
    assert [level[1:] for level in make_levels((64, 64), 16, 2, options, 1)[1]] == [(7, 0.5), (7, 0.25)]


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((72, 64), {}, r"--size must be multiples of 16 to be drawn in 3 doublings, found 72 64"),
        ((64, 64), {"strengths": (0.5,) * 3}, r"--refine\.strengths must have an entry for all, or one for each of 2"),
        ((64, 64), {"steps": (0,)}, r"--refine\.steps must be 1 or more"),
        ((64, 64), {"strengths": (1.5,)}, r"--refine\.strengths must be in \(0, 1\]"),
        ((64, 64), {"blur": 0.0}, r"--refine\.blur must be greater than 0"),
        ((64, 64), {"pieces": 0}, r"--refine\.pieces must be 1 or more"),
    ],
)
def test_sizes_and_options_that_do_not_fit_get_a_sentence(size, options, message):
    with pytest.raises(ConfigError, match=message):
        make_levels(size, 16, 2, RefineOptions(**options), 1)


@pytest.mark.slow
def test_a_level_is_the_published_procedure_with_the_published_networks(folder):
    """All of it but the text towers and PIL's bicubic again in float64: to a grey level."""
    model = load_folder(folder)
    settings = Settings((16, 20), 4, 2.0, 0.5, "euler", scheduler_of(model), "blurry")
    level, options = Level((16, 20), 4, 0.5), RefineOptions(blur=0.7, pieces=3, skips_on_host=True)
    refinement = Refinement(model, settings, (level,), options, seed=5, tile=16, device=jax.devices()[0])
    small = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    called = []
    found = refinement("a dog", small, 3, lambda: called.append(1))
    assert refinement.calls == len(called) == 2 * 2 * 2  # steps, predictions, guidance

    unet_weights, vae_weights = numpy_unet.random_state_dict(XL[0]), numpy_vae.random_state_dict(VAE)
    conditions = [condition_of(model.texts, ["a dog"]), null_condition(model.texts, "blurry", zero=True)]
    conditions = (
        [conditions[0]["context"][0], conditions[0]["pooled"][0]],
        [conditions[1]["context"], conditions[1]["pooled"]],
    )

    def predict(x, time, dilated):
        outputs = [
            numpy_unet.apply(
                unet_weights, XL[0], x.transpose(2, 0, 1), time, context, pooled, [16, 20, 0, 0, 16, 20],
                dilation=2 if dilated else 1,
            ).transpose(1, 2, 0)
            for context, pooled in conditions
        ]  # fmt: skip
        guided = outputs[1] + 2.0 * (outputs[0] - outputs[1])
        return guided * (0.5 * outputs[0].std() / guided.std() + 0.5)

    large = enlarged(small, (16, 20)) / 127.5 - 1
    moments = numpy_vae.encode(vae_weights, VAE, large.transpose(2, 0, 1)).transpose(1, 2, 0)
    noise = np.asarray(start_noise(seeds.words(5), np.array([3], np.uint32), (8, 10, 4), draw=1))[0]
    truth = numpy_coarse_to_fine.refine(predict, 0.13025 * moments[..., :4], noise.astype(np.float64), 4, 2, sigma=0.7)
    pixels = numpy_vae.decode(vae_weights, VAE, truth.transpose(2, 0, 1) / 0.13025).transpose(1, 2, 0)
    pixels = np.clip(127.5 * pixels + 128, 0, 255)
    assert pixels.std() > 10 and np.abs(found - pixels + 0.5).max() < 0.6


@pytest.mark.slow
def test_the_command_prints_its_plan_and_draws_the_same_image_again(folder, tmp_path, capsys):
    flags = f"--model {folder} --prompt dog --size 32 64 --steps 2 --refine.steps 2 --refine.strengths 0.5 --mixer gspn"
    flags += " --gspn.proxy-ratio 4"
    images = []
    for name in ("first", "second"):
        text_to_image.main(f"{flags} --output {tmp_path / name}.png".split())
        images.append(Image.open(tmp_path / f"{name}.png"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("memory planned, GB (1e9 bytes) on one device")
    assert [line.split(":")[0] for line in said[1:3]] == ["16x32", "32x64"]
    assert "decoding a tile of the autoencoder" in said[4] and said[5].startswith("the most is ")
    np.testing.assert_array_equal(*map(np.asarray, images))
    assert images[0].size == (64, 32) and json.loads(images[0].text["drawn_at"]) == [8, 16]
    assert [level["size"] for level in json.loads(images[0].text["levels"])] == [[16, 32], [32, 64]]


def test_other_samplers_and_several_sizes_get_a_sentence(folder, tmp_path, capsys):
    common = f"--model {folder} --prompt dog --output {tmp_path / 'dog.png'} --coarse-to-fine True"
    for flags, message in (
        ("--size 32 32 --sampler pndm", "--sampler must be euler or ddim for coarse to fine"),
        ("--size 34 32", "--size must be multiples of 8 to be drawn in 2 doublings"),
    ):
        with pytest.raises(SystemExit):
            text_to_image.main(f"{common} {flags}".split())
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_what_is_planned_grows_with_the_size_and_shrinks_with_pieces(folder):
    model = load_folder(folder)
    settings = Settings((64, 64), 2, 1.0, 0.0, "ddim", scheduler_of(model))

    def working(size, **options):
        level = Level(size, 2, 0.5)
        options = RefineOptions(**options)
        found = Refinement(model, settings, (level,), options, seed=0, tile=8, device=jax.devices()[0]).plan()
        assert [stage.name.partition(":")[0] for stage in found[1:]] == [
            "encoding a tile of the autoencoder", "decoding a tile of the autoencoder",
        ]  # fmt: skip
        assert found[0].weights == sum(value.nbytes for value in model.unet.values())
        return found[0].working

    small, large = working((32, 32), pieces=1), working((64, 64), pieces=1)
    assert 3 < large / small < 20 and math.isfinite(large)


@pytest.mark.slow
def test_stable_diffusion_1_is_refined_without_pooled_text(tmp_path):
    folder = write(tmp_path / "1", *ONE)
    output = tmp_path / "dog.png"
    flags = f"--model {folder} --prompt dog --size 32 32 --steps 2 --refine.steps 2 --refine.strengths 0.5"
    text_to_image.main(f"{flags} --output {output}".split())
    assert np.asarray(Image.open(output)).shape == (32, 32, 3)  # read, and so closed
