"""The stream of batches depends on the seed and the step only: not on workers, hosts, or where a run was resumed."""

import itertools
import logging
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from PIL import Image

import gspn_jax.data.grain_loader as loader_module
from gspn_jax.config import ConfigError, DataConfig
from gspn_jax.data import DataError, make_loader, make_source


class NumberedSource:
    """Image i is the number i in its first pixel and a mark in its left column, so that a flip shows."""

    def __init__(self, length: int):
        self._length = length
        self.class_names, self.fingerprint = tuple("0123456789"), ""

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        image = np.zeros((4, 4, 1), np.uint8)
        image[1, :, 0] = index
        image[0, 0, 0] = 255
        return {"image": image, "label": np.int32(index % 10)}


def numbers(batch: dict) -> list[int]:
    return batch["image"][:, 1, 0, 0].tolist()


def flipped(batch: dict) -> list[bool]:
    return (batch["image"][:, 0, -1, 0] == 255).tolist()


def config(**changes) -> DataConfig:
    return DataConfig(**{"image_size": 4, "channels": 1, **changes})


def take(count: int, source, *, data: DataConfig | None = None, **options) -> list[dict]:
    with make_loader(data or config(), source, **{"batch_size": 8, "seed": 3, **options}) as loader:
        return list(itertools.islice(loader, count))


