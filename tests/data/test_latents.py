"""Latents from disk: what is drawn is what the moments say, resumed runs see the same, and misfits get a sentence."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data import DataError, make_loader, make_source, record_files
from gspn_jax.data.latents import LatentMetadata, shard_name, write_shard, write_synthetic
from gspn_jax.data.set_metadata import METADATA
from gspn_jax.data.source import hash_of
from gspn_jax.files import replacing

COUNT, SHAPE, CLASSES = 40, (4, 4, 3), 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("latents")
    write_synthetic(folder, records=COUNT, shards=3, latent_shape=SHAPE, num_classes=CLASSES)
    return folder


def config(folder: pathlib.Path, **changes) -> DataConfig:
    values = {
        "source": "latents",
        "path": str(folder),
        "image_size": 4,
        "channels": 3,
        "num_classes": CLASSES,
        "flip": True,
        **changes,
    }
    return DataConfig(**values)


def take(count: int, data: DataConfig, **options) -> list[dict]:
    with make_loader(data, make_source(data), **{"batch_size": 8, "seed": 3, **options}) as loader:
        return list(itertools.islice(loader, count))


def assert_same(batches: list[dict], others: list[dict]) -> None:
    for batch, other in zip(batches, others, strict=True):
        np.testing.assert_array_equal(batch["image"], other["image"])
        np.testing.assert_array_equal(batch["label"], other["label"])


def write_set(folder: pathlib.Path, moments: np.ndarray, labels: np.ndarray) -> pathlib.Path:
    """A set of one shard with these moments [N, V, h, w, 2C]."""
    folder.mkdir(exist_ok=True)
    shard = write_shard(folder / shard_name(0, 1), labels, moments.astype(np.float16))
    _, views, height, width, channels = moments.shape
    LatentMetadata(
        vae_sha256="",
        image_size=8 * height,
        latent_shape=(height, width, channels // 2),
        scaling_factor=0.5,
        class_names=tuple("abcde"),
        shards=(shard,),
        flips=views == 2,
        class_counts=tuple(map(int, np.bincount(labels, minlength=5))),
    ).write(folder)
    return folder


def test_records_come_back_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    moments, labels = rng.standard_normal((7, 2, 4, 4, 6)).astype(np.float16), np.arange(7, dtype=np.int32) % 5
    source = make_source(config(write_set(tmp_path, moments, labels)))
    assert len(source) == 7 and source.class_names == tuple("abcde")
    for i, copy in itertools.product(range(7), (source, pickle.loads(pickle.dumps(source)))):
        np.testing.assert_array_equal(copy[i]["moments"], moments[i])
        assert copy[i]["label"] == labels[i]


@pytest.mark.parametrize("flip", [True, False])
def test_without_variance_a_batch_holds_the_scaled_means_of_either_view(tmp_path, flip):
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((10, 2, 4, 4, 6)).astype(np.float16)
    moments[..., 3:] = -100  # clipped to -30, a standard deviation of 3e-7
    labels = np.arange(10, dtype=np.int32) % 5
    seen = np.zeros((10, 2), int)
    for batch in take(100, config(write_set(tmp_path, moments, labels), flip=flip), batch_size=10):
        assert batch["image"].dtype == np.float32 and batch["image"].shape == (10, 4, 4, 3)
        assert batch["label"].dtype == np.int32
        means = 0.5 * moments[..., :3].astype(np.float64)
        distances = np.abs(batch["image"][:, None, None] - means).max((3, 4, 5))  # [10 rows, 10 images, 2 views]
        found = [np.unravel_index(row.argmin(), row.shape) for row in distances]
        assert max(row.min() for row in distances) < 1e-5
        assert sorted(image for image, _ in found) == list(range(10))
        np.testing.assert_array_equal(batch["label"], [labels[image] for image, _ in found])
        for image, view in found:
            seen[image, view] += 1
    if flip:  # 100 fair coins an image: 50 +- 5 standard deviations of 5
        assert seen.sum(1).tolist() == [100] * 10 and abs(seen[:, 1] - 50).max() < 25
    else:
        assert seen[:, 1].sum() == 0


def test_samples_follow_the_posterior(tmp_path):
    moments = np.zeros((1, 2, 8, 8, 8), np.float16)
    moments[..., :4], moments[..., 4:] = [1, -2, 3, 0], [0, 1, -2, 30]  # 30 is clipped to 20
    data = config(write_set(tmp_path, moments, np.zeros(1, np.int32)), image_size=8, channels=4)
    values = np.concatenate([batch["image"] for batch in take(60, data, batch_size=16)]).astype(np.float64)
    values = values.reshape(-1, 4)
    count = len(values)  # 61,440 of each channel
    mean, std = 0.5 * np.array([1, -2, 3, 0]), 0.5 * np.exp(np.array([0, 1, -2, 20]) / 2)
    assert (np.abs(values.mean(0) - mean) < 5 * std / np.sqrt(count)).all()
    normal = (values - mean) / std
    assert np.abs(normal.var(0) - 1).max() < 5 * np.sqrt(2 / count)
    assert np.abs((normal**4).mean(0) - 3).max() < 5 * np.sqrt(96 / count)
    correlation = np.corrcoef(np.concatenate([normal, np.roll(normal, 1, axis=0)], axis=1).T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / np.sqrt(count)


def test_every_epoch_has_every_record_once_with_a_new_sample(folder):
    labels = np.concatenate([batch["label"] for batch in take(10, config(folder))]).reshape(2, COUNT)
    source = make_source(config(folder))
    expected = sorted(int(source[i]["label"]) for i in range(COUNT))
    assert sorted(labels[0]) == sorted(labels[1]) == expected
    (first,), (again,) = take(1, config(folder), batch_size=COUNT), take(1, config(folder), batch_size=COUNT, seed=4)
    assert not np.isin(first["image"], again["image"]).any()
    epochs = take(2, config(folder), batch_size=COUNT)
    assert not np.isin(epochs[0]["image"], epochs[1]["image"]).any()


def test_a_large_batch_has_the_rows_of_small_ones(folder):
    """200 rows are drawn in several goes, the last of them not whole; 8 rows in one."""
    (large,), small = take(1, config(folder), batch_size=200), take(25, config(folder), batch_size=8)
    assert_same([large], [{name: np.concatenate([part[name] for part in small]) for name in ("image", "label")}])


@pytest.mark.parametrize("start_step", [1, 7])
def test_a_resumed_loader_continues_the_same_stream(folder, start_step):
    assert_same(take(3, config(folder), start_step=start_step), take(start_step + 3, config(folder))[start_step:])


def test_hosts_and_workers_change_nothing(folder):
    single = take(6, config(folder))
    parts = [take(6, config(folder), num_hosts=2, host=host) for host in range(2)]
    assert_same(
        [
            {name: np.concatenate([part[step][name] for part in parts]) for name in ("image", "label")}
            for step in range(6)
        ],
        single,
    )
    assert_same(take(6, config(folder, workers=1)), single)


def test_the_fingerprint_is_stable_and_notices_another_set(folder, tmp_path):
    assert make_source(config(folder)).fingerprint == make_source(config(folder)).fingerprint
    write_synthetic(tmp_path, records=COUNT, shards=3, latent_shape=SHAPE, num_classes=CLASSES, seed=1)
    assert make_source(config(folder)).fingerprint != make_source(config(tmp_path)).fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 8}, r"data\.image_size and data\.channels ask for latents of 8x8x3, but those in .* are 4x4x3"),
        ({"channels": 4}, r"ask for latents of 4x4x4, but those in .* are 4x4x3"),
        ({"num_classes": 6}, r"data\.num_classes is 6, but the set of latents .* has 5 classes \(class 0, "),
        (
            {"path": "/absent"},
            r"data\.path must be a folder of latents written by `python -m gspn_jax\.prepare latents`, "
            r"found no metadata\.json in '/absent'",
        ),
    ],
)
def test_a_config_that_does_not_fit_gets_a_sentence(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_source(config(folder, **changes))


def test_flips_must_have_been_prepared(tmp_path):
    write_synthetic(tmp_path, records=4, latent_shape=SHAPE, num_classes=CLASSES, flips=False)
    with pytest.raises(ConfigError, match=r"data\.flip needs latents of both views, but those in .* without flips"):
        make_source(config(tmp_path))
    assert take(1, config(tmp_path, flip=False))[0]["image"].shape == (8, *SHAPE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path, values: (path / shard_name(1, 2)).unlink(),
            r"latents-00001-of-00002\.array_record must be a shard of \d+ bytes, found no such file",
        ),
        (
            lambda path, values: (path / shard_name(1, 2)).write_bytes(b"cut"),
            r"must be a shard of \d+ bytes, found 3 bytes",
        ),
        (
            lambda path, values: (path / METADATA).write_text("{"),
            r"metadata\.json must be the metadata of a set of latents",
        ),
        (
            lambda path, values: (path / METADATA).write_text(json.dumps(values | {"version": 9})),
            r"metadata\.json must be of format version 1, found 9: prepare the latents again",
        ),
        (
            lambda path, values: (path / METADATA).write_text(json.dumps(values | {"count": 5})),
            r"must count the same latents in all, in its shards and in its classes, found 5, 6 and 6",
        ),
        (
            lambda path, values: (path / METADATA).write_text(
                json.dumps({k: v for k, v in values.items() if k != "flips"})
            ),
            r"must be the metadata of a set of latents, but metadata\.json has no 'flips'",
        ),
    ],
)
def test_a_damaged_set_gets_a_sentence(tmp_path, damage, message):
    write_synthetic(tmp_path, records=6, shards=2, latent_shape=SHAPE, num_classes=CLASSES)
    damage(tmp_path, json.loads((tmp_path / METADATA).read_text()))
    with pytest.raises(ConfigError, match=message):
        make_source(config(tmp_path))


def test_a_flipped_bit_in_a_shard_is_named(tmp_path):
    write_synthetic(tmp_path, records=6, latent_shape=SHAPE, num_classes=CLASSES)
    path = tmp_path / shard_name(0, 1)
    data = bytearray(path.read_bytes())
    record = make_source(config(tmp_path))[2]["moments"].tobytes()
    data[data.index(record) + 5] ^= 1
    path.write_bytes(data)
    source = make_source(config(tmp_path))
    assert source[1]["label"] >= 0
    with pytest.raises(DataError, match=r"record 2 of latents-00000-of-00001\.array_record cannot be read"):
        source[2]


@pytest.mark.wrong_shapes
def test_a_shard_is_whole_or_absent(tmp_path):
    moments = np.zeros((2, 2, 4, 4, 6), np.float16)
    with pytest.raises(ValueError, match="zip"):
        write_shard(tmp_path / "shard", np.zeros(3, np.int32), moments)
    moments[1, 1, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"the moments for .*shard must be finite float16"):
        write_shard(tmp_path / "shard", np.zeros(2, np.int32), moments)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_no_shard(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def on_a_full_disk(path):
        with replacing(path) as temporary:
            temporary.unlink()
            temporary.symlink_to("/dev/full")
            yield temporary

    monkeypatch.setattr(record_files, "replacing", on_a_full_disk)
    with pytest.raises(OSError, match=r"shard cannot be written: .*[Nn]o space left"):
        write_shard(tmp_path / "shard", np.zeros(9, np.int32), np.zeros((9, 2, 32, 32, 8), np.float16))
    assert list(tmp_path.iterdir()) == []


def test_metadata_survive_the_disk(folder):
    metadata = LatentMetadata.read(folder)
    assert metadata.count == COUNT and len(metadata.shards) == 3 and dataclasses.is_dataclass(metadata.shards[0])


def test_a_shift_is_taken_off_before_latents_are_scaled(tmp_path):
    moments = np.zeros((1, 1, 2, 2, 6), np.float16)
    moments[..., :3], moments[..., 3:] = [1, -2, 0.1159], -30  # a deviation of 3e-7
    folder = write_set(tmp_path, moments, np.zeros(1, np.int32))
    before = make_source(config(folder, image_size=2, flip=False)).fingerprint
    dataclasses.replace(LatentMetadata.read(folder), scaling_factor=0.3611, shift_factor=0.1159).write(folder)
    assert make_source(config(folder, image_size=2, flip=False)).fingerprint != before
    (batch,) = take(1, config(folder, image_size=2, flip=False), batch_size=4)
    truth = (np.array([1, -2, np.float16(0.1159)], np.float64) - 0.1159) * 0.3611
    np.testing.assert_allclose(batch["image"], np.broadcast_to(truth, (4, 2, 2, 3)), atol=1e-5)


def test_sets_from_before_the_shift_was_written_are_read_as_they_were(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "set")
    values = json.loads((copy / "metadata.json").read_text())
    del values["shift_factor"]
    (copy / "metadata.json").write_text(json.dumps(values))
    assert make_source(config(copy)).fingerprint == make_source(config(folder)).fingerprint
    known = {name: value for name, value in values.items() if name not in ("format", "count", "images")}
    assert make_source(config(copy)).fingerprint == hash_of(["latents", json.dumps(known, sort_keys=True)])
