"""Attacks on what a run has made (A): nothing is lost, and nothing is wrong in silence.

Where a row needs a full disk, another process or another host it calls our function with a stand-in for it; runs of
several processes are in tests/training/test_hosts.py and test_faults.py.
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import signal
import socket
import sys
import threading
import types

import numpy as np
import pytest

import train_dit
from gspn_jax import cli, sample
from gspn_jax.files import claim, new_folder, replacing
from tests.attacks.attack import GOES_ON, Attack, Call, draw, rows, train
from tests.attacks.attack import convert as converted
from tests.attacks.attack import evaluate as evaluated
from tests.attacks.attack import prepare as prepared
from tests.attacks.given import write
from tests.training import tiny


def flip_a_byte(checkpoints):
    """In a file of the first average, in every checkpoint."""
    for path in checkpoints.glob("*/ema_0.9/_METADATA"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(bytes(content))


def function(action, before=None):
    """A row's `make`: `action(given, here)` under the commands' handler of errors."""

    def make(given, here):
        if before:
            before(given, here)

        def main(_):
            from gspn_jax.runs.checkpoints import CheckpointError

            with cli.user_errors(CheckpointError), pytest.MonkeyPatch.context() as patch:
                action(given, here, patch)

        return Call(main)

    return make


def both(*actions):
    """A `before` of several."""

    def before(given, here):
        for action in actions:
            action(given, here)

    return before


# --- A1: a save is not a save until it was read


class Small:
    """A state of a few numbers, as `runs.saving` takes it."""

    def items(self):
        import jax.numpy as jnp

        return {"params": {"w": jnp.arange(8.0), "b": jnp.ones(2)}}

    def of_items(self, step, items):
        return self


def save_small(here, *steps, **settings):
    from gspn_jax.runs.saving import Checkpoints

    with Checkpoints(tiny.config(here / "run", **settings), "f", ["0"]) as saver:
        for step in steps:
            saver.save(step, Small())


def first_save_is_damaged(given, here, patch):
    from gspn_jax.runs import saving

    finish = saving.Checkpoints._finish

    def finish_and_damage(self):
        finish(self)
        for path in (here / "run" / "checkpoints" / "3" / "params").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")

    patch.setattr(saving.Checkpoints, "_finish", finish_and_damage)
    save_small(here, 3)


def first_save_has_other_values(given, here, patch):
    from gspn_jax.runs import readback

    patch.setattr(readback, "_parts", lambda array, seen=[]: seen.append(1) or [np.full(2, len(seen))])
    save_small(here, 3)


def nothing_comes_back(given, here, patch):
    import orbax.checkpoint as ocp

    from gspn_jax.runs.saving import Checkpoints

    patch.setattr(ocp.Checkpointer, "restore", lambda *_, **__: {"state": {"trial": np.zeros(8)}})
    with Checkpoints(tiny.config(here / "run"), "f", ["0"]) as saver:
        saver.restore(Small())


def in_path(name):
    return train("--run-dir", f"{{here}}/{name}", "--train.steps", "3", "--optimizer.warmup-steps", "1")


A1 = [
    Attack("A1", f"train in {name}", in_path(name), ("run_dir must lie in a path without any of", f"found {sign!r}"))
    for name, sign in (
        ("lr[1e-4]", "["),
        ("[proj]/run", "["),
        ("a]b", "]"),
        ("**/run", "*"),
        ("a*b", "*"),
        ("a?", "?"),
        ("a\\b", "\\"),
    )
] + [
    Attack(
        "A1",
        "import weights into m[1]/run",
        converted(
            *("import", "--weights", "{other_weights}", "--output", "{here}/m[1]/run"),
            before=lambda given, here: (here / "m[1]").mkdir(),
        ),
        "--output must lie in a path without any of",
    ),
    Attack(
        "A1",
        "train in a path with a space, a percent sign, a hash, a quote and an umlaut",
        in_path("a b%20#'ü"),
        "",
        code=GOES_ON,
        writes=("a b*",),
    ),
    Attack(
        "A1",
        "the first checkpoint is damaged as soon as it is written",
        function(first_save_is_damaged),
        ("the first checkpoint of the run", "cannot be read back: params cannot be read"),
        writes=("run*",),
    ),
    Attack(
        "A1",
        "the first checkpoint comes back with other values",
        function(first_save_has_other_values),
        "cannot be read back: params has other values",
        writes=("run*",),
    ),
    Attack(
        "A1",
        "a folder from which nothing comes back as it was saved, before the first step",
        function(nothing_comes_back),
        "what is saved in {here}/run/checkpoints must come back, found other values",
        writes=("run*",),
    ),
]


# --- A2: hosts that differ


def two_hosts(check, **other):
    """`check()` where another host says `other` of what is compared."""

    def action(given, here, patch):
        import jax

        from gspn_jax.parallel import agreement

        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(agreement, "texts", lambda own: [own, json.dumps(json.loads(own) | other)])
        check()

    return function(action)


def same_run():
    from gspn_jax.runs import same_hosts

    same_hosts.check(tiny.config("run"), "f", ["cat", "dog"])


def same_samples():
    from gspn_jax.runs import same_hosts

    same_hosts.check_flags(sample.Arguments(run="run", seed=1))


def joined(address, index, *, environment=(), listening=None):
    """train_dit.py as one of two processes; `listening` makes a port that is in use."""

    def make(given, here):
        def main(argv):
            with contextlib.ExitStack() as stack:
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                for name, value in (("GSPN_JOIN_SECONDS", "1"), *environment):
                    patch.setenv(name, value)
                port = 1
                if listening is not None:
                    other = stack.enter_context(socket.socket())
                    other.bind(("127.0.0.1", 0))
                    port = other.getsockname()[1]
                    if listening:
                        other.listen()
                place = ("--coordinator", address.format(port=port), "--num-processes", "2", "--process-id", str(index))
                train_dit.main(["--config", str(given.digits), *place])

        return Call(main)

    return make


A2 = [
    Attack("A2", f"another host has {what}", two_hosts(same_run, **{name: value}), f"{name} is {said} on host 1")
    for what, name, value, said in (
        ("another learning rate", "optimizer.learning_rate", 0.1, "0.001 on host 0 and 0.1"),
        ("another seed", "train.seed", 9, "0 on host 0 and 9"),
        ("another number of steps", "train.steps", 99, "20 on host 0 and 99"),
        ("another run directory", "run_dir", "other", '"run" on host 0 and "other"'),
        ("other data", "the fingerprint of the data", "g", '"f" on host 0 and "g"'),
        (
            "the classes in another order",
            "the class names",
            ["dog", "cat"],
            '["cat", "dog"] on host 0 and ["dog", "cat"]',
        ),
    )
] + [
    Attack("A2", "another host has another JAX", two_hosts(same_run, **{"the version of JAX": "0.1"}), "JAX is"),
    Attack("A2", "another host has other code", two_hosts(same_run, **{"the digest of the code": "0"}), "code is"),
    Attack(
        "A2", "another host samples with another seed", two_hosts(same_samples, seed=2), "seed is 1 on host 0 and 2"
    ),
    Attack("A2", "another host has nothing else", two_hosts(same_run), "", code=GOES_ON),
    Attack(
        "A2",
        "a coordinator of a name that no host has",
        joined("no-such-host.invalid:1234", 1),
        ("--coordinator must be where", "no such host"),
    ),
    Attack(
        "A2",
        "a coordinator where nothing listens",
        joined("127.0.0.1:{port}", 1, listening=False),
        ("--coordinator must be where", "Connection refused", "GSPN_JOIN_SECONDS waits longer"),
    ),
    Attack(
        "A2",
        "the first process on a port that is in use",
        joined("127.0.0.1:{port}", 0, listening=True),
        "is in use by another program",
    ),
    Attack(
        "A2",
        "the first process at an address of another machine",
        joined("192.0.2.1:1234", 0),
        ("--coordinator must be an address of the host of process 0", "JAX_COORDINATOR_BIND_ADDRESS says"),
    ),
    Attack("A2", "a port of six digits", joined("localhost:123456", 1), "--coordinator must be HOST:PORT"),
    Attack(
        "A2",
        "a time to wait that is none",
        joined("localhost:1", 1, environment=(("GSPN_JOIN_SECONDS", "²"),)),
        "GSPN_JOIN_SECONDS must be a number of seconds",
    ),
]


# --- A3: two processes, one output


def claimed(name, make):
    """The row `make` while another process (here: another descriptor) makes {here}/`name`."""

    def made(given, here):
        call = make(given, here)

        def main(argv):
            (here / name).parent.mkdir(exist_ok=True)
            with claim(here / name):
                call.main(argv)

        return Call(main, call.arguments)

    return made


SHAPE, COUNT = (2, 2, 3), 10


def drawn(labels, numbers):
    """Images that tell their label and number."""
    return np.broadcast_to((10 * labels + numbers)[:, None, None, None], (len(labels), *SHAPE)).astype(np.uint8)


def samples(here, draw=drawn, **settings):
    """Ten images into {here}/q.npz by `write_npz`, as sample.py does it."""
    from gspn_jax.files import claim_new
    from gspn_jax.sampling.files import write_npz

    labels, numbers = np.arange(COUNT) % 3, np.arange(COUNT)
    with claim_new(here / "q.npz") as path:
        write_npz(path, draw, labels, numbers, shape=SHAPE, batch_size=4, settings={"seed": 0} | settings)
    with np.load(here / "q.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], drawn(labels, numbers))


def begun(here, damage=lambda partial: None, batches=2):
    """Two of three batches, as a kill leaves them; then `damage`."""
    calls = []

    def dies(labels, numbers):
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(1)
        return drawn(labels, numbers)

    with contextlib.suppress(KeyboardInterrupt):
        samples(here, dies)
    partial = here / "q.npz.gspn-partial"
    assert partial.is_dir()
    damage(partial)


def sampled(given, here, patch):
    samples(here)


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


def latents(before=None):
    names = ("--vae", "{vae}", "--output", "{here}/out", "--images", "{images}", "--image-size", "8")
    return prepared("latents", *names, before=before)


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


# --- A4: progress that is trusted


def goes_on(damage=lambda partial: None, batches=2):
    """Samples that are begun, damaged, and gone on with: the ten images are right all the same."""
    return function(sampled, lambda given, here: begun(here, damage, batches))


def change(path, at=-1, inside=b""):
    """One byte of a file; of the first place of `inside`, if it is given."""
    content = bytearray(path.read_bytes())
    content[content.index(inside) + len(inside) - 1 if inside else at] ^= 1
    path.write_bytes(bytes(content))


def append(path, content):
    path.write_bytes(path.read_bytes() + content)


def renamed(checkpoints):
    (checkpoints / "6").rename(checkpoints / "60")


def label_12345(given, here):
    from gspn_jax.data.latents import LatentMetadata, record_type, write_shard

    copy = given.copy_of_latents(here)
    metadata = LatentMetadata.read(copy)
    shape = record_type(metadata.latent_shape, True)["moments"].shape
    for shard in metadata.shards:
        write_shard(copy / shard.name, np.full(shard.records, 12345, np.int32), np.zeros((shard.records, *shape), "f2"))


def finished_latents(given, here):
    """A set of latents as if prepared of other images."""
    from gspn_jax.data.latents import LatentMetadata
    from gspn_jax.files import sha256_of

    LatentMetadata(
        vae_sha256=sha256_of(given.vae),
        image_size=8,
        latent_shape=(8, 8, 4),
        scaling_factor=0.18215,
        class_names=("a", "b"),
        class_counts=(0, 0),
        shards=(),
        images="of other images",
    ).write(pathlib.Path(shutil.copytree(given.latents, here / "out")))


def sums_of_stats(here, damage):
    """The sums of parts 0 and 1 of 3, of which `damage` changes a file; returns which parts need not be computed."""
    from gspn_jax.prepare.stats import _Progress, _Sums

    folder = here / "ref.npz.gspn-partial"
    progress = _Progress(folder, {"keep": 1})
    for part in (0, 1):
        progress.save(part, _Sums())
    damage(folder)
    return [part for part in range(3) if _Progress(folder, {"keep": 1}).has(part)]


def damaged_sums(name, damage, left):
    def action(given, here, patch):
        found = sums_of_stats(here, lambda folder: damage(folder / name))
        assert found == left, found

    return function(action)


ON_LATENTS = ("--data.source", "latents", "--data.channels", "4", "--data.path", "{here}/latents")

A4 = (
    [
        Attack("A4", f"one byte of both checkpoints is changed, then {what}", make, said, writes=("run/lock",))
        for what, make, said in (
            (
                "sampled",
                draw(run="{here}/run", before=lambda given, here: given.copy_of_run(here, flip_a_byte)),
                ("must hold a whole checkpoint", "ema_0.9/_METADATA"),
            ),
            (
                "trained on",
                train(config="{here}/run.py", before=lambda given, here: given.copy_of_run(here, flip_a_byte)),
                "must hold a whole checkpoint",
            ),
        )
    ]
    + [
        Attack(
            "A4",
            f"a checkpoint renamed from step 6 to 60, then {what}",
            make,
            "it is the checkpoint of step 6 under another name",
            **more,
        )
        for what, make, more in (
            (
                "sampled",
                draw(run="{here}/run", before=lambda given, here: given.copy_of_run(here, renamed)),
                {"code": GOES_ON},
            ),
            (
                "sampled as step 60",
                draw("--step", "60", run="{here}/run", before=lambda given, here: given.copy_of_run(here, renamed)),
                {},
            ),
            (
                "trained on",
                train(config="{here}/run.py", before=lambda given, here: given.copy_of_run(here, renamed)),
                {"code": GOES_ON, "writes": ("run*",)},
            ),
        )
    ]
    + [
        Attack("A4", f"unfinished samples {what}", goes_on(damage, batches), said, code=GOES_ON, writes=("q.npz*",))
        for what, damage, batches, said in (
            ("as a kill leaves them", lambda partial: None, 2, ""),
            ("without their pixels", lambda partial: (partial / "images.bin").unlink(), 2, ""),
            ("without their list of batches", lambda partial: (partial / "batches.jsonl").unlink(), 2, ""),
            (
                "cut in the second batch",
                lambda partial: os.truncate(partial / "images.bin", 60),
                2,
                "the first 4 images are as they were drawn",
            ),
            (
                "with one byte changed in the first batch",
                lambda partial: change(partial / "images.bin", 0),
                2,
                "the first 0 images are as they were drawn",
            ),
            (
                "with one byte changed in the second batch",
                lambda partial: change(partial / "images.bin"),
                2,
                "the first 4 images are as they were drawn",
            ),
            (
                "with the line of the second batch cut",
                lambda partial: os.truncate(partial / "batches.jsonl", 80),
                2,
                "the first 4 images are as they were drawn",
            ),
            ("with an empty list of batches", lambda partial: (partial / "batches.jsonl").write_text(""), 2, ""),
            (
                "with a list of batches of other bytes",
                lambda partial: (partial / "batches.jsonl").write_bytes(b"\xff\n"),
                2,
                "the first 0 images",
            ),
            (
                "that claim more images than are wanted",
                lambda partial: (partial / "batches.jsonl").write_text('[99, ""]\n'),
                2,
                "the first 0 images",
            ),
            (
                "with images behind them that nobody claims",
                lambda partial: append(partial / "images.bin", b"x" * 7),
                2,
                "",
            ),
            ("before the first batch", lambda partial: None, 0, ""),
        )
    ]
    + [
        Attack("A4", f"unfinished samples {what}", goes_on(damage), said)
        for what, damage, said in (
            (
                "with empty settings",
                lambda partial: (partial / "settings.json").write_text(""),
                "no settings that can be read",
            ),
            (
                "whose settings are a list",
                lambda partial: (partial / "settings.json").write_text("[]"),
                "no settings that can be read",
            ),
            (
                "of another seed",
                lambda partial: (partial / "settings.json").write_text('{"seed": 1}'),
                "begun with other settings (seed)",
            ),
        )
    ]
    + [
        Attack(
            "A4",
            "a folder of the name of unfinished samples that is a user's",
            function(sampled, write("q.npz.gspn-partial/precious", "x")),
            "must be the unfinished samples of an earlier call",
        ),
        Attack(
            "A4",
            "unfinished samples with a file of a user's beside them",
            goes_on(lambda partial: (partial / "precious").write_text("x")),
            "is left where it is",
            code=GOES_ON,
            writes=("q.npz", "q.npz.gspn-partial", "q.npz.gspn-partial/[!p]*"),
        ),
        Attack(
            "A4",
            "latents into a finished set of other images",
            latents(finished_latents),
            "is complete, with other settings (images)",
        ),
        Attack(
            "A4",
            "latents of 10 classes whose records say label 12345",
            train(*ON_LATENTS, before=label_12345),
            "must have a label in 0..9",
        ),
        Attack(
            "A4",
            "an empty part of unfinished statistics",
            damaged_sums("part-00001.npz", lambda path: path.write_bytes(b""), [0]),
            "part-00001.npz cannot be read",
            code=GOES_ON,
            writes=("ref*",),
        ),
        Attack(
            "A4",
            "a part of unfinished statistics with one byte changed",
            damaged_sums("part-00000.npz", lambda path: change(path, inside="keep".encode("utf-32-le")), [1]),
            "part-00000.npz",
            code=GOES_ON,
            writes=("ref*",),
        ),
        Attack(
            "A4",
            "a user's file among unfinished statistics",
            damaged_sums("precious", lambda path: path.write_text("x"), []),
            "found precious in it",
            writes=("ref*",),
        ),
    ]
)


# --- A5: a thread that dies unseen


class FullDisk:
    """`os.write` that refuses what is for the file of descriptors that `full` names, until it has failed `times`."""

    def __init__(self, write, name, times):
        self._write, self._name, self.left = write, name, times

    def __call__(self, descriptor, data):
        if self.left and os.readlink(f"/proc/self/fd/{descriptor}").endswith(self._name):
            self.left -= 1
            self._write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._write(descriptor, data)


def logs_to_a_full_disk(times):
    """Three lines of metrics.jsonl, on a disk that is full for `times` writes."""

    def action(given, here, patch):
        from gspn_jax.training.logs import RunLog

        patch.setattr(os, "write", FullDisk(os.write, "metrics.jsonl", times))
        with RunLog(here, start_step=0, steps=9) as run_log:
            for step in (1, 2, 3):
                run_log.metrics(step, {"x": 1.0})
        steps = [json.loads(line)["step"] for line in (here / "metrics.jsonl").read_text().splitlines()]
        assert steps == ([1, 2, 3] if times < 9 else []), steps

    return function(action)


def events_on_a_full_disk(given, here, patch):
    """More events than tensorboardX's queue holds, none of which can be written."""
    from tensorboardX.record_writer import RecordWriter

    from gspn_jax.training.logs import RunLog

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunLog(here, start_step=0, steps=9) as run_log:
        patch.setattr(RecordWriter, "write", full)
        for step in range(50):
            run_log.metrics(step, {"x": 1.0})
    assert len((here / "metrics.jsonl").read_text().splitlines()) == 50
    assert threading.active_count() < 50


