"""Records: what preparing gives is what Pillow makes of the files, it goes on after a kill, and damage is found."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data import DataError, make_loader, make_source
from gspn_jax.data.augment.crops import evaluation_crop
from gspn_jax.data.augment.host import HostAugmentation
from gspn_jax.data.records import RecordSource
from gspn_jax.prepare import records
from gspn_jax.prepare.records import Records, prepare_records

SIZES = [(40, 50), (32, 61), (20, 40), (70, 33), (33, 33), (32, 32), (48, 90)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i, (height, width) in enumerate(SIZES):
        path = root / f"class {i % 2}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(256, size=(6, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return root


def prepare(images, output, **settings):
    settings = {"image_size": 32, "shard_size": 3, "threads": 2} | settings
    prepare_records(Records(images=str(images), output=str(output), **settings))
    return output


@pytest.fixture(scope="module")
def prepared(images, tmp_path_factory):
    return prepare(images, tmp_path_factory.mktemp("prepared") / "records")


def data(path, **fields):
    settings = {"source": "records", "path": str(path), "image_size": 28, "channels": 3, "num_classes": 2}
    return DataConfig(**settings | fields)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_records_are_the_images_with_their_short_side_scaled_as_pillow_does(images, prepared):
    source, originals = RecordSource(str(prepared), None, 3), sorted(images.rglob("*.png"))
    assert len(source) == len(originals) == 7 and source.class_names == ("class 0", "class 1")
    for index, path in enumerate(originals):
        image = Image.open(path)
        if min(image.size) > 32:  # 40x50 becomes 32x40, and so on
            sides = [32 if side == min(image.size) else int(32 * side / min(image.size)) for side in image.size]
            image = image.resize(sides, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(source[index]["image"], np.asarray(image))
        assert source[index]["label"] == int(path.parent.name[-1])


def test_what_is_evaluated_is_to_the_bit_what_the_files_give(images, prepared):
    whole = make_source(DataConfig(source="folder", path=str(images), channels=3, num_classes=2), whole=True)
    source = make_source(data(prepared), whole=True)
    for index in range(len(source)):
        of_record, of_file = (evaluation_crop(s[index]["image"], 28) for s in (source, whole))  # 28 / 0.875 = 32
        np.testing.assert_array_equal(of_record, of_file)


def test_a_killed_preparation_goes_on_to_the_same_bytes(images, prepared, tmp_path, monkeypatch):
    write, left = records._write_shard, [2]

    def killed(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records, "_write_shard", killed)
        prepare(images, tmp_path / "records")
    before = {path.name for path in (tmp_path / "records").glob("*.bin")}
    assert before == {"images-00000-of-00003.bin"}
    with pytest.raises(ConfigError, match=r"other settings \(image_size\)"):
        prepare(images, tmp_path / "records", image_size=31)
    prepare(images, tmp_path / "records")
    assert files(tmp_path / "records") == files(prepared)
    (tmp_path / "records/images-00002-of-00003.json").write_text("as a kill after the metadata leaves it")
    prepare(images, tmp_path / "records")
    assert files(tmp_path / "records") == files(prepared)


def test_hosts_share_the_work_to_the_same_bytes(images, prepared, tmp_path, capsys):
    prepare(images, tmp_path / "records", num_hosts=2, host=0)
    assert "1 of 3 shards of other hosts are missing" in capsys.readouterr().out
    prepare(images, tmp_path / "records", num_hosts=2, host=1)
    prepare(images, tmp_path / "records", num_hosts=2, host=0)
    assert files(tmp_path / "records") == files(prepared)


def test_bad_images_stop_or_are_left_out(images, tmp_path, capsys):
    (tmp_path / "images").symlink_to(images)
    root = tmp_path / "more"
    for path in images.rglob("*.png"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    (root / "class 0" / "03.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"03\.png is not a usable image"):
        prepare(root, tmp_path / "stopped")
    prepare(root, tmp_path / "skipped", bad_images="skip")
    assert "7 images of 2 classes" in (said := capsys.readouterr().out) and "bad images left out: 1" in said


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "images-00001-of-00003.bin").unlink(), "images-00001-of-00003.bin is missing"),
        (lambda path: (path / "index.npz").write_bytes(b"x"), "index.npz is not the one that was written"),
        (lambda path: (path / "metadata.json").unlink(), "no metadata.json"),
        (
            lambda path: (path / "metadata.json").write_text('{"format": "x", "version": 1}'),
            "format 'gspn-jax records'",
        ),
        (lambda path: (path / "images-00002-of-00003.bin").write_bytes(b"abc"), "has 3 bytes, not"),
    ],
)
def test_damage_is_one_sentence(prepared, tmp_path, damage, said):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files(prepared).items():
        (copy / name).write_bytes(content)
    damage(copy)
    with pytest.raises(ConfigError, match=said):
        make_source(data(copy))


def test_the_same_command_compares_every_file_with_its_hash(images, prepared, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files(prepared).items():
        (copy / name).write_bytes(content)
    prepare(images, copy)
    assert "every file as it was written" in capsys.readouterr().out
    shard = bytearray((copy / "images-00001-of-00003.bin").read_bytes())
    shard[100] ^= 1
    (copy / "images-00001-of-00003.bin").write_bytes(shard)
    with pytest.raises(ConfigError, match=r"the content of images-00001-of-00003\.bin has changed"):
        prepare(images, copy)


def test_nothing_of_others_is_written_into(images, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="--output must be a new folder"):
        prepare(images, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def batches(source, count, start=0, **options):
    augment = HostAugmentation(28)
    settings = {"batch_size": 4, "seed": 3, "start_step": start, "augment": augment} | options
    with make_loader(data("unused", **settings.pop("data", {})), source, **settings) as loader:
        return [next(loader) for _ in range(count)]


def test_augmented_batches_know_only_seed_epoch_and_index(prepared):
    """Each image by the augmentation called apart; every epoch has every image once; resumed and shared the same."""
    source = RecordSource(str(prepared), None, 3)
    whole = batches(source, 7)
    assert whole[0]["image"].shape == (4, 28, 28, 3) and whole[0]["image"].dtype == np.uint8
    augment, stream = HostAugmentation(28), np.concatenate([batch["image"] for batch in whole])
    for epoch in range(4):
        shown = stream[7 * epoch : 7 * epoch + 7]
        expected = [augment(source[i]["image"], seed=3, epoch=epoch, index=i) for i in range(7)]
        order = [next(j for j, image in enumerate(expected) if (image == one).all()) for one in shown]
        assert sorted(order) == list(range(7))
    for resumed, batch in zip(batches(source, 3, start=4), whole[4:], strict=True):
        np.testing.assert_array_equal(resumed["image"], batch["image"])
    halves = [batches(source, 7, num_hosts=2, host=host) for host in range(2)]
    for first, second, batch in zip(*halves, whole, strict=True):
        np.testing.assert_array_equal(np.concatenate([first["image"], second["image"]]), batch["image"])
        np.testing.assert_array_equal(np.concatenate([first["label"], second["label"]]), batch["label"])


@pytest.mark.slow
def test_augmented_batches_are_those_of_any_number_of_worker_processes(prepared):
    source = RecordSource(str(prepared), None, 3)
    whole = batches(source, 6)
    for batch, other in zip(whole, batches(source, 6, data={"workers": 2}), strict=True):
        np.testing.assert_array_equal(batch["image"], other["image"])
        np.testing.assert_array_equal(batch["label"], other["label"])


def test_a_source_travels_to_another_process_without_its_pixels(prepared):
    source = RecordSource(str(prepared), None, 3)
    image = source[2]["image"].copy()
    sent = pickle.dumps(source)
    assert len(sent) < image.nbytes + 2000
    np.testing.assert_array_equal(pickle.loads(sent)[2]["image"], image)


def test_the_metadata_counts_classes(prepared):
    assert json.loads((prepared / "metadata.json").read_text())["class_counts"] == [4, 3]
