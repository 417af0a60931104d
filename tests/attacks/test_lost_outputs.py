"""Attacks on what is written (A): by one process at a time, over nothing of a user, and kept when there is no room."""

import errno
import json
import os
import types

import pytest

from gspn_jax import classify, prepare, sample, text_to_image
from gspn_jax.files import claim, new_folder, replacing
from gspn_jax.prepare import records
from tests.attacks.attack import GOES_ON, Attack, draw, flags, rows
from tests.attacks.attack import convert as converted
from tests.attacks.attack import evaluate as evaluated
from tests.attacks.given import write
from tests.attacks.lost import both, claimed, drawn, function, latents, sampled, samples, save_small
from tests.training import tiny

# --- A3: two processes, one output


def users_files(given, here):
    for name in ("q.npz.tmp", "q.npz.partial/precious", ".q.npz.swp"):
        write(name, "precious")(given, here)


def appears(given, here, patch):
    def draw(labels, numbers):
        (here / "q.npz").write_text("precious")
        return drawn(labels, numbers)

    samples(here, draw)


def folder_appears(given, here, patch):
    with new_folder(here / "mine", bytes_needed=1) as folder:
        (folder / "a").write_text("a")
        write("mine/precious", "precious")(given, here)


def export_beside(given, here, patch):
    with new_folder(here / "mine", bytes_needed=1) as folder:
        (folder / "a").write_text("a")


def long_name(given, here, patch):
    with claim(here / ("n" * 250)), replacing(here / ("n" * 250)) as temporary:
        temporary.write_text("a")


def takes_over(given, here, patch):
    with claim(here / "q.npz"), replacing(here / "q.npz") as temporary:
        temporary.write_text("a")
    left = [path.name for path in here.iterdir()]
    assert left == ["q.npz"], left


def no_locks(given, here, patch):
    import fcntl

    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    patch.setattr(fcntl, "flock", flock)
    samples(here)


def trains_beside(given, here, patch):
    from gspn_jax.runs.saving import Checkpoints

    with Checkpoints(tiny.config(here / "run"), "f", ["0"]):
        save_small(here, 3)


def finds_grid_0_claimed(given, here, patch):
    (here / "grid_1.png").write_text("precious")
    with claim(here / "grid_0.png"), sample.Arguments(run=str(here)).claimed() as path:
        assert path == here / "grid_2.png", path


UNFINISHED = ".q.npz.0123456789abcdef.unfinished"

A3 = [
    Attack(
        "A3",
        f"{what} that another process makes",
        claimed(name, make),
        f"{{here}}/{name} is being made by process",
        writes=("out*",),
    )
    for what, name, make in (
        ("samples", "q.npz", draw("--num-samples", "4", "--output", "{here}/q.npz")),
        ("a grid", "g.png", draw("--output", "{here}/g.png")),
        ("a shard of latents", "out/latents-00000-of-00001.array_record", latents()),
    )
] + [
    Attack(
        "A3",
        "an export that another process makes",
        claimed("mine", converted("export", "--run", "{run}", "--output", "{here}/mine")),
        "{here}/mine is being made by process",
        devices=True,
    ),
    Attack(
        "A3",
        "training where another process trains",
        function(trains_beside),
        ("another process is training in {here}/run, process", "choose another run_dir"),
        writes=("run*",),
    ),
    Attack(
        "A3",
        "a grid without a name while grid_0.png is made and grid_1.png is there",
        function(finds_grid_0_claimed),
        "",
        code=GOES_ON,
        writes=("grid_1.png",),
    ),
    Attack(
        "A3",
        "samples into q.npz beside a user's q.npz.tmp and q.npz.partial",
        function(sampled, users_files),
        "",
        code=GOES_ON,
        writes=("q.npz",),
    ),
    Attack(
        "A3",
        "an export into mine beside a user's mine.tmp",
        function(export_beside, write("mine.tmp", "precious")),
        "",
        code=GOES_ON,
        writes=("mine", "mine/a"),
    ),
    Attack(
        "A3",
        "the output appears while it is drawn",
        function(appears),
        "{here}/q.npz was written by another program in the meantime",
        writes=("q.npz*",),
    ),
    Attack(
        "A3",
        "the folder appears while it is filled",
        function(folder_appears),
        "{here}/mine exists already",
        writes=("mine*",),
    ),
    Attack("A3", "an output of a name of 250 bytes", function(long_name), "", code=GOES_ON, writes=("n*",)),
    Attack(
        "A3",
        "what a killed process left of the same output",
        function(takes_over, both(write(UNFINISHED, "left"), write(".q.npz.lock", "{}"))),
        "",
        code=GOES_ON,
        writes=("q.npz", UNFINISHED, ".q.npz.lock"),
    ),
    Attack(
        "A3",
        "a file system without locks",
        function(no_locks),
        "the file system has no locks",
        code=GOES_ON,
        writes=("q.npz",),
    ),
]