def picture_on_a_full_disk(given, here, patch):
    from PIL import Image

    from gspn_jax.training.logs import RunLog

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunLog(here, start_step=0, steps=9) as run_log:
        patch.setattr(Image.Image, "save", full)
        run_log.image(1, "samples", Image.new("RGB", (4, 4)))


def reader_ends(name, error=errno.EPIPE, ignored=False):
    """What `Stop` says when something is written to a stream whose reader is gone."""

    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(error, os.strerror(error))

        flush = isatty = fileno = lambda self, *_: False

    def action(given, here, patch):
        from gspn_jax.training import signals

        patch.setattr(sys, name, Gone())
        patch.setattr(signals, "_to_nowhere", lambda stream: None)
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        try:
            with signals.Stop() as stop:
                print("a line", file=getattr(sys, name))
                asked = stop.asked()
        finally:
            signal.signal(signal.SIGHUP, before)
        assert asked == (None if ignored or error == errno.ENOSPC else "SIGHUP"), asked

    return function(action)


def hangs_up(given, here, patch):
    from gspn_jax.training.signals import Stop

    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked() == "SIGHUP", stop.asked()


def reading_fails(given, here, patch):
    """A loop whose third batch cannot be read, with stand-ins for all but the loop."""
    from gspn_jax.config import GuardConfig
    from gspn_jax.data import DataError
    from gspn_jax.training.guard import Guard
    from gspn_jax.training.loop import Loop

    def batches():
        yield from [{}, {}]
        raise DataError("images/7.png is not a usable image")

    saved = []
    nothing = lambda *_, **__: None  # noqa: E731
    meter = types.SimpleNamespace(pause=contextlib.nullcontext, waiting=contextlib.nullcontext, add=nothing)
    metrics = {"loss": np.float32(1), "grad_norm": np.float32(1), "finite": np.bool_(True)}
    loop = Loop(
        train_step=lambda state, batch: (state + 1, metrics),
        target=None,
        frozen=(),
        batches=batches(),
        batch_size=1,
        seed=0,
        guard=Guard(GuardConfig(), {}),
        checkpoints=types.SimpleNamespace(check=nothing, wait=nothing),
        stop=types.SimpleNamespace(asked=nothing),
        meter=meter,
        run_log=types.SimpleNamespace(advance=nothing),
        log=types.SimpleNamespace(due=lambda run: False),
        save=types.SimpleNamespace(save=lambda run, step: saved.append((step, run.state))),
        hooks=[],
    )
    try:
        with cli.user_errors(DataError):
            loop(types.SimpleNamespace(step=0, steps=9, state=0, saved=0, asked=None))
    finally:
        assert saved == [(2, 2)], saved


