"""Samples by the thousand: nothing is lost by a kill, a full disk or a second call."""

import errno
import json
import shutil

import numpy as np
import pytest

from gspn_jax.config import ConfigError
from gspn_jax.sampling.files import PARTIAL, write_npz

SHAPE = (3, 4, 2)
LABELS, SEEDS = np.arange(10) % 3, 100 + np.arange(10)


def draw(labels, seeds):
    """Pixels that tell which label and seed they are of."""
    return (np.ones(SHAPE) * (labels * 50 + seeds - 100)[:, None, None, None]).astype(np.uint8)


def write(path, draw=draw, **changed):
    arguments = {"shape": SHAPE, "batch_size": 4, "settings": {"seed": 100}} | changed
    write_npz(path, draw, LABELS, SEEDS, **arguments)


def assert_whole(path):
    with np.load(path) as file:
        np.testing.assert_array_equal(file["arr_0"], draw(LABELS, SEEDS))
        np.testing.assert_array_equal(file["arr_1"], LABELS)
        assert file["arr_0"].dtype == np.uint8 and file["arr_1"].dtype == np.int64
        assert json.loads(str(file["settings"])) == {"seed": 100}
    assert not path.with_name(path.name + PARTIAL).exists()


def test_all_images_and_labels_in_order(tmp_path):
    counts = []
    write(tmp_path / "s.npz", done=counts.append)
    assert_whole(tmp_path / "s.npz")
    assert counts == [0, 4, 8, 10]


@pytest.mark.parametrize("failing_batch", [0, 1, 2])
def test_goes_on_behind_the_last_whole_batch(tmp_path, failing_batch):
    path, drawn = tmp_path / "s.npz", []

    def dies(labels, seeds):
        if len(drawn) == failing_batch:
            raise KeyboardInterrupt
        drawn.append(seeds)
        return draw(labels, seeds)

    with pytest.raises(KeyboardInterrupt):
        write(path, dies)
    assert not path.exists()
    with open(tmp_path / f"s.npz{PARTIAL}" / "images.bin", "ab") as file:
        file.write(b"half a batch")  # as a kill in the middle of a write leaves it
    again = []
    write(path, lambda labels, seeds: again.append(seeds) or draw(labels, seeds))
    assert_whole(path)
    np.testing.assert_array_equal(np.concatenate(drawn + again), SEEDS)


def test_a_full_disk_stops_it_and_keeps_what_is_there(tmp_path, monkeypatch):
    path, calls = tmp_path / "s.npz", []

    def full(labels, seeds):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return draw(labels, seeds)

    with pytest.raises(OSError, match="No space left"):
        write(path, full)
    assert len((tmp_path / f"s.npz{PARTIAL}" / "batches.jsonl").read_text().splitlines()) == 1
    write(path)
    assert_whole(path)


def test_a_disk_that_is_too_small_is_seen_before_drawing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ConfigError, match=r"10 images of 3x4x2 need 0.00 GB .* found 0.00 GB free"):
        write(tmp_path / "s.npz", lambda *_: pytest.fail("drawn"))


def test_a_result_is_never_overwritten(tmp_path):
    write(tmp_path / "s.npz")
    with pytest.raises(ConfigError, match="exists already"):
        write(tmp_path / "s.npz")


def test_a_partial_result_of_other_settings_is_refused(tmp_path):
    def dies(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s.npz", lambda labels, seeds: draw(labels, seeds) if seeds[0] == 100 else dies())
    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        write(tmp_path / "s.npz", settings={"seed": 7})