def assert_same(batches: list[dict], others: list[dict]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == {"image", "label"}
        np.testing.assert_array_equal(batch["image"], other["image"])
        np.testing.assert_array_equal(batch["label"], other["label"])


def test_every_epoch_has_every_image_once_in_an_order_of_its_own():
    # 20 images in batches of 8: epochs end within batches
    batches = take(15, NumberedSource(20))
    order = np.array([number for batch in batches for number in numbers(batch)]).reshape(6, 20)
    for epoch in order:
        assert sorted(epoch) == list(range(20))
    assert len({tuple(epoch) for epoch in order}) == 6
    assert all(batch["label"].tolist() == [n % 10 for n in numbers(batch)] for batch in batches)
    assert batches[0]["image"].dtype == np.uint8 and batches[0]["image"].shape == (8, 4, 4, 1)
    assert batches[0]["label"].dtype == np.int32 and batches[0]["label"].shape == (8,)


def test_a_set_smaller_than_the_batch_is_repeated():
    (batch,) = take(1, NumberedSource(3), batch_size=9)
    assert sorted(numbers(batch)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_seed_decides_the_order():
    source = NumberedSource(50)
    assert_same(take(4, source), take(4, source))
    assert numbers(take(1, source)[0]) != numbers(take(1, source, seed=4)[0])


@pytest.mark.parametrize("start_step", [1, 7, 12345])
def test_a_loader_that_starts_later_continues_the_same_stream(start_step):
    source, data = NumberedSource(20), config(flip=True)
    resumed = take(3, source, data=data, start_step=start_step)
    if start_step < 100:
        assert_same(resumed, take(start_step + 3, source, data=data)[start_step:])
    assert_same(resumed, take(4, source, data=data, start_step=start_step - 1)[1:])


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_hosts_blocks_make_the_single_hosts_batch(hosts):
    source, data = NumberedSource(20), config(flip=True)
    single = take(6, source, data=data, start_step=2)
    parts = [take(6, source, data=data, start_step=2, num_hosts=hosts, host=host) for host in range(hosts)]
    joined = [
        {name: np.concatenate([part[step][name] for part in parts]) for name in ("image", "label")} for step in range(6)
    ]
    assert_same(joined, single)


def test_flips_are_fair_and_drawn_anew_each_epoch():
    batches = take(50, NumberedSource(200), data=config(flip=True))
    drawn = np.zeros((2, 200), bool)
    for place, (number, mirror) in enumerate(
        (n, m) for batch in batches for n, m in zip(numbers(batch), flipped(batch), strict=True)
    ):
        drawn[place // 200, number] = mirror
    # 200 fair coins: 100 +- 5 standard deviations of 7.07
    assert abs(drawn[0].sum() - 100) < 36 and abs(drawn[1].sum() - 100) < 36
    assert abs((drawn[0] != drawn[1]).sum() - 100) < 36
    assert not any(itertools.chain(*map(flipped, take(5, NumberedSource(200)))))


def test_wrong_hosts_get_a_sentence():
    with pytest.raises(ConfigError, match=r"train\.batch_size must be a multiple of the number of hosts \(3\)"):
        take(1, NumberedSource(5), num_hosts=3)
    with pytest.raises(ValueError, match=r"host must be in \[0, 2\), found 2"):
        take(1, NumberedSource(5), num_hosts=2, host=2)


def assert_no_threads_or_processes_left() -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]
        if not threads and not multiprocessing.active_children():
            return
        time.sleep(0.05)
    raise AssertionError(f"left behind: {threads} {multiprocessing.active_children()}")


def test_closing_ends_the_threads():
    loader = make_loader(config(), NumberedSource(20), batch_size=8, seed=0)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    assert_no_threads_or_processes_left()


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two classes of six images with levels 0, 10, ... 110; the fourth (level 30) is cut short."""
    for i in range(12):
        path = tmp_path / ("cat" if i < 6 else "dog") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), 10 * i).save(path)
    broken = tmp_path / "cat/03.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    return tmp_path


def folder_config(path: pathlib.Path, **changes) -> DataConfig:
    return config(source="folder", path=str(path), num_classes=2, **changes)


def levels(batches: list[dict]) -> list[int]:
    return [int(image[0, 0, 0]) for batch in batches for image in batch["image"]]


def test_a_bad_image_stops_the_run_at_its_place_and_is_named(folder):
    data = folder_config(folder)
    source = make_source(data)
    order = take(3, NumberedSource(12), batch_size=4)  # the order depends on the length, batch size and seed only
    bad_step = next(step for step, batch in enumerate(order) if 3 in numbers(batch))
    with make_loader(data, source, batch_size=4, seed=3) as loader:
        for step in range(bad_step):
            assert levels([next(loader)]) == [10 * n for n in numbers(order[step])]
        with pytest.raises(DataError, match=r"cat/03\.png is not a usable image: .*truncated"):
            next(loader)
    assert_no_threads_or_processes_left()


def test_a_bad_image_is_replaced_and_counted_once(folder, caplog):
    (folder / "dog/11.png").write_bytes(b"")
    data = folder_config(folder, bad_images="skip")
    source = make_source(data)
    with caplog.at_level(logging.WARNING, "gspn_jax.data"), make_loader(data, source, batch_size=4, seed=3) as loader:
        batches = list(itertools.islice(loader, 9))
        assert len(loader.bad_images) == 2
    for epoch in range(3):
        # the next good image stands in: 04 for 03, and 00 (the first) for 11 (the last)
        assert sorted(levels(batches[3 * epoch : 3 * epoch + 3])) == [0, 0, 10, 20, 40, 40, 50, 60, 70, 80, 90, 100]
    labels = [label for batch in batches for label in batch["label"]]
    assert [int(level >= 60) for level in levels(batches)] == labels
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert {name for name in ("cat/03.png", "dog/11.png") for text in messages if name in text} == {
        "cat/03.png",
        "dog/11.png",
    }
    assert messages[0].endswith("(bad images so far: 1)") and messages[1].endswith("(bad images so far: 2)")


def test_a_set_of_bad_images_only_is_an_error_even_when_skipping(folder):
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"broken")
    data = folder_config(folder, bad_images="skip")
    with (
        make_loader(data, make_source(data), batch_size=4, seed=3) as loader,
        pytest.raises(DataError, match=r"12 images in a row cannot be used; the first: .*\.png is not a usable"),
    ):
        next(loader)


def test_worker_processes_give_the_same_stream_and_the_same_warnings(folder, caplog):
    data = folder_config(folder, bad_images="skip", flip=True)
    source = make_source(data)
    alone = take(7, source, data=data, batch_size=4, start_step=2)
    caplog.clear()
    shared = folder_config(folder, bad_images="skip", flip=True, workers=2)
    with make_loader(shared, source, batch_size=4, seed=3, start_step=2) as loader:
        together = list(itertools.islice(loader, 7))
        assert len(multiprocessing.active_children()) == 2
    assert_same(together, alone)  # also that batches stay intact while later ones are read
    assert [record.getMessage().count("cat/03.png") for record in caplog.records] == [1]
    assert_no_threads_or_processes_left()


SCRIPT = """
import signal, sys, time

from gspn_jax.config import DataConfig
from gspn_jax.data import make_loader, make_source

if __name__ == "__main__":
    data = DataConfig(source="folder", path=sys.argv[1], num_classes=2, bad_images="skip", workers=1)
    batches = make_loader(data, make_source(data), batch_size=4, seed=0)
    for _ in range(3):
        batch = next(batches)
    print(batch["image"].shape, type(batch["image"]).__name__, flush=True)
    {last}
"""


def start_script(folder: pathlib.Path, tmp_path: pathlib.Path, last: str, **options) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{last}", last))
    root = pathlib.Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-W", "always::ResourceWarning", str(script), str(folder)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
        **options,
    )


@pytest.mark.parametrize("last", ["batches.close()", "pass"], ids=["closed", "forgotten"])
def test_a_script_that_uses_workers_ends_quietly(folder, tmp_path, last):
    # Leaked processes, shared memory or threads show on stderr, or as a script that does not end.
    with start_script(folder, tmp_path, last) as script:
        output, errors = script.communicate(timeout=60)
    assert script.returncode == 0 and output == "(4, 8, 8, 1) ndarray\n"
    assert [line for line in errors.splitlines() if "cat/03.png" not in line and "1 .py" not in line] == []


def test_workers_outlive_signals_to_the_job_but_not_their_main_process(folder, tmp_path):
    # Ctrl-C and a scheduler's SIGTERM reach every process; here the main one ignores them and takes more batches.
    last = (
        "[signal.signal(kind, signal.SIG_IGN) for kind in (signal.SIGINT, signal.SIGTERM)]; "
        "print('ready', flush=True); time.sleep(2); "
        "[next(batches) for _ in range(30)]; print('went on', flush=True); time.sleep(60)"
    )
    with start_script(folder, tmp_path, last, start_new_session=True) as script:
        for line in script.stdout:
            if line == "ready\n":
                os.killpg(script.pid, signal.SIGINT)
                os.killpg(script.pid, signal.SIGTERM)
            if line == "went on\n":
                break
        else:
            raise AssertionError(script.stderr.read())
        script.kill()
        script.communicate(timeout=20)  # reads to the end: until no process holds the script's output any more


@pytest.mark.slow
def test_a_worker_that_is_killed_is_a_sentence():
    data = config(workers=2)
    with make_loader(data, make_source(data), batch_size=8, seed=0) as loader:
        next(loader)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(DataError, match=r"a process that reads images has ended by itself.*exit code -9"):
            for _ in range(1000):
                next(loader)


def test_too_little_shared_memory_for_the_workers_gets_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(loader_module, "_SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10_000_000))
    with pytest.raises(
        ConfigError,
        match=r"data\.workers=4 needs 201 MB of shared memory for batches of 64 images, "
        r"found 10 MB free in .*: use fewer workers",
    ):
        take(1, NumberedSource(5), data=config(image_size=256, channels=3, workers=4), batch_size=64)
