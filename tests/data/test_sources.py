"""Image sets are found, labelled and fingerprinted as the user expects; what is missing is said in one sentence."""

import io
import json
import os
import pathlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data import DataError, make_source
from gspn_jax.data.flat_folder import FlatFolder
from gspn_jax.data.folder import FolderSource
from gspn_jax.data.tar_source import TarSource


def write_image(path: pathlib.Path, level: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (level,) * 3).save(path)


def folder_config(path: pathlib.Path, **changes) -> DataConfig:
    values = {"source": "folder", "path": str(path), "image_size": 8, "channels": 3, "num_classes": 2, **changes}
    return DataConfig(**values)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Levels are in the order in which the images must appear."""
    names = ["cat/a.png", "cat/b.JPG", "cat/more/c.jpeg", "dog/a.jpg", "dog/z.png"]
    for i, name in reversed(list(enumerate(names))):
        write_image(tmp_path / name, 10 * i)
    write_image(tmp_path / ".cache/x.png", 200)
    write_image(tmp_path / "cat/._a.png", 200)
    (tmp_path / "cat/notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("not a class")
    return tmp_path


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    source = make_source(DataConfig())
    digits = load_digits()
    assert len(source) == 1797 and source.class_names == tuple("0123456789")
    for i in (0, 1, 1796):
        record = source[i]
        assert record["image"].shape == (8, 8, 1) and record["image"].dtype == np.uint8
        np.testing.assert_allclose(record["image"][..., 0] * (16 / 255), digits.images[i], atol=0.5 * 16 / 255)
        assert record["label"] == digits.target[i] and record["label"].dtype == np.int32
    assert {int(level) for level in source[0]["image"].ravel()} <= {round(v * 255 / 16) for v in range(17)}


def test_digits_come_in_other_sizes_and_in_rgb():
    assert make_source(DataConfig(image_size=16, channels=3))[5]["image"].shape == (16, 16, 3)


def test_a_folder_gives_sorted_classes_and_files_and_ignores_the_rest(folder):
    source = make_source(folder_config(folder))
    assert source.class_names == ("cat", "dog")
    assert [int(source[i]["label"]) for i in range(len(source))] == [0, 0, 0, 1, 1]
    levels = [int(source[i]["image"].mean().round()) for i in range(len(source))]
    assert levels == [0, 10, 20, 30, 40]  # JPEG keeps a flat grey exactly
    assert source[0]["label"].dtype == np.int32


def test_a_folder_of_links_is_followed(folder, tmp_path_factory):
    links = tmp_path_factory.mktemp("links")
    for name in ("cat", "dog"):
        (links / name).symlink_to(folder / name)
    assert len(make_source(folder_config(links))) == 5


def test_fingerprint_is_stable_and_notices_changes(folder):
    def fingerprint(**changes) -> str:
        return make_source(folder_config(folder, **changes)).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    seen = {first}
    os.rename(folder / "dog/a.jpg", folder / "dog/b.jpg")
    seen.add(fingerprint())
    os.rename(folder / "dog/b.jpg", folder / "cat/d.jpg")
    seen.add(fingerprint())
    os.rename(folder / "cat", folder / "cow")
    seen.add(fingerprint())
    Image.new("RGB", (64, 64)).save(folder / "dog/z.png")
    seen.add(fingerprint())
    assert len(seen) == 5


def test_fingerprint_does_not_depend_on_where_the_folder_is(folder, tmp_path_factory):
    here = make_source(folder_config(folder)).fingerprint
    there = tmp_path_factory.mktemp("other") / "copy"
    os.rename(folder, there)
    assert make_source(folder_config(there)).fingerprint == here


def test_a_file_that_vanishes_is_named(folder):
    source = make_source(folder_config(folder))
    (folder / "cat/b.JPG").unlink()
    with pytest.raises(DataError, match=r"cat/b\.JPG cannot be read: No such file"):
        source[1]


def test_wrong_folders_get_a_sentence(folder, tmp_path_factory):
    with pytest.raises(ConfigError, match=r"data\.num_classes is 3, but the folder .* has 2 classes \(cat, dog\)"):
        make_source(folder_config(folder, num_classes=3))
    with pytest.raises(ConfigError, match=r"data\.path must be a folder .*found nothing at .*absent"):
        make_source(folder_config(folder / "absent"))
    with pytest.raises(ConfigError, match=r"data\.path must be a folder .*found a file at .*README"):
        make_source(folder_config(folder / "README.md"))
    with pytest.raises(ConfigError, match=r"found no JPEG, .* file in the 0 folders"):
        make_source(folder_config(tmp_path_factory.mktemp("empty")))
    (folder / "emu").mkdir()
    with pytest.raises(ConfigError, match=r"every class folder .* found none in emu"):
        make_source(folder_config(folder, num_classes=3))
    with pytest.raises(ConfigError, match=r"data\.channels must be 1 .* or 3 .*found 4"):
        make_source(folder_config(folder, channels=4))


# tensorflow-datasets


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> pathlib.Path:
    """Two sets prepared as array_record without TensorFlow: `tiny_shapes`, and `tiny_text`, which has no images."""
    import tensorflow_datasets as tfds

    def jpeg(level: int) -> io.BytesIO:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (level,) * 3).save(buffer, "JPEG")
        return io.BytesIO(buffer.getvalue())

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

    class TinyShapes(Tiny, skip_registration=True):
        name = "tiny_shapes"

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "id": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["round", "square"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _generate_examples(self):
            for i in range(6):
                image = jpeg(20 * i) if i < 5 else io.BytesIO(b"not a JPEG file")
                yield i, {"image": image, "label": i % 2, "id": str(i)}

    class TinyText(Tiny, skip_registration=True):
        name = "tiny_text"

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _generate_examples(self):
            yield 0, {"text": "no image"}

    root = tmp_path_factory.mktemp("tfds")
    tfds.display_progress_bar(False)
    for builder in (TinyShapes, TinyText):
        builder(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root


def tfds_config(path: pathlib.Path, **changes) -> DataConfig:
    values = {
        "source": "tfds",
        "name": "tiny_shapes",
        "path": str(path),
        "image_size": 8,
        "channels": 3,
        "num_classes": 2,
        **changes,
    }
    return DataConfig(**values)


def test_a_tfds_set_is_read_without_tensorflow(tfds_dir):
    source = make_source(tfds_config(tfds_dir))
    assert len(source) == 6 and source.class_names == ("round", "square")
    levels, bad = {}, []
    for i in range(6):
        try:
            record = source[i]
        except DataError as error:
            bad.append(str(error))
            continue
        assert record["image"].shape == (8, 8, 3) and record["label"].dtype == np.int32
        levels[int(record["image"].mean().round())] = int(record["label"])
    assert levels == {0: 0, 20: 1, 40: 0, 60: 1, 80: 0}
    assert len(bad) == 1 and "tiny_shapes train" in bad[0] and "not recognised" in bad[0]


def test_a_tfds_source_travels_to_other_processes(tfds_dir):
    source = make_source(tfds_config(tfds_dir))
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == 6 and copy.fingerprint == source.fingerprint
    good = [i for i in range(6) if b"not a JPEG" not in source._records[i]["image"]]
    np.testing.assert_array_equal(copy[good[0]]["image"], source[good[0]]["image"])


def test_a_tfds_split_can_be_sliced_and_has_its_own_fingerprint(tfds_dir):
    whole, half = (make_source(tfds_config(tfds_dir, split=split)) for split in ("train", "train[:50%]"))
    assert len(half) == 3
    assert whole.fingerprint != half.fingerprint
    assert whole.fingerprint == make_source(tfds_config(tfds_dir)).fingerprint


def test_a_set_prepared_as_tfrecord_gets_the_command_that_converts_it(tfds_dir, tmp_path):
    # What preparing with TensorFlow leaves: the same metadata with another format and file name.
    source, target = tfds_dir / "tiny_shapes/1.0.0", tmp_path / "tiny_shapes/1.0.0"
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name.replace("array_record", "tfrecord")).write_bytes(file.read_bytes())
    info = json.loads((source / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(
        ConfigError,
        match=r"found tfrecord in .*convert_dataset\(dataset_version_dir='.*/tiny_shapes/"
        r"1\.0\.0', out_dir=None, out_file_format='array_record'\)\"$",
    ):
        make_source(tfds_config(tmp_path))
    # The command puts array_record files beside the others and says so in the metadata: then it is read.
    for file in source.glob("*array_record*"):
        (target / file.name).write_bytes(file.read_bytes())
    (target / "dataset_info.json").write_text(
        json.dumps({**info, "fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]})
    )
    assert len(make_source(tfds_config(tmp_path))) == 6


def test_other_mistakes_with_tfds_get_a_sentence(tfds_dir, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"'cifar10' is not prepared in .*: python -c \"import tensorflow_datasets as "
        r"tfds; tfds\.builder\('cifar10', data_dir='.*', "
        r"file_format='array_record'\)\.download_and_prepare\(\)\"$",
    ):
        make_source(tfds_config(tmp_path, name="cifar10"))
    with pytest.raises(
        ConfigError,
        match=r"'imagenet2012' is not prepared in .*; download its archives by hand into "
        r"'.*downloads/manual', and prepare it once.*tfds\.builder\('imagenet2012'",
    ):
        make_source(tfds_config(tmp_path, name="imagenet2012"))
    for name in ("no_such_set", "tiny_shapes/config", "not a name!"):
        with pytest.raises(ConfigError, match=rf"data\.name must be .*found '{name}'"):
            make_source(tfds_config(tfds_dir, name=name))
    with pytest.raises(ConfigError, match=r"data\.split must be a split of 'tiny_shapes' \(train\) .*found 'test'"):
        make_source(tfds_config(tfds_dir, split="test"))
    with pytest.raises(ConfigError, match=r"data\.num_classes is 9, but tiny_shapes has 2 classes \(round, square\)"):
        make_source(tfds_config(tfds_dir, num_classes=9))
    with pytest.raises(ConfigError, match=r"data\.name must be a set of images .*found 'tiny_text' with text"):
        make_source(tfds_config(tfds_dir, name="tiny_text"))


def test_a_features_file_runs_no_code(tfds_dir, tmp_path, monkeypatch):
    copy = shutil.copytree(tfds_dir, tmp_path / "tfds") / "tiny_shapes/1.0.0/features.json"
    (tmp_path / "foreign_features.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    monkeypatch.syspath_prepend(tmp_path)
    told = copy.read_text()
    for own in ("features_dict.FeaturesDict", "class_label_feature.ClassLabel"):
        copy.write_text(told.replace(f"tensorflow_datasets.core.features.{own}", "foreign_features.Feature"))
        assert copy.read_text() != told
        with pytest.raises(ConfigError, match=r"must be tensorflow-datasets' own, found the class 'foreign_features"):
            make_source(tfds_config(tmp_path / "tfds"))
        assert not (tmp_path / "ran").exists()
    copy.write_text(told)
    assert len(make_source(tfds_config(tmp_path / "tfds"))) == 6
    for name in ("huggingface:mnist", "someone:tiny_shapes"):
        with pytest.raises(ConfigError, match="whose description is code from elsewhere"):
            make_source(tfds_config(tfds_dir, name=name))


# folders as people have them


def test_links_are_followed_and_what_is_left_out_is_counted(folder, tmp_path_factory, caplog):
    other = tmp_path_factory.mktemp("other")
    write_image(other / "real/e.webp", 50)
    (folder / "emu").symlink_to(other / "real")
    (folder / "dog/linked.png").symlink_to(folder / "cat/a.png")
    (folder / "dog/broken.png").symlink_to(folder / "nowhere.png")
    (folder / "dog/self.png").symlink_to(folder / "dog/self.png")
    (folder / "dog/up").symlink_to(folder)
    os.mkfifo(folder / "dog/pipe.png")
    write_image(folder / "beside.png", 1)
    for name in ("cat/a.heic", "dog/b.HEIC", "dog/notes"):
        (folder / name).write_text("not an image")
    source = make_source(folder_config(folder, num_classes=3))
    assert source.class_names == ("cat", "dog", "emu")
    assert [int(source[i]["label"]) for i in range(len(source))] == [0, 0, 0, 1, 1, 1, 2]
    np.testing.assert_array_equal(source[4]["image"], source[0]["image"])
    (said,) = [record.message for record in caplog.records if "left out" in record.message]
    for count in (
        "2 .heic",
        "2 hidden",
        "2 links in a loop",
        "1 broken links",
        "1 pipes or devices",
        "1 .md",
        "1 .txt",
        "1 files without an extension",
        "1 images beside the class folders",
    ):
        assert count in said
    assert len(FlatFolder(folder, 8)) == 8


def test_the_folder_above_train_and_val_is_refused_with_the_way_out(tmp_path):
    for name in ("train/n1/1.png", "train/n2/1.png", "val/n1/1.png", "val/n2/1.png"):
        write_image(tmp_path / "set" / name, 1)
    with pytest.raises(ConfigError, match=r"must be classes, found the parts of a set, train, val, .* such as .*train"):
        make_source(folder_config(tmp_path / "set"))
    assert make_source(folder_config(tmp_path / "set/train")).class_names == ("n1", "n2")
    assert len(FolderSource(str(tmp_path / "set"), 8, 3, insist=True)) == 4
    for name in ("train/1.png", "val/1.png"):  # images of their own: classes that are called so
        write_image(tmp_path / "flat" / name, 1)
    assert make_source(folder_config(tmp_path / "flat")).class_names == ("train", "val")


# tars


def pack(path: pathlib.Path, files: dict[str, bytes | None]) -> pathlib.Path:
    """A tar of files; None is a small image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content := buffer.getvalue() if content is None else content)
            archive.addfile(member, io.BytesIO(content))
    return path


