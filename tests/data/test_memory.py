"""Images give the stream that Grain's own steps give, to the bit, read or kept in memory; what does not fit into memory
is refused before it is decoded."""

import itertools
import logging
import pathlib
import re

import grain
import numpy as np
import pytest
from grain.experimental import index_shuffle
from PIL import Image

from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data import DataError, make_loader, make_source, memory, order


class Numbered:
    """Image i has the number i in its pixels, and differs from its mirror image."""

    class_names, fingerprint = tuple("0123456789"), "0"

    def __init__(self, length: int, channels: int = 3):
        self._length, self._channels = length, channels

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        pixels = np.arange(16 * self._channels).reshape(4, 4, self._channels)
        return {"image": (pixels + 37 * index).astype(np.uint8), "label": np.int32(index % 10)}


def config(**changes) -> DataConfig:
    return DataConfig(**{"image_size": 4, "channels": 3, "flip": True, **changes})


def take(count: int, source, data: DataConfig, **options) -> list[dict]:
    with make_loader(data, source, **{"batch_size": 8, "seed": 3, **options}) as loader:
        return list(itertools.islice(loader, count))


def grain_stream(source, *, flip: bool = True, seed: int = 3) -> grain.MapDataset:
    """The stream in batches of 8, shuffled and flipped by Grain."""

    def random_flip(record: dict, rng: np.random.Generator) -> dict:
        return {**record, "image": record["image"][:, ::-1]} if rng.integers(2) else record

    records = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    return (records.random_map(random_flip) if flip else records).batch(8)