A5 = [
    Attack(
        "A5",
        "the disk is full for one line of the log",
        logs_to_a_full_disk(1),
        "its lines wait until it can",
        code=GOES_ON,
        writes=("metrics.jsonl", "tensorboard*"),
    ),
    Attack(
        "A5",
        "the disk is full for every line of the log",
        logs_to_a_full_disk(99),
        "3 lines of {here}/metrics.jsonl could not be written",
        code=GOES_ON,
        writes=("metrics.jsonl", "tensorboard*"),
    ),
    Attack(
        "A5",
        "the disk is full for every event of TensorBoard",
        function(events_on_a_full_disk),
        "no more TensorBoard events are written (No space left on device)",
        code=GOES_ON,
        writes=("metrics.jsonl", "tensorboard*"),
    ),
    Attack(
        "A5",
        "the disk is full for a grid",
        function(picture_on_a_full_disk),
        "step_0000001.png could not be written (No space left on device)",
        code=GOES_ON,
        writes=("metrics.jsonl", "tensorboard*", "samples"),
    ),
    Attack("A5", "the reader of stdout is gone", reader_ends("stdout"), "", code=GOES_ON),
    Attack("A5", "the terminal of stdout is gone", reader_ends("stdout", errno.EIO), "", code=GOES_ON),
    Attack("A5", "the reader of stdout is gone under nohup", reader_ends("stdout", ignored=True), "", code=GOES_ON),
    Attack("A5", "stdout goes to a full disk", reader_ends("stdout", errno.ENOSPC), "", code=GOES_ON),
    Attack("A5", "SIGHUP", function(hangs_up), "", code=GOES_ON),
    Attack(
        "A5",
        "a batch that cannot be read, two steps after the last save",
        function(reading_fails),
        "images/7.png is not a usable image",
    ),
]