def inner(name: str, tmp_path: pathlib.Path) -> bytes:
    return pack(tmp_path / f"inner-{name}.tar", {f"{name}_{i}.JPEG": None for i in range(2)}).read_bytes()


def classes_of(source) -> list[tuple[str, int]]:
    return [(name, int((source._labels == i).sum())) for i, name in enumerate(source.class_names)]


@pytest.mark.parametrize(
    ("tars", "classes"),
    [
        ({"n1.tar": ["a.png", "b.png"], "n2.tar": ["c.png"]}, [("n1", 2), ("n2", 1)]),
        ({"n1.tar": ["n1/a.png"], "n2.tar": ["n2/c.png"]}, [("n1", 1), ("n2", 1)]),
        ({"all.tar": ["./set/train/n1/a.png", "./set/train/n2/b.png"]}, [("n1", 1), ("n2", 1)]),
        ({"1.tar": ["n1/a.png", "n2/b.png"], "2.tar": ["n2/c.png"]}, [("n1", 1), ("n2", 2)]),
        ({"all.tar": ["n1/more/a.png", "n2/b.png", "n2/._b.png"]}, [("n1", 1), ("n2", 1)]),
        ({"n01440764.tar": ["a.png"], "n01440765.tar": ["b.png"]}, [("n01440764", 1), ("n01440765", 1)]),
        ({"0.tar": ["a.png"], "1.tar": ["b.png"]}, [("0", 1), ("1", 1)]),
    ],
)
def test_tars_tell_their_classes_by_what_lies_in_them(tmp_path, tars, classes):
    for name, files in tars.items():
        pack(tmp_path / "set" / name, dict.fromkeys(files))
    (tmp_path / "set/devkit.tar.gz").write_bytes(b"")
    source = TarSource(str(tmp_path / "set"), 8, 3)
    assert classes_of(source) == classes
    assert source[0]["image"].shape == (8, 8, 3)