def assert_same(batches: list[dict], others: list[dict]) -> None:
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert {name: (a.dtype, a.shape) for name, a in batch.items()} == {
            name: (a.dtype, a.shape) for name, a in other.items()
        }
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize("in_memory", [False, True], ids=["read", "in memory"])
@pytest.mark.parametrize("length", [1, 3, 20, 300])
@pytest.mark.parametrize("changes", [{}, {"flip": False}, {"channels": 1}], ids=["flips", "no flips", "grey"])
def test_several_epochs_are_grains(length, changes, in_memory):
    source, data = Numbered(length, changes.get("channels", 3)), config(in_memory=in_memory, **changes)
    for seed in (0, 3, 2**40 + 1):
        wanted = grain_stream(source, flip=data.flip, seed=seed)[: 3 * length // 8 + 3]
        assert_same(take(len(wanted), source, data, seed=seed), [*wanted])


@pytest.mark.parametrize("start_step", [1, 7, 123_456_789])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_every_host_goes_on_at_any_step_as_grain_does(start_step, hosts):
    for host in range(hosts):
        place = {"start_step": start_step, "num_hosts": hosts, "host": host}
        wanted = [
            {name: np.split(values, hosts)[host] for name, values in grain_stream(Numbered(20))[step].items()}
            for step in range(start_step, start_step + 5)
        ]
        for in_memory in (False, True):
            assert_same(take(5, Numbered(20), config(in_memory=in_memory), **place), wanted)


# the cipher's block has 2**16 indices or more: a larger set is shuffled an index at a time; 2**16 + 1 has Grain's gap
@pytest.mark.parametrize("length", [65_536, 65_537, 70_000, 2**18 + 1])
def test_the_end_of_an_epoch_of_a_large_set_is_grains(length):
    for epoch in (1, 50):
        step = (epoch * length - 20) // 8
        wanted = grain_stream(Numbered(length))
        assert_same(take(6, Numbered(length), config(), start_step=step), [wanted[step + i] for i in range(6)])


def test_a_set_by_its_name_is_decoded_once_and_stays_the_same_run():
    data = DataConfig(source="digits")
    source, kept = make_source(data), make_source(DataConfig(source="digits", in_memory=True))
    assert isinstance(kept, memory.MemorySource) and len(kept) == len(source) == 1797
    assert (kept.fingerprint, kept.class_names) == (source.fingerprint, source.class_names)
    assert all(np.array_equal(kept[i][name], source[i][name]) for i in (0, 1000, 1796) for name in ("image", "label"))
    assert_same(take(3, kept, DataConfig(in_memory=True), batch_size=64), take(3, source, data, batch_size=64))


def test_worker_processes_of_the_grain_loader_give_the_same():
    alone = take(6, Numbered(20), config(in_memory=True), start_step=2)
    for workers in (1, 2):
        assert_same(alone, take(6, Numbered(20), config(workers=workers), start_step=2))


# around powers of two the cipher's block changes; below 2**16 it does not
@pytest.mark.parametrize("length", [2, 12, 255, 1797, 50_000, 65_535, 65_536, 65_538, 262_144, 300_000])
def test_an_epoch_is_grains_permutation(length):
    chosen = np.unique(np.random.default_rng(length).integers(length, size=200))
    for seed in (0, 5, 2**32 - 1):
        wanted = [index_shuffle(int(i), max_index=length - 1, seed=seed, rounds=4) for i in chosen]
        found = order._epoch(length, seed)
        np.testing.assert_array_equal(found[chosen], wanted)
        np.testing.assert_array_equal(np.sort(found), np.arange(length))


def test_grains_gap_is_kept():
    # Grain's cipher has a bit too few for 2**16 + 1 images (2**18 + 1, ...): the last place gets the first one's image
    found = order._epoch(65_537, 5)
    assert found[0] == found[-1] == index_shuffle(65_536, max_index=65_536, seed=5, rounds=4)
    assert len(np.unique(found)) == 65_536


def test_batches_are_the_users_to_change():
    data, source = config(in_memory=True), memory.MemorySource(Numbered(20), config())
    first = take(1, source, data)[0]
    kept = {name: values.copy() for name, values in first.items()}
    for values in first.values():
        values[:] = 0
    assert_same(take(1, source, data), [kept])


def test_a_closed_loader_says_so():
    loader = make_loader(config(in_memory=True), Numbered(20), batch_size=8, seed=0)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two classes of six images; two of the first are damaged, and the last of all."""
    for i in range(12):
        path = tmp_path / ("cat" if i < 6 else "dog") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(256, size=(4, 4, 3), dtype=np.uint8)).save(path)
    for name in ("cat/03", "cat/04", "dog/11"):
        (tmp_path / f"{name}.png").write_bytes(b"broken")
    return tmp_path


def folder_config(folder: pathlib.Path, **changes) -> DataConfig:
    return config(source="folder", path=str(folder), num_classes=2, **changes)


def test_bad_images_are_replaced_and_counted_as_by_the_grain_loader(folder, caplog):
    data = folder_config(folder, bad_images="skip")
    grain = take(9, make_source(data), data)
    warnings = {re.sub(r"\(.*", "", record.getMessage()) for record in caplog.records}
    caplog.clear()
    data = folder_config(folder, bad_images="skip", in_memory=True)
    source = make_source(data)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert_same(take(9, source, data), grain)
    assert {re.sub(r"\(.*", "", text) for text in messages} == warnings and len(warnings) == 3
    assert [text[-2] for text in messages] == ["1", "2", "3"]  # "(bad images so far: 1)"
    with make_loader(data, source, batch_size=4, seed=0) as loader:
        assert len(loader.bad_images) == 3


def test_a_bad_image_stops_the_run_before_it_begins_and_is_named(folder):
    with pytest.raises(DataError, match=r"cat/03\.png is not a usable image"):
        make_source(folder_config(folder, in_memory=True))


def test_a_set_of_bad_images_only_is_an_error_even_when_skipping(folder):
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"12 images in a row cannot be used; the first: .*00\.png is not a usable"):
        make_source(folder_config(folder, bad_images="skip", in_memory=True))


def test_a_set_that_does_not_fit_is_refused_before_it_is_decoded(monkeypatch):
    class Unread(Numbered):
        def __getitem__(self, index):
            raise AssertionError("an image was decoded")

    monkeypatch.setattr(memory, "free_memory", lambda: 59_000_000)
    data = config(in_memory=True, image_size=32)
    with pytest.raises(
        ConfigError,
        match=r"data\.in_memory needs a set of at most 80% of the memory that is free "
        r"\(0\.059 GB\), found one too large: 16,000 images of 32x32x3 take 0\.0492 "
        r"GB of memory on each host; without it",
    ):
        memory.MemorySource(Unread(16_000), data)


@pytest.mark.parametrize("changes, sentence", [
    ({"source": "latents", "path": "x"}, "data.in_memory must be False when data.source is 'latents', which are not "
                                         "decoded, found True"),
    ({"workers": 2}, "data.workers must be 0 with data.in_memory, which leaves nothing to decode while training, "
                     "found 2"),
])  # fmt: skip
def test_settings_that_make_no_sense_get_a_sentence(changes, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        config(in_memory=True, **changes)