# --- A7: work that ends before it is written

RESULT = {
    "metrics": {"fid": 3.5},
    "samples": {"count": 4, "image_size": [8, 8], "source": "s.npz"},
    "reference": None,
    "warnings": [],
}


def scored(full, shown=True):
    """The result of an evaluation, where the disks of the folders `full` have no room."""

    def action(given, here, patch):
        import tempfile

        from gspn_jax import files
        from gspn_jax.evaluate import scoring

        (here / "tmp").mkdir()
        patch.chdir(here)
        patch.setattr(tempfile, "tempdir", str(here / "tmp"))
        create = files._create_locked

        def no_room(path):
            if str(path.absolute().parent.relative_to(here)) in full:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return create(path)

        patch.setattr(files, "_create_locked", no_room)
        (here / "run").mkdir()
        try:
            scoring.finish(RESULT, types.SimpleNamespace(output=None), here / "run" / "r.json")
        finally:
            found = [path for path in here.rglob("r.json") if json.loads(path.read_text()) == RESULT]
            assert len(found) == (len(full) < 3), found

    return function(action)


def damaged_shard(given, here):
    """Images as a kill leaves them before the metadata are written, with one byte of a shard changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_finish", lambda *_: None)
        prepare.main(["images", "--images", str(given.images), "--output", str(here / "out"), "--shard-size", "2"])
    shard = sorted((here / "out").glob("*.bin"))[1]
    shard.write_bytes(b"\1" + shard.read_bytes()[1:])


A4 = [
    Attack(
        "C16",
        "prompts that are a pipe to which nobody writes",
        flags(
            text_to_image.main, "--model", "none", "--prompts", "{here}/p", "--output", "{here}/x.png",
            before=lambda given, here: os.mkfifo(here / "p"),
        ),
        "--prompts must be a text file, found a folder, pipe or device",
    ),
    Attack(
        "A4",
        "decoded images are gone on with after a byte of one shard has changed",
        flags(
            prepare.main, "images", "--images", "{images}", "--output", "{here}/out", "--shard-size", "2",
            before=damaged_shard,
        ),
        "is decoded again: its content has changed",
        GOES_ON,
        writes=("out/*",),
    )
]  # fmt: skip
ACCURACY = ("evaluate", "--run", "{run}", "--images", "{images}")

A7 = [
    Attack(
        "A7",
        "a score whose run directory is full",
        scored(("run",)),
        (
            "the result could not be written to {here}/run/r.json (No space left on device)",
            "it is kept in {here}/r.json",
        ),
        writes=("run", "tmp", "r.json"),
    ),
    Attack(
        "A7",
        "a score whose disk is full, but for the folder of temporary files",
        scored(("run", ".")),
        "it is kept in {here}/tmp/r.json",
        writes=("run", "tmp*"),
    ),
    Attack(
        "A7",
        "a score while all disks are full",
        scored(("run", ".", "tmp")),
        "nor elsewhere: it is printed above",
        writes=("run", "tmp"),
    ),
    Attack(
        "A7",
        "an evaluation whose result another process makes",
        claimed("r.json", evaluated("--samples", "{images}/a", "--output", "{here}/r.json")),
        "{here}/r.json is being made by process",
    ),
    Attack(
        "A7",
        "a classifier's accuracy that another process writes",
        claimed("r.json", flags(classify.main, *ACCURACY, "--output", "{here}/r.json")),
        "{here}/r.json is being made by process",
    ),
    Attack(
        "A7",
        "a classifier's accuracy into a folder that is not there",
        flags(classify.main, *ACCURACY, "--output", "{here}/none/r.json"),
        "--output must lie in a folder that exists",
    ),
]


ATTACKS = [*A3, *A4, *A7]


@rows(ATTACKS)
def test_no_output_is_lost(attack, withstand):
    withstand(attack)