def test_labels_of_webdataset_are_read(tmp_path):
    for shard in range(2):
        files = {f"{i}.{end}": None if end == "png" else b"%d\n" % i for i in (0, 1, 3) for end in ("png", "cls")}
        pack(tmp_path / "set" / f"shard-{shard:06}.tar", files)
    with pytest.raises(ConfigError, match=r"go up to 3 without 1 of the numbers below it: give --num-classes"):
        TarSource(str(tmp_path / "set"), 8, 3)
    assert classes_of(TarSource(str(tmp_path / "set"), 8, 3, num_classes=5)) == [
        ("0", 2),
        ("1", 2),
        ("2", 0),
        ("3", 2),
        ("4", 0),
    ]
    with pytest.raises(ConfigError, match=r"--num-classes is 2, but the labels of .* go up to 3"):
        TarSource(str(tmp_path / "set"), 8, 3, num_classes=2)


@pytest.mark.parametrize(
    ("tars", "said"),
    [
        (
            {"ILSVRC2012_img_train.tar": "inner", "ILSVRC2012_img_val.tar": ["a.png"]},
            "says 'val': give --tars .*train.tar",
        ),
        ({"ILSVRC2012_img_train.tar": "inner", "ILSVRC2012_img_test_v10102019.tar": ["a.png"]}, "says 'test'"),
        ({"validation.tar": ["a.png"]}, "says 'validation': move it elsewhere"),
        (
            {"ILSVRC2012_img_train.tar": "inner", "ILSVRC2012_img_train_t3.tar": "inner"},
            "must lie in one tar, found n1.tar",
        ),
        ({"all.tar": "inner", "n3.tar": ["a.png"]}, "found both in"),
        ({"all.tar": ["train/n1/a.png", "val/n1/a.png"]}, "found the parts of a set, train, val"),
        ({"all.tar": ["n1/a.png", "n2/b.png", "c.png"]}, r"found c\.png of .* beside the folder 'n1'"),
        ({"shard-000000.tar": ["a.png"], "shard-000001.tar": ["b.png"]}, "numbered like shards of one set"),
        ({"a.tar": ["0.png", "0.json", "1.png", "1.json"]}, r"found 2 \.json files beside 2 images"),
        ({"a.tar": ["0.png", "0.cls", "1.png"]}, "must have a number as .cls beside it, found "),
        ({"a.tar": ["notes.txt"]}, "found none in"),
    ],
)
def test_what_tars_do_not_tell_is_refused(tmp_path, tars, said):
    for name, files in tars.items():
        packed = {f"{n}.tar": inner(n, tmp_path) for n in ("n1", "n2")} if files == "inner" else dict.fromkeys(files)
        pack(tmp_path / "set" / name, packed)
    with pytest.raises(ConfigError, match=said):
        TarSource(str(tmp_path / "set"), 8, 3)


def test_one_tar_can_be_named(tmp_path):
    path = pack(tmp_path / "ILSVRC2012_img_train.tar", {f"{n}.tar": inner(n, tmp_path) for n in ("n1", "n2")})
    assert classes_of(TarSource(str(path), 8, 3)) == [("n1", 2), ("n2", 2)]


def test_links_and_devices_of_a_tar_are_left_out(tmp_path, caplog):
    path = pack(tmp_path / "set/n1.tar", {"a.png": None})
    with tarfile.open(path, "a") as archive:
        for name, kind in (("b.png", tarfile.SYMTYPE), ("c.png", tarfile.CHRTYPE), ("d.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            archive.addfile(member)
    assert len(TarSource(str(tmp_path / "set"), 8, 3)) == 1
    assert "3 links, devices or sparse files in tars" in caplog.text
