"""Images with captions are read from what people have, encoded as the model encodes them, and survive a kill to the
byte; mistakes get a sentence."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from gspn_jax import prepare
from gspn_jax.config import ConfigError
from gspn_jax.data.captioned_latents import CaptionedLatents, CaptionMetadata, make_loader
from gspn_jax.data.captions import open_folder, open_tars
from gspn_jax.data.decoding import DataError, corner_of, fit_image
from gspn_jax.data.set_metadata import METADATA
from gspn_jax.files import sha256_of
from gspn_jax.prepare import captions as prepare_captions
from gspn_jax.prepare import shards
from gspn_jax.text_to_image.conditions import encode_prompts
from gspn_jax.text_to_image.folder import load_folder
from tests.autoencoder import numpy_vae
from tests.prepare.captioned import LEFT_OUT, in_order, make_files, make_folder, make_tars
from tests.text_to_image.tiny_folder import ONE, VAE, XL, write_folder

SIDE = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    return make_folder(tmp_path_factory.mktemp("captioned") / "images")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("models")
    return {"1": write_folder(root / "1", *ONE), "XL": write_folder(root / "XL", *XL)}


def flags(model, output, **options) -> list[str]:
    options = {"model": model, "output": output, "image_size": SIDE, "shard_size": 2, "batch_size": 2, **options}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return ["captions", *(word for pair in pairs for word in pair)]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def prepared(models, images, tmp_path_factory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("prepared") / "XL"
    prepare.main(flags(models["XL"], output, images=images))
    return output


def test_every_form_gives_the_same_captions(images, tmp_path):
    beside = open_folder(str(images), SIDE)
    assert [beside[i]["caption"] for i in range(5)] == in_order()
    assert beside.left_out == LEFT_OUT
    tars = open_tars(str(make_tars(tmp_path / "tars", images)), SIDE)
    assert [tars[i]["caption"] for i in range(5)] == in_order()
    assert tars.left_out == {"images without a caption": 1, "captions without an image": 1}
    for path in make_files(tmp_path, images):
        listed = open_folder(str(images), SIDE, captions=str(path))
        assert [listed[i]["caption"] for i in range(5)] == in_order(), path
        assert listed.left_out.get("further captions of an image", 0) == (path.name == "coco.json")
        assert listed.left_out["images without a caption"] == 1
    for i in range(5):
        for name in ("image", "sizes"):
            np.testing.assert_array_equal(beside[i][name], tars[i][name])


def test_sizes_tell_the_original_and_the_crop(images):
    """An image of 31x20 is scaled to 12x8 (half of it first, then 8/10) and cropped from its third row on."""
    source = open_folder(str(images), SIDE)
    assert source[1]["sizes"].tolist() == [31, 20, 2, 0, SIDE, SIDE]
    rng = np.random.default_rng(0)
    for height, width in ((31, 20), (64, 97), (8, 8), (300, 1000), (9, 8), (8, 17)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        top, left = corner_of(height, width, 8)
        small = image
        while min(small.size) >= 16:
            small = small.resize((small.width // 2, small.height // 2), Image.Resampling.BOX)
        scaled = [round(side * 8 / min(small.size)) for side in small.size]
        kept = np.asarray(small.resize(scaled, Image.Resampling.BICUBIC))[top : top + 8, left : left + 8]
        np.testing.assert_array_equal(kept, fit_image(image, 8, 3))


@pytest.mark.parametrize("kind", [pytest.param("1", marks=pytest.mark.slow), "XL"])
def test_records_are_what_the_model_encodes(kind, models, images, prepared, tmp_path, capsys):
    output = prepared
    if kind == "1":
        output = tmp_path / "1"
        prepare.main(flags(models["1"], output, images=images))
        said = capsys.readouterr().out
        assert "5 images with captions in" in said and "longer than the 77 tokens that are read: 1" in said
    source, model = CaptionedLatents(str(output)), load_folder(models[kind])
    texts = encode_prompts(model.texts, in_order())
    originals, weights = open_folder(str(images), SIDE), numpy_vae.random_state_dict(VAE)
    assert len(source) == 5
    for i in range(5):
        record = source[i]
        truth = {
            "moments": numpy_vae.encode(weights, VAE, originals[i]["image"].transpose(2, 0, 1) / 127.5 - 1),
            "context": np.asarray(texts.context[i]),
        }
        truth["moments"] = truth["moments"].transpose(1, 2, 0)[None]
        if kind == "XL":
            truth["pooled"] = np.asarray(texts.pooled[i])
            np.testing.assert_array_equal(record.pop("sizes"), originals[i]["sizes"])
        assert record.keys() == truth.keys()
        for name, value in truth.items():
            # float16 keeps 11 bits: half of 2**-10 of a value, on top of 1e-4 of the largest
            tolerance = 2**-11 * np.abs(value) + 1e-4 * np.abs(value).max()
            assert (np.abs(record[name] - value) <= tolerance).all(), name
    about = json.loads((output / METADATA).read_text())
    assert (about["count"], about["cut"], about["left_out"]) == (5, 1, LEFT_OUT)
    assert about["scaling_factor"] == 0.13025 and about["latent_shape"] == [4, 4, 4]
    assert about["context_shape"] == [77, sum(part.config.width for part in model.texts)]
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert about["files"][vae] == sha256_of(models[kind] / vae)
    assert {"text_encoder/model.safetensors", "tokenizer/vocab.json", "vae/config.json"} < about["files"].keys()
    assert ("text_encoder_2/model.safetensors" in about["files"]) == (kind == "XL")


def test_what_is_interrupted_goes_on_and_ends_in_the_same_bytes(models, images, prepared, tmp_path, monkeypatch):
    """Ended within its second shard, as by a kill, then shared by two hosts; and from tars."""
    output, taken = tmp_path / "parts", []
    take = shards._Reading.take

    def stop(self, decoded, count):
        taken.append(count)
        if len(taken) == 2:
            raise KeyboardInterrupt
        return take(self, decoded, count)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards._Reading, "take", stop)
        prepare_captions.prepare_captions(
            prepare_captions.Captions(
                model=str(models["XL"]),
                images=str(images),
                output=str(output),
                image_size=SIDE,
                shard_size=2,
                batch_size=2,
            )
        )
    first = output / "captions-00000-of-00003.array_record"
    before = first.stat().st_mtime_ns
    assert not (output / METADATA).exists()
    for host in (0, 1, 0):
        prepare.main(flags(models["XL"], output, images=images, num_hosts=2, host=host))
    assert contents(output) == contents(prepared) and first.stat().st_mtime_ns == before
    prepare.main(flags(models["XL"], tmp_path / "tars_out", tars=make_tars(tmp_path / "tars", images)))
    for name, content in contents(prepared).items():
        assert name == METADATA or (tmp_path / "tars_out" / name).read_bytes() == content


def test_the_stream_of_batches_depends_on_the_seed_and_the_step_alone(prepared):
    source = CaptionedLatents(str(prepared))
    with make_loader(source, batch_size=4, seed=3) as loader:
        whole = [next(loader) for _ in range(3)]
    assert {name: (value.shape, str(value.dtype)) for name, value in whole[0].items()} == {
        "image": ((4, 4, 4, 4), "float32"),
        "context": ((4, 77, 20), "float16"),
        "pooled": ((4, 10), "float16"),
        "sizes": ((4, 6), "int32"),
    }
    with make_loader(source, batch_size=4, seed=3, start_step=2) as loader:
        again = next(loader)
    parts = []
    for host in range(2):
        with make_loader(source, batch_size=4, seed=3, start_step=1, num_hosts=2, host=host) as loader:
            parts.append(next(loader))
    for name in again:
        np.testing.assert_array_equal(again[name], whole[2][name])
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[1][name])
    # a posterior sample of the record whose caption stands beside it
    contexts = np.stack([source[i]["context"] for i in range(5)])
    rows = [int(np.flatnonzero((contexts == context).all((1, 2)))[0]) for context in whole[0]["context"]]
    moments = np.stack([source[i]["moments"][0] for i in rows]).astype(np.float64)
    mean, deviation = moments[..., :4], np.exp(np.clip(moments[..., 4:], -30, 20) / 2)
    drawn = (whole[0]["image"] / source.metadata.scaling_factor - mean) / deviation
    assert np.abs(drawn).max() < 5 and 0.7 < drawn.std() < 1.3


def test_a_bad_image_or_caption_is_named_or_left_out_and_counted(models, images, tmp_path, capsys):
    broken = tmp_path / "images"
    shutil.copytree(images, broken)
    (broken / "a/02.txt").write_bytes(b"caf\xe9")
    (broken / "b/03.json").write_text('{"caption": 3}')
    (broken / "a/04.png").write_bytes(b"no image")
    source = open_folder(str(broken), SIDE)
    for index, said in (
        (1, "02.txt is not a usable caption: it is no text"),
        (4, "no text as caption or text or prompt"),
    ):
        with pytest.raises(DataError, match=said):
            source[index]
    with pytest.raises(SystemExit):
        prepare.main(flags(models["1"], tmp_path / "out", images=broken))
    assert "02.txt is not a usable caption" in capsys.readouterr().err
    prepare.main(flags(models["1"], tmp_path / "skipped", images=broken, bad_images="skip", shard_size=5))
    said = capsys.readouterr().out
    assert "2 images with captions" in said and "bad images left out: 3" in said
    assert json.loads((tmp_path / "skipped" / METADATA).read_text())["left_out"] == LEFT_OUT | {"bad images": 3}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": None}, "one of --images and --tars must be given, found neither"),
        ({"tars": "x"}, "one of --images and --tars must be given, found both"),
        ({"images": None, "tars": "x", "captions": "c.json"}, "--captions is of the images of --images, found --tars"),
        ({"images": None, "tars": "/absent"}, "--tars must be a tar file or a folder of tar files"),
        ({"images": "/absent"}, "--images must be a folder of images with captions, found none at '/absent'"),
        ({"images": "empty"}, "'empty' must hold JPEG, PNG, WebP, BMP, GIF or TIFF files with captions"),
        ({"captions": "absent.json"}, "--captions must be a file of .parquet, .json, .jsonl, found 'absent.json'"),
        ({"captions": "broken.json"}, "broken.json cannot be read: Expecting value"),
        ({"captions": "number.json"}, "--captions must be COCO's JSON, captions by the names of images, or a list of"),
        ({"captions": "other.jsonl"}, "other.jsonl must have one of file_name, filename, image_path, path, image, key"),
        ({"captions": "broken.parquet"}, "--captions must be a .parquet file, broken.parquet cannot be read"),
        ({"image_size": 7}, "--image-size must be a multiple of 2 and the autoencoder one of RGB images, found 7"),
        ({"image_size": 0}, "--image-size must be 1 or more, found 0"),
        ({"model": "empty"}, "model_index.json must exist"),
    ],
)
def test_a_mistake_gets_one_sentence_and_code_2(models, images, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    written = {"broken.json": "captions", "number.json": "3", "other.jsonl": '{"a": 1}\n', "broken.parquet": "text"}
    for name, content in written.items():
        pathlib.Path(name).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        prepare.main(flags(**{"model": models["1"], "output": tmp_path / "out", "images": images, **options}))
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in shown and "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_kept_and_damage_gets_a_sentence(models, images, prepared, tmp_path, capsys):
    prepare.main(flags(models["XL"], prepared, images=images))
    assert "is complete: 5 images with captions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        prepare.main(flags(models["1"], prepared, images=images, image_size=10))
    assert "is complete, with other settings (files, image_size)" in capsys.readouterr().err
    shutil.copytree(prepared, tmp_path / "copy")
    shard = tmp_path / "copy/captions-00001-of-00003.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="must be a shard of"):
        CaptionedLatents(str(tmp_path / "copy"))
    about = json.loads((tmp_path / "copy" / METADATA).read_text())
    (tmp_path / "copy" / METADATA).write_text(json.dumps(about | {"count": 6}))
    with pytest.raises(ConfigError, match="must count the same images in all and in its shards, found 6 and 5"):
        CaptionMetadata.read(tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"must be a folder written by `python -m gspn_jax\.prepare captions`"):
        CaptionedLatents(str(tmp_path))
