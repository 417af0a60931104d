"""Images of prompts from tiny folders with random weights: files, what they say, one image whatever is around it."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from gspn_jax import text_to_image
from gspn_jax.config import ConfigError, MeshConfig
from gspn_jax.parallel import sharding
from gspn_jax.text_to_image import command
from gspn_jax.text_to_image.drawing import Drawing, Settings, check_finite, sampler_of, scheduler_of
from gspn_jax.text_to_image.folder import load_folder
from tests.text_to_image.tiny_folder import ONE, XL, write_folder

LONG = "a dog, " * 80 + "the end"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {"1": write_folder(root / "1", *ONE), "XL": write_folder(root / "XL", *XL)}


def settings(model, **changes) -> Settings:
    given = {
        "size": (16, 24),
        "steps": 2,
        "guidance": 3.0,
        "guidance_rescale": 0.5,
        "sampler": "ddim",
        "scheduler": scheduler_of(model),
    }
    return Settings(**(given | changes))


def draw(model, prompts, *, batch, devices=1, seed=3, **changes):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    with Drawing(model, settings(model, **changes), mesh, seed=seed, batch_size=batch, total=len(prompts)) as drawing:
        parts = [
            drawing.latents(prompts[i : i + drawing.batch_size], range(len(prompts))[i : i + drawing.batch_size])
            for i in range(0, len(prompts), drawing.batch_size)
        ]
    return np.concatenate(parts)


def test_an_image_is_the_same_in_any_batch_and_on_any_mesh(folders):
    model = load_folder(folders["XL"])
    prompts = ["a dog", "two dogs", "a dog"]
    alone = draw(model, prompts, batch=1)
    assert alone.shape == (3, 8, 12, 4) and np.isfinite(alone).all()
    scale = np.abs(alone).max()
    assert min(np.abs(alone[i] - alone[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.1 * scale
    together = draw(model, prompts, batch=2, devices=2)
    assert np.abs(together - alone).max() < 1e-4 * scale


def test_the_command_writes_images_that_say_what_they_are(folders, tmp_path, capsys, caplog):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a dög\n\n{LONG}\n", encoding="utf-8")
    output = tmp_path / "out.png"
    flags = f"--model {folders['1']} --prompts {prompts} --size 16 16 --steps 2 --sampler euler --seed 5"
    flags += f" --batch-size 2 --output {output}"
    with caplog.at_level("WARNING", "gspn_jax"):
        text_to_image.main(flags.split())
    assert [
        record
        for record in caplog.records
        if "longer than the 77 tokens" in record.message and "the end" in record.message
    ]
    assert "2 images in" in capsys.readouterr().out and not output.exists()
    for i, prompt in enumerate(["a dög", LONG]):
        image = Image.open(tmp_path / f"out_{i}.png")
        assert image.size == (16, 16) and image.mode == "RGB"
        said = image.text
        assert said["prompt"] == prompt and said["sampler"] == "euler" and len(said["model_sha256"]) == 64
        assert [json.loads(said[name]) for name in ("seed", "number", "steps", "guidance")] == [5, i, 2, 7.5]
        assert said["version"].startswith("gspn-jax ") and json.loads(said["scheduler"])["prediction"] == "v_prediction"
    with pytest.raises(SystemExit):
        text_to_image.main(flags.split())
    assert "out_0.png exists already" in capsys.readouterr().err


def arguments(**changes):
    given = {"model": "folder", "prompt": ("a dog",), "output": "dog.png"}
    return command.Arguments(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "--prompt or --prompts FILE must say what to draw, found neither"),
        ({"prompts": "a.txt"}, "found both"),
        ({"output": "dog.jpg"}, r"--output must end in \.png, found 'dog\.jpg'"),
        ({"size": (0, 16)}, "--size must be multiples of 8, found 0 16"),
        ({"size": (17, 16)}, "--size must be multiples of 8, found 17 16"),
        ({"steps": 0}, "--steps must be 1 or more, found 0"),
        ({"guidance": -1.0}, "--guidance must be 0 or more, found -1"),
        ({"guidance_rescale": 1.5}, r"--guidance-rescale must be in \[0, 1\], found 1\.5"),
        ({"sampler": "heun"}, r"--sampler must be one of euler, ddim, pndm, dpm\+\+, found 'heun'"),
        ({"sampler": "pndm", "karras": True}, r"--karras is for the samplers euler and dpm\+\+, found pndm"),
        ({"seed": -1}, r"--seed must be in 0\.\.2\*\*64-1"),
    ],
)
def test_flags_that_are_wrong_get_a_sentence(changes, message):
    with pytest.raises(ConfigError, match=message):
        arguments(**changes)


def test_what_a_model_does_not_take_gets_a_sentence(folders, tmp_path):
    output, folder = str(tmp_path / "dog.png"), str(folders["1"])
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for changes, message in (
        ({"size": (16, 16)}, "--sampler must be given, one of euler, .*, found None"),
        ({"prompt": (), "prompts": str(empty)}, "--prompts must be a file with a prompt on each line, found none"),
        ({"sampler": "ddim", "steps": 1001, "size": (16, 16)}, "--steps must be between 1 and the model's 1000"),
    ):
        with pytest.raises(ConfigError, match=message):
            command.run(arguments(model=folder, output=output, **changes))
    with pytest.raises(FileNotFoundError, match=r"model_index\.json must exist"):
        command.run(arguments(model=str(tmp_path), output=output))
    assert not list(tmp_path.glob("*.png"))


def test_the_folder_says_which_sampler_and_which_timesteps(folders):
    said = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "steps_offset": 0}
    one, xl = (load_folder(folders[kind])._replace(scheduler=said) for kind in ("1", "XL"))
    assert sampler_of(one) == "euler" and scheduler_of(one).spacing == "trailing"
    assert (scheduler_of(one).steps_offset, scheduler_of(xl).steps_offset) == (1, 0)  # as diffusers' pipelines
    changed = scheduler_of(xl, spacing="leading", karras=True)
    assert changed.spacing == "leading" and changed.karras and not scheduler_of(xl, karras=None).karras


def test_latents_that_are_not_finite_get_a_sentence():
    latents = np.zeros((2, 1, 1, 4), np.float32)
    check_finite(latents, [4, 5])
    latents[1, 0, 0, 2] = np.nan
    with pytest.raises(ConfigError, match="image 5 must have finite latents, found NaN"):
        check_finite(latents, [4, 5])
