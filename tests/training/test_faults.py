"""What a bad disk or a kill costs: the steps since the newest whole checkpoint, and nothing else.

Each test notes what it found in a row of the table in docs/faults.md and fails when the table says otherwise;
`GSPN_WRITE_TABLE=1 python -m pytest tests/training/test_faults.py -m ""` writes the table anew.
"""

import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time

import pytest

from gspn_jax.runs import checkpoints, manifest
from gspn_jax.runs.checkpoints import CheckpointError
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state
from tests.quick_compile import QUICK_COMPILE
from tests.training import tiny
from tests.training.fault_states import NAMES, assert_is_state_of, one_device, restore, state_of

ROOT = pathlib.Path(__file__).parents[2]
TABLE = ROOT / "docs" / "faults.md"
STEPS = (10, 20)
ITEMS = ("params", "opt_state", "ema_0.9", "ema_0.99", "meta")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    config = tiny.config(run_dir)
    with Checkpoints(config, "f", NAMES) as saver:
        for step in STEPS:
            saver.save(step, state_of(config, step))
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def note(fault: str, outcome: str, lost: str) -> None:
    """Compares a row with that of docs/faults.md, or writes it."""
    row = f"| {fault} | {outcome} | {lost} |"
    lines = TABLE.read_text().splitlines()
    if os.environ.get("GSPN_WRITE_TABLE"):
        kept = [line for line in lines if not line.startswith(f"| {fault} |")]
        TABLE.write_text("\n".join([*kept, row]) + "\n")
    else:
        assert row in lines


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(step_dir, item):
    path = largest_file(step_dir / item)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def truncate(step_dir, item):
    path = largest_file(step_dir / item)
    os.truncate(path, path.stat().st_size // 2)


def remove(step_dir, item):
    largest_file(step_dir / item).unlink()


def remove_item(step_dir, item):
    shutil.rmtree(step_dir / item)


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (flip_a_bit, "one bit flipped", "content of .* has changed"),
        (truncate, "a file cut short", "bytes, not the"),
        (remove, "a file missing", "is missing"),
        (remove_item, "a folder missing", "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(run_dir, damage, name, said, item, caplog):
    damage(checkpoints.folder(run_dir) / "20", item)
    assert_is_state_of(restore(run_dir), 10)
    assert caplog.records[0].levelname == "ERROR"
    assert re.search(f"step 20 .* passed over: .*{said}", caplog.text)
    assert len(list((checkpoints.folder(run_dir) / "damaged").iterdir())) == 1  # kept to be looked at
    note(
        f"{name} in the newest checkpoint ({', '.join(ITEMS)}, each)",
        "goes on from the one before, with a line that names the file",
        "the steps since the one before",
    )


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda step_dir: (shutil.rmtree(step_dir), step_dir.mkdir()), "an empty step folder"),
        (lambda step_dir: (step_dir / manifest.NAME).unlink(), "a checkpoint without manifest"),
        (lambda step_dir: (step_dir / manifest.NAME).write_text('{"files": {"params": 3}}'), "a damaged manifest"),
        (lambda step_dir: (step_dir / manifest.NAME).write_bytes(b"\xff"), "a manifest of other bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_that_is_no_checkpoint_is_passed_over(run_dir, damage, name, caplog):
    damage(checkpoints.folder(run_dir) / "20")
    assert_is_state_of(restore(run_dir), 10)
    assert "step 20" in caplog.text and manifest.NAME in caplog.text
    note(name, "goes on from the one before, with a line that says so", "the steps since the one before")


def test_a_run_without_a_whole_checkpoint_stops_and_keeps_everything(run_dir):
    for step in STEPS:
        flip_a_bit(checkpoints.folder(run_dir) / str(step), "params")
    before = sorted(run_dir.rglob("*"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"found none \(step 20: .* has changed.*; step 10: .* another"):
            restore(run_dir)
    assert sorted(run_dir.rglob("*")) == before
    note(
        "all checkpoints damaged",
        "stops with a sentence that names each file; nothing is deleted, nothing starts anew",
        "nothing is trained",
    )


def test_sampling_takes_the_newest_whole_one_and_refuses_a_damaged_one_by_name(run_dir, caplog):
    flip_a_bit(checkpoints.folder(run_dir) / "20", "ema_0.9")
    step, config = checkpoints.read_config(run_dir)
    assert step == 10 and "step 20" in caplog.text
    with pytest.raises(CheckpointError, match=r"step 20 .* must be as it was saved, but the content of ema_0.9/"):
        checkpoints.restore_params(run_dir, 20, config, one_device())
    checkpoints.restore_params(run_dir, 20, config, one_device(), ema_decay=0.99)  # another item is whole


def test_after_a_fault_the_run_saves_the_same_step_again(run_dir):
    flip_a_bit(checkpoints.folder(run_dir) / "20", "params")
    config = tiny.config(run_dir)
    with Checkpoints(config, "f", NAMES) as saver:
        assert saver.restore(abstract_state(DiffusionTask(config), one_device()))[0] == 10
        saver.save(20, state_of(config, 20))
    assert_is_state_of(restore(run_dir), 20)


def test_a_disk_without_room_is_noticed_before_it_is_filled(run_dir, monkeypatch):
    config = tiny.config(run_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 4096, 4096))
    with (
        Checkpoints(config, "f", NAMES) as saver,
        pytest.raises(CheckpointError, match=r"step 30 needs 0.\d+ GB in .*, found 0.00 GB free; the last one"),
    ):
        saver.save(30, state_of(config, 30))
    assert checkpoints.steps(run_dir) == [10, 20]
    note(
        "no room for the next checkpoint",
        "stops with a sentence before anything is written",
        "the steps since the last save",
    )


UNWRITABLE = """
import ctypes, os, pathlib, resource, sys
if os.geteuid() == 0 and "OBEYS" not in os.environ:  # root writes everywhere unless its next self may not
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) == 0
    os.execve(sys.executable, sys.orig_argv, os.environ | {"OBEYS": "1"})
from gspn_jax import cli
cli.setup()
from gspn_jax.runs import checkpoints
from gspn_jax.runs.checkpoints import CheckpointError
from gspn_jax.runs.saving import Checkpoints
from tests.training import tiny
from tests.training.fault_states import NAMES, state_of
run_dir = pathlib.Path(sys.argv[1])
config = tiny.config(run_dir)
state = state_of(config, 30)

def save(name):
    try:
        with Checkpoints(config, "f", NAMES) as saver:
            saver.save(30, state)
    except CheckpointError as error:
        print(f"{name}: {error}")

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # what is longer fails to be written
save("full")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
checkpoints.folder(run_dir).chmod(0o500)
save("read-only during the run")
run_dir.chmod(0o500)
(run_dir / "lock").chmod(0o400)
print("newest:", checkpoints.read_config(run_dir)[0])
with cli.user_errors(CheckpointError):
    Checkpoints(config, "f", NAMES)
"""


def run_script(script, *arguments, before=()):
    env = os.environ | {"XLA_FLAGS": QUICK_COMPILE, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*before, sys.executable, "-c", script, *map(str, arguments)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_stops_the_run_with_a_sentence(run_dir):
    process = run_script(UNWRITABLE, run_dir)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 2, errors
    assert output.splitlines() == [
        f"{name}: the checkpoint of step 30 could not be written ({said}); the last one is of step 20, from which the "
        "same command goes on"
        for name, said in (("full", "File too large"), ("read-only during the run", "Permission denied"))
    ] + ["newest: 20"]  # what is only read can be read
    *swept, last = errors.splitlines()  # and nothing that orbax's and tensorstore's threads have to say
    assert last == f"error: Permission denied: {run_dir}/lock"
    assert all("removing the unfinished checkpoint" in line for line in swept), errors
    for path, mode in ((run_dir, 0o700), (checkpoints.folder(run_dir), 0o700), (run_dir / "lock", 0o600)):
        path.chmod(mode)
    assert_is_state_of(restore(run_dir), 20)
    assert not list(checkpoints.folder(run_dir).glob("*tmp*"))
    note(
        "the disk fills up during a save",
        "stops with a sentence; the same command sweeps what was half written and goes on",
        "the steps since the last save",
    )
    note(
        "a folder that is read-only, from the start or during the run",
        "stops with a sentence; sampling works",
        "the steps since the last save",
    )


FILLED = """
import pathlib, shutil, sys
import jax
from gspn_jax import cli
cli.setup()
from gspn_jax.runs import checkpoints
from gspn_jax.runs.checkpoints import CheckpointError
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state
from tests.training import tiny
from tests.training.fault_states import NAMES, assert_is_state_of, one_device, state_of
run_dir = pathlib.Path(sys.argv[1])
config = tiny.config(run_dir, keep_every=1)

def save_until_it_fails():
    newest = 0
    try:
        with Checkpoints(config, "f", NAMES) as saver:
            found = saver.restore(abstract_state(DiffusionTask(config), one_device()))
            if found:
                newest = found[0]
                assert_is_state_of((newest, jax.device_get(found[1].params)), newest)
            while True:
                saver.save(newest + 1, state_of(config, newest + 1))
                saver.wait()
                newest += 1
    except CheckpointError as error:
        print(newest, error, sep="|")

save_until_it_fails()
usage = shutil.disk_usage
(run_dir / "of another job").write_bytes(bytes(max(0, usage(run_dir).free - 2**17)))
shutil.disk_usage = lambda path: usage("/")  # as if the disk filled up behind the look at it
save_until_it_fails()
shutil.disk_usage = usage
(run_dir / "of another job").unlink()
shutil.rmtree(checkpoints.folder(run_dir) / "1")
save_until_it_fails()
print(*checkpoints.steps(run_dir), *checkpoints.folder(run_dir).glob("*tmp*"))
"""


@pytest.mark.slow
def test_a_file_system_that_is_really_full_costs_the_save(tmp_path):
    """A tmpfs of 6 MB, which an ordinary user can mount where the kernel allows user namespaces."""
    mount = 'mount -t tmpfs -o size=6m tmpfs "$0" && exec "$@"'
    process = run_script(
        FILLED, tmp_path, before=["unshare", "--map-root-user", "--mount", "bash", "-c", mount, str(tmp_path)]
    )
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    *failures, kept = output.splitlines()
    (before, room), (same, filled), (after, _) = (line.split("|") for line in failures)
    assert before == same and int(before) >= 3 and int(after) == int(before) + 1  # for the one that was deleted
    assert re.search(r"step \d+ needs 0.00 GB in .*, found 0.00 GB free; the last one is of step " + before, room)
    assert f"could not be written (No space left on device); the last one is of step {before}" in filled
    assert kept.split() == [str(step) for step in range(2, int(after) + 1)]
    note(
        "a file system of 6 MB filled to the last byte by checkpoints, and by another job during a save (mounted for "
        "the test)",
        "stops with a sentence; once there is room the same command goes on",
        "the steps since the last save",
    )


SAVE_FOR_EVER = """
import itertools, sys
import jax
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import abstract_state, create_state
from tests.training import tiny
from tests.training.fault_states import NAMES, one_device
config = tiny.config(sys.argv[1])
state = create_state(DiffusionTask(config), one_device())
with Checkpoints(config, "f", NAMES) as saver:
    found = saver.restore(abstract_state(DiffusionTask(config), one_device()))
    for step in itertools.count(found[0] + 1 if found else 1):
        saver.save(step, jax.tree.map(lambda a: a + a.dtype.type(step), state))
        print(step, flush=True)
        saver.wait()
        print("committed", step, flush=True)
"""


def kill_during_saves(run_dir, kills, seed):
    """Kills a process that does nothing but save, at random points; what is restored is what was committed last."""
    rng = random.Random(seed)
    for _ in range(kills):
        process = run_script(SAVE_FOR_EVER, run_dir)
        first = process.stdout.readline()
        assert first, process.stderr.read()
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        lines = [first.strip(), *process.communicate()[0].split("\n")]
        committed = [int(line.split()[1]) for line in lines if line.startswith("committed ")]
        found = restore(run_dir)
        if committed:
            assert found[0] in (committed[-1], committed[-1] + 1)  # committed, and killed before it could say so
        if found:
            assert_is_state_of(found, found[0])
            assert not list(checkpoints.folder(run_dir).glob("*tmp*")), "the half-written one is swept"
            assert checkpoints.steps(run_dir)[-1] == found[0] and len(checkpoints.steps(run_dir)) <= 3


@pytest.mark.slow
def test_a_kill_during_a_save_costs_that_save(tmp_path):
    kill_during_saves(tmp_path / "run", kills=2, seed=time.time_ns())


@pytest.mark.slow
def test_fifty_kills_during_saves_cost_nothing_else(tmp_path):
    kill_during_saves(tmp_path / "run", kills=50, seed=0)
    note(
        "killed at 50 random points of a save",
        "goes on from the last commit; what was half written is swept",
        "the steps since the last commit",
    )
