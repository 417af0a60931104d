"""A CLIP is read from transformers' and OpenCLIP's folders alike, sees images as Pillow scales them, and scores them
beside their captions; mistakes get a sentence."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file, save_file

from gspn_jax import evaluate, text
from gspn_jax.text import TextConfig
from gspn_jax.text.clip import load_clip
from gspn_jax.text.vision import DEVIATION, MEAN, VisionConfig, expected_shapes, preprocess
from tests.prepare.captioned import CAPTIONS
from tests.text import numpy_clip
from tests.text.tiny_clip import IMAGE, TEXT, random_state_dict, write_folder, write_open_clip_folder

SIZES = {
    # image tower, text tower and their sum with the logit scale
    "L": (VisionConfig(), dataclasses.replace(text.CLIP_L, projection=768), 427_616_513),
    "H": (
        VisionConfig(width=1280, layers=32, heads=16, hidden=5120, projection=1024),
        dataclasses.replace(text.OPENCLIP_H, layers=24, projection=1024),
        986_109_441,
    ),
    "g": (
        VisionConfig(width=1408, layers=40, heads=16, hidden=6144, projection=1024),
        TextConfig(width=1024, layers=24, heads=16, hidden=4096, projection=1024),
        1_366_678_273,
    ),
    "bigG": (
        VisionConfig(width=1664, layers=48, heads=16, hidden=8192, projection=1280),
        text.OPENCLIP_BIGG,
        2_539_567_105,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return write_folder(tmp_path_factory.mktemp("clip") / "clip")


@pytest.mark.parametrize("name", SIZES)
def test_the_towers_have_as_many_parameters_as_are_published(name):
    image, words, total = SIZES[name]
    shapes = [*expected_shapes(image).values(), *text.expected_shapes(words).values()]
    assert sum(map(math.prod, shapes)) + 1 == total


@pytest.mark.parametrize(("height", "width"), [(28, 28), (40, 33), (31, 90), (17, 20), (300, 257)])
def test_images_are_scaled_as_by_pillow(height, width):
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    short = min(height, width)
    scaled = Image.fromarray(image)
    if short != 28:
        scaled = scaled.resize((28 * width // short, 28 * height // short), Image.Resampling.BICUBIC)
    left, top = (round((side - 28) / 2) for side in scaled.size)
    truth = np.asarray(scaled)[top : top + 28, left : left + 28].astype(int)
    found = np.asarray(preprocess(image[None], 28))[0] * DEVIATION + MEAN
    levels = np.rint(255 * found).astype(int)
    assert np.abs(255 * found - levels).max() < 1e-3
    assert np.abs(levels - truth).max() <= 1 and (levels == truth).mean() > 0.999  # Pillow's weights have 22 bits


def test_both_kinds_of_folder_hold_the_same_network(folder, tmp_path):
    ours, theirs = load_clip(folder), load_clip(write_open_clip_folder(tmp_path / "open_clip"))
    assert ours.vision_config == theirs.vision_config == IMAGE and ours.text_config == theirs.text_config == TEXT
    for name in ("vision", "text"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.keys() == other.keys()
        for part in one:
            np.testing.assert_array_equal(one[part], other[part], err_msg=part)
    assert ours.digest(ours.vision) == theirs.digest(theirs.vision)


def images_with_captions(root: pathlib.Path, prompts: bool) -> pathlib.Path:
    root.mkdir()
    rng = np.random.default_rng(1)
    for i, caption in enumerate(CAPTIONS):
        info = PngImagePlugin.PngInfo()
        if prompts:
            info.add_itxt("prompt", caption)
        Image.fromarray(rng.integers(0, 256, (36, 36, 3), np.uint8)).save(root / f"out_{i}.png", pnginfo=info)
    return root


def flags(folder, images, **options) -> list[str]:
    given = {"metrics": "clip", "networks": f"clip={folder}", "batch-size": 2} | options
    words = [word for name, value in given.items() if value for word in (f"--{name}", str(value))]
    return ["--samples", str(images), *words]


@pytest.mark.parametrize("kind", ["prompts", "file"])
def test_the_score_is_that_of_its_formula(folder, tmp_path, kind, capsys):
    """Images in batches of 8 devices, in the shuffled order in which they are scored, one of them bad and left out."""
    images = images_with_captions(tmp_path / "images", kind == "prompts")
    options: dict = {}
    if kind == "file":
        (tmp_path / "captions.json").write_text(json.dumps({f"out_{i}": text for i, text in enumerate(CAPTIONS)}))
        (images / "out_2.png").write_bytes(b"no image")
        options = {"captions": tmp_path / "captions.json", "bad-images": "skip"}
    evaluate.main(flags(folder, images, **options))
    result = json.loads((tmp_path / "images.json").read_text())
    assert "CLIP score" in capsys.readouterr().out

    clip, weights, scores = load_clip(folder), random_state_dict(), []
    for i in [0, 1, 2, 3, 4] if kind == "prompts" else [0, 1, 3, 4]:
        pixels = np.asarray(Image.open(images / f"out_{i}.png"))[None]
        image = np.asarray(clip.network(clip.vision, jax.jit(clip.resize)(pixels)), np.float64)[0]
        ids = clip.tokenizer([f"A photo depicts {CAPTIONS[i].strip()}"]).ids[0]
        words = numpy_clip.encode(weights, TEXT, ids)[2]
        scores.append(100 * max(image @ words / np.linalg.norm(words), 0))
    assert min(scores) < max(scores) and len({round(score, 3) for score in scores}) > 2
    assert result["metrics"]["clip"] == pytest.approx(np.mean(scores), rel=1e-4)
    assert result["samples"]["count"] == len(scores) and len(result["settings"]["clip_sha256"]) == 64
    told = result["samples"]["captions"]
    assert told == "the prompts in the images" if kind == "prompts" else len(told["sha256"]) == 64


def test_a_mistake_gets_one_sentence(folder, tmp_path, capsys):
    images = images_with_captions(tmp_path / "images", prompts=False)
    (tmp_path / "few.json").write_text('{"out_0": "a dog"}')
    whole = tmp_path / "all.json"
    whole.write_text(json.dumps({f"out_{i}": "a dog" for i in range(5)}))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    other = tmp_path / "other"
    write_folder(other)
    tensors = load_file(other / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, other / "model.safetensors")
    for given, said in (
        (flags(folder, images), "every image must have a caption in it as a prompt, or in a file --captions for"),
        (flags(folder, images, captions=tmp_path / "few.json"), "found none of 4, such as"),
        (flags(folder, images, captions="absent.json"), "--captions must be a file of .parquet, .json, .jsonl"),
        (
            flags(folder, tmp_path / "images.npz"),
            "--metrics clip is of a folder of images with captions, found an .npz",
        ),
        (flags(folder, images, captions="a.json", metrics="fid"), "--captions is for --metrics clip, found fid"),
        (
            flags(tmp_path, images, captions=whole),
            "--networks clip=FILE must be a folder of CLIP as transformers or OpenCLIP write it",
        ),
        (flags(other, images, captions=whole), "weights of the image tower must have 'visual_projection.weight'"),
        (flags(folder, images, fit="lanczos"), "--fit lanczos needs --image-size, found none"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(given)
        assert stopped.value.code == 2 and said in (found := " ".join(capsys.readouterr().err.split())), found