# --- A6: promises kept in flags


def later_without_the_flag(given, here, patch):
    from gspn_jax.runs import checkpoints

    save_small(here, 2, 4, 6, 8, keep_every=4)
    save_small(here, 10, 12, 14)
    assert checkpoints.steps(here / "run") == [4, 8, 12, 14], checkpoints.steps(here / "run")


def without_label_dropout(given, here):
    import dataclasses

    from gspn_jax.config import to_dict

    copy = given.copy_of_run(here)
    config = tiny.config(given.run)
    config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, label_dropout=0.0))
    from gspn_jax.runs import manifest

    for step in (3, 6):
        path = copy / "checkpoints" / str(step) / "meta" / "metadata"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"config": to_dict(config)}))
        manifest.write(path.parents[1])


def made_longer(steps, said, **optimizer):
    def action(given, here, patch):
        import dataclasses

        from gspn_jax.training.optimizer import jump

        before, now = tiny.config(steps=8), tiny.config(steps=steps)
        now = dataclasses.replace(now, optimizer=dataclasses.replace(now.optimizer, **optimizer))
        found = jump(before, now, 8) or ""
        assert said in found and bool(said) == bool(found), found

    return function(action)


A6 = [
    Attack(
        "A6",
        "steps kept for good by --train.keep-every, then a start without the flag",
        function(later_without_the_flag),
        "",
        code=GOES_ON,
        writes=("run*",),
    ),
    Attack(
        "A6",
        "guidance on a run without label dropout",
        draw("--sampler.guidance-scale", "2", run="{here}/run", before=without_label_dropout),
        "must be 1 for weights that know no null class, as those of a run with diffusion.label_dropout 0, found 2",
    ),
    Attack(
        "A6",
        "guidance 0, which is the null class alone, on such a run",
        draw("--sampler.guidance-scale", "0", run="{here}/run", before=without_label_dropout),
        "must be 1 for weights that know no null class",
    ),
    Attack(
        "A6",
        "sampling such a run without guidance",
        draw(run="{here}/run", before=without_label_dropout),
        "",
        code=GOES_ON,
    ),
    Attack(
        "A6",
        "a finished run is made longer",
        made_longer(16, "--optimizer.decay-steps 8 goes on without this"),
        "",
        code=GOES_ON,
    ),
    Attack("A6", "the same with --optimizer.decay-steps 8", made_longer(16, "", decay_steps=8), "", code=GOES_ON),
    Attack(
        "A6",
        "another learning rate for the steps to come",
        made_longer(8, "in one step, after step 8", learning_rate=1.0, final_learning_rate=1.0),
        "",
        code=GOES_ON,
    ),
    Attack(
        "A6",
        "a decay that ends before the warm-up",
        train("--optimizer.warmup-steps", "9", "--optimizer.decay-steps", "8"),
        "optimizer.decay_steps must be 1 or more and at least optimizer.warmup_steps (9)",
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
]


# --- A8: seeds

A8 = [
    Attack("A8", f"{what} with seed {name}", make(value), f"{said}, found {value}")
    for what, make, said, values in (
        (
            "sampled",
            lambda value: draw("--seed", str(value)),
            "--seed must be in 0..2**64-1",
            {"-1": -1, "2**64": 2**64},
        ),
        (
            "samples by the thousand",
            lambda value: draw("--num-samples", "4", "--output", "{here}/q.npz", "--seed", str(value)),
            "--seed must be in 0..2**64-1",
            {"2**64": 2**64},
        ),
        (
            "evaluated",
            lambda value: evaluated("--run", "{run}", "--seed", str(value)),
            "--seed must be in 0..2**64-1",
            {"2**64": 2**64},
        ),
        (
            "trained",
            lambda value: train("--train.seed", str(value)),
            "train.seed must be 0 or more and below 2**32",
            {"2**32": 2**32},
        ),
        (
            "evaluated in training",
            lambda value: train("--eval.seed", str(value)),
            "eval.seed must be 0 or more and below 2**64",
            {"2**64": 2**64},
        ),
    )
    for name, value in values.items()
] + [
    Attack("A8", f"sampled with seed {name}", draw("--seed", str(value)), "", code=GOES_ON)
    for name, value in (("2**32", 2**32), ("2**63", 2**63), ("2**64-1", 2**64 - 1))
]

ATTACKS = [*A1, *A2, *A3, *A4, *A5, *A6, *A7, *A8]


@rows(ATTACKS)
def test_nothing_is_lost(attack, withstand):
    withstand(attack)
