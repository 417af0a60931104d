"""Attacks on a run that trains (A): what it saves can be read, what it cannot write stops it only after a save.

Where a row needs a full disk, another process or another host it calls our function with a stand-in for it; runs of
several processes are in tests/training/test_hosts.py and test_faults.py.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
import types

import numpy as np

from gspn_jax import cli
from tests.attacks.attack import GOES_ON, Attack, draw, rows, train
from tests.attacks.attack import convert as converted
from tests.attacks.lost import Small, function, save_small
from tests.training import tiny

# --- A1: a save is not a save until it was read


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

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            until = time.monotonic() + 5  # another thread may be the one that the system tells
            while not stop.asked() and time.monotonic() < until:
                time.sleep(0.01)
            assert stop.asked() == "SIGHUP", stop.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def reading_fails(given, here, patch):
    """A loop whose third batch cannot be read, with stand-ins for all but the loop."""
    from gspn_jax.config import GuardConfig
    from gspn_jax.data import DataError
    from gspn_jax.training.guard import Guard
    from gspn_jax.training.loop import Loop

    class Batches:
        failure, left = None, 2

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise DataError("images/7.png is not a usable image")
            return {}

    saved = []
    nothing = lambda *_, **__: None  # noqa: E731
    meter = types.SimpleNamespace(pause=contextlib.nullcontext, waiting=contextlib.nullcontext, add=nothing)
    metrics = {"loss": np.float32(1), "grad_norm": np.float32(1), "finite": np.bool_(True)}
    loop = Loop(
        train_step=lambda state, batch: (state + 1, metrics),
        target=None,
        frozen=(),
        batches=Batches(),
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


ATTACKS = [*A1, *A5, *A6]


@rows(ATTACKS)
def test_nothing_of_a_run_is_lost(attack, withstand):
    withstand(attack)
