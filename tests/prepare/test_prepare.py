"""Latents are prepared from what people have, survive a kill to the byte, and mistakes get a sentence."""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gspn_jax import prepare
from gspn_jax.autoencoder import LATENT_SCALE
from gspn_jax.config import DataConfig
from gspn_jax.data import make_source
from gspn_jax.data.folder import FolderSource
from gspn_jax.data.latents import LatentSource
from gspn_jax.data.set_metadata import METADATA
from tests.autoencoder import numpy_vae
from tests.quick_compile import QUICK_COMPILE

ROOT = pathlib.Path(__file__).parents[2]
SIDE, COUNT, CLASSES = 8, 14, ("n01", "n02", "n03")


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(numpy_vae.random_state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    """14 JPEGs in three classes, larger than what is encoded and not square."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = root / CLASSES[i * 3 // COUNT] / f"{i:02}.JPEG"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (11 + i, 24, 3), np.uint8)).save(path, quality=95)
    return root


def flags(vae, output, **options) -> list[str]:
    options = {
        "vae": vae,
        "output": output,
        "image_size": SIDE,
        "shard_size": 4,
        "batch_size": 3,
        "threads": 2,
        **options,
    }
    return [
        "latents",
        *(
            text
            for name, value in options.items()
            if value is not None
            for text in (f"--{name.replace('_', '-')}", str(value))
        ),
    ]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def latents_of(folder: pathlib.Path) -> dict:
    """`contents`, but for what the metadata say of where the images came from."""
    found = contents(folder)
    about = json.loads(found.pop(METADATA))
    del about["images"]
    return found | {METADATA: about}


def test_moments_are_those_of_both_views_of_every_image(vae, images, tmp_path, capsys):
    prepare.main(flags(vae, tmp_path / "out", images=images))
    said = capsys.readouterr().out
    assert "14 latents of 3 classes" in said and "images/s" in said and "waiting for decoding" in said
    source = make_source(
        DataConfig(
            source="latents", path=str(tmp_path / "out"), image_size=SIDE // 2, channels=4, num_classes=3, flip=True
        )
    )
    originals, weights = FolderSource(str(images), SIDE, 3), numpy_vae.random_state_dict()
    assert len(source) == COUNT and source.class_names == CLASSES
    for i in range(COUNT):
        assert source[i]["label"] == originals[i]["label"]
        for view, step in enumerate((1, -1)):
            pixels = originals[i]["image"][:, ::step].transpose(2, 0, 1) / 127.5 - 1
            truth = numpy_vae.encode(weights, numpy_vae.TINY, pixels).transpose(1, 2, 0)
            # float16 keeps 11 bits: half of 2**-10 of a value, on top of the encoder's 1e-4 of the largest
            tolerance = 2**-11 * np.abs(truth) + 1e-4 * np.abs(truth).max()
            assert (np.abs(source[i]["moments"][view] - truth) <= tolerance).all()
    metadata = json.loads((tmp_path / "out" / METADATA).read_text())
    assert metadata["class_counts"] == [5, 5, 4] and metadata["count"] == COUNT
    assert metadata["scaling_factor"] == LATENT_SCALE and metadata["image_size"] == SIDE and metadata["flips"]
    shards = [f"latents-{i:05}-of-00004.array_record" for i in range(4)]
    assert sorted(contents(tmp_path / "out")) == [*shards, METADATA]


def start(*arguments: str) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": QUICK_COMPILE, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "gspn_jax.prepare", *arguments],
        env=env,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_a_killed_preparation_goes_on_and_ends_in_the_same_bytes(vae, images, tmp_path):
    def run(name: str, kill_at: int = 0) -> None:
        with start(*flags(vae, tmp_path / name, images=images, shard_size=1)) as process:
            while kill_at and len(list((tmp_path / name).glob("*.array_record"))) < kill_at:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.001)
            if kill_at:
                process.send_signal(signal.SIGKILL)
            _, errors = process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if kill_at else 0), errors

    run("whole")
    run("parts", kill_at=2)
    assert not (tmp_path / "parts" / METADATA).exists()
    finished = [path for path in (tmp_path / "parts").glob("*.array_record") if path.with_suffix(".json").exists()]
    assert finished
    before = {path: path.stat().st_mtime_ns for path in finished}
    left = tmp_path / "parts/.latents-00013-of-00014.array_record.0123456789abcdef.unfinished"
    left.write_bytes(b"what a kill within a shard leaves")
    finished[0].with_name(f".{finished[0].name}.lock").write_bytes(b"what a kill just after a shard leaves")
    run("parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_tars_and_hosts_give_the_same_bytes_as_the_folder(vae, images, tmp_path, capsys):
    def tar(path: pathlib.Path, files: dict[str, bytes]) -> bytes:
        with tarfile.open(path, "w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path.read_bytes()

    for name in ("classes", "nested"):
        (tmp_path / name).mkdir()
    classes = {f"{c}.tar": tar(tmp_path / "classes" / f"{c}.tar", contents(images / c)) for c in CLASSES}
    tar(tmp_path / "nested/ILSVRC2012_img_train.tar", classes)
    prepare.main(flags(vae, tmp_path / "folder", images=images))
    for name in ("classes", "nested"):
        prepare.main(flags(vae, tmp_path / f"{name}_out", tars=tmp_path / name))
        assert latents_of(tmp_path / f"{name}_out") == latents_of(tmp_path / "folder")
    capsys.readouterr()
    for host in (0, 1, 0):
        prepare.main(flags(vae, tmp_path / "hosts", images=images, num_hosts=2, host=host))
    said = capsys.readouterr().out
    assert "host 0 is done; 2 of 4 shards of other hosts are missing" in said and "host 1 is done\n" in said
    assert contents(tmp_path / "hosts") == contents(tmp_path / "folder")
    prepare.main(flags(vae, tmp_path / "hosts", images=images))
    assert "is complete: 14 latents of 3 classes" in capsys.readouterr().out


def test_a_tensorflow_datasets_set_is_prepared_without_tensorflow(vae, images, tmp_path, capsys):
    import tensorflow_datasets as tfds

    class TinyPhotos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name, VERSION = "tiny_photos", tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=list(CLASSES)),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for path in images.glob("*/*.JPEG"):
                yield path.name, {"image": io.BytesIO(path.read_bytes()), "label": path.parent.name}

    tfds.display_progress_bar(False)
    TinyPhotos(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    capsys.readouterr()
    prepare.main(flags(vae, tmp_path / "out", tfds="tiny_photos", tfds_dir=tmp_path / "tfds"))
    prepare.main(flags(vae, tmp_path / "folder", images=images))
    assert "14 latents of 3 classes" in capsys.readouterr().out
    records = []  # tensorflow-datasets keeps an order of its own
    for name in ("out", "folder"):
        source = LatentSource(DataConfig(source="latents", path=str(tmp_path / name), image_size=SIDE // 2, channels=4))
        records.append(sorted((int(source[i]["label"]), source[i]["moments"].tobytes()) for i in range(COUNT)))
    assert records[0] == records[1]


def test_a_bad_image_is_named_or_left_out_and_counted(vae, images, tmp_path, capsys, caplog):
    broken = tmp_path / "images"
    shutil.copytree(images, broken)
    path = broken / "n02/06.JPEG"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit) as stopped:
        prepare.main(flags(vae, tmp_path / "out", images=broken))
    assert stopped.value.code == 2 and "n02/06.JPEG is not a usable image" in capsys.readouterr().err
    prepare.main(flags(vae, tmp_path / "skipped", images=broken, bad_images="skip"))
    assert "13 latents of 3 classes" in (said := capsys.readouterr().out) and "bad images left out: 1" in said
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert ["n02/06.JPEG" in message for message in said if "left out" in message] == [True]
    assert json.loads((tmp_path / "skipped" / METADATA).read_text())["class_counts"] == [5, 4, 4]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": None}, "one of --images, --tars and --tfds must be given, found --images None"),
        ({"tars": "x"}, "one of --images, --tars and --tfds must be given"),
        ({"image_size": 7}, "--image-size must be a multiple of 2 and the autoencoder one of RGB images, found 7"),
        ({"image_size": "big"}, "invalid literal for int() with base 10: 'big'"),
        ({"shard_size": 0}, "--shard-size must be 1 or more, found 0"),
        ({"host": 2, "num_hosts": 2}, "--host must be in 0..1, found 2"),
        ({"vae": "/absent.safetensors"}, "the weights must be a file, found nothing at /absent.safetensors"),
        ({"vae": "broken.safetensors"}, "broken.safetensors must be a safetensors file, it cannot be read"),
        ({"images": None, "tars": "/absent"}, "--tars must be a tar file or a folder of tar files"),
        ({"images": "/absent"}, "found nothing at '/absent'"),
        ({"images": None, "tfds": "no_such_set"}, "found 'no_such_set'"),
    ],
)
def test_a_mistake_gets_one_sentence_and_code_2(vae, images, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("broken.safetensors").write_bytes(b"text")
    with pytest.raises(SystemExit) as stopped:
        prepare.main(flags(**{"vae": vae, "output": tmp_path / "out", "images": images, **options}))
    assert stopped.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in shown and "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_a_full_disk_and_other_settings_are_found_before_any_work(vae, images, tmp_path, capsys, monkeypatch):
    def said(**options) -> str:
        with pytest.raises(SystemExit) as stopped:
            prepare.main(flags(vae, tmp_path / "out", images=images, **options))
        assert stopped.value.code == 2
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
        assert "the latents of 14 images need 0.0 GB" in said()
    prepare.main(flags(vae, tmp_path / "out", images=images, num_hosts=2))  # one of two hosts: begun, not finished
    assert "was begun with other settings (shard_size, batch_size)" in said(shard_size=5, batch_size=2)
    prepare.main(flags(vae, tmp_path / "out", images=images))
    assert "is complete, with other settings (image_size)" in said(image_size=10)
