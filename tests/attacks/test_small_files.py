"""Attacks on our own small files (C16): set aside, passed over, or refused in a sentence."""

import json
import os
import pathlib

from gspn_jax.runs.evaluations import Evaluations
from gspn_jax.training.logs import RunLog
from tests.attacks.attack import GOES_ON, Attack, draw, evaluate, flags, rows, train
from tests.attacks.given import write

NESTED = "[" * 100_000 + "]" * 100_000


def damaged_manifest(content, *, both=False):
    """A row's `before`: other content in the manifest of the newest checkpoint, or of both."""

    def damage(checkpoints):
        for step in ("3", "6") if both else ("6",):
            path = checkpoints / step / "manifest.json"
            path.write_bytes(content(json.loads(path.read_text())) if callable(content) else content)

    return lambda given, here: given.copy_of_run(here, damage)


def with_file(**entry):
    """A manifest with one more file, or another entry for one."""
    return lambda manifest: json.dumps(manifest | {"files": manifest["files"] | entry["files"]}).encode()


def without(item):
    """A manifest that names no file of an item."""
    return lambda manifest: json.dumps(
        manifest | {"files": {name: one for name, one in manifest["files"].items() if not name.startswith(f"{item}/")}}
    ).encode()


def manifest(done, content, says):
    """The checkpoint before is sampled from; where both are damaged, a sentence names the manifest."""
    before = damaged_manifest(content)
    return Attack(
        "C16",
        f"the newest manifest {done}: sample",
        draw(run="{here}/run", before=before),
        ("passed over", says),
        GOES_ON,
    )


def in_run(name, content):
    """A row's `before`: a run with a file of this content."""

    def before(given, here):
        given.copy_of_run(here)
        path = here / "run" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return before


def record(done, content, says):
    """A record of evaluations that training starts with: set aside, and no checkpoint is deleted for it."""

    def begin(argv):
        evaluations = Evaluations(argv[0])
        evaluations.add(9, 3.0)
        assert evaluations.kept == Evaluations(argv[0]).kept | {9} == {3, 6, 9}

    return Attack(
        "C16",
        f"evaluation.json {done}: train on",
        flags(begin, "{here}/run", before=in_run("evaluation.json", content)),
        ("set aside as {here}/run/evaluation.json.damaged-1", says),
        GOES_ON,
        writes=("run/evaluation.json", "run/evaluation.json.damaged-1"),
    )


def log_of(done, content, says):
    """A log that training goes on with: set aside, and its whole lines are kept."""
    return Attack(
        "C16",
        f"metrics.jsonl {done}: train on",
        flags(open_log, "{here}/run", before=in_run("metrics.jsonl", content)),
        ("set aside as {here}/run/metrics.jsonl.damaged-1", says),
        GOES_ON,
        writes=("run/metrics.jsonl", "run/metrics.jsonl.damaged-1", "run/tensorboard*"),
    )


def open_log(argv):
    with RunLog(argv[0], start_step=6, steps=10):
        pass
    assert [json.loads(line)["step"] for line in pathlib.Path(argv[0], "metrics.jsonl").read_text().splitlines()] in (
        [],
        [5],
    )


def metadata(done, content, says):
    """Metadata of latents that someone trains on."""

    def before(given, here):
        path = given.copy_of_latents(here) / "metadata.json"
        path.write_bytes(content(json.loads(path.read_text())) if callable(content) else content)

    return Attack(
        "C16",
        f"metadata of latents {done}: train",
        train("--data.source", "latents", "--data.channels", "4", "--data.path", "{here}/latents", before=before),
        says,
    )


def changed(**values):
    return lambda before: json.dumps(before | values).encode()


ATTACKS = [
    manifest("is empty", b"", "manifest.json is empty"),
    manifest("is cut", lambda whole: json.dumps(whole).encode()[:-40], "manifest.json is no JSON"),
    manifest("is binary", bytes(range(256)), "manifest.json is no text"),
    manifest("is zeros, as after a power failure", bytes(4096), "manifest.json is no JSON"),
    manifest("is nested 100,000 deep", NESTED.encode(), "manifest.json is nested too deeply"),
    manifest("is a list", b"[]", "manifest.json must be an object, found list"),
    manifest("names a size of Infinity", with_file(files={"meta/metadata": {"bytes": float("inf")}}), "not finite"),
    manifest(
        "names a size that is a text",
        with_file(files={"meta/metadata": {"bytes": "3", "sha256": ""}}),
        "must be a whole number, found '3'",
    ),
    manifest("names no hash", with_file(files={"meta/metadata": {"bytes": 3}}), "has no 'sha256'"),
    manifest(
        "names /dev/zero", with_file(files={"/dev/zero": {"bytes": 0, "sha256": ""}}), "no path within the checkpoint"
    ),
    manifest(
        "names a file above it", with_file(files={"../3/manifest.json": {"bytes": 0, "sha256": ""}}), "no path within"
    ),
    manifest("names a path with NUL", with_file(files={"meta/\0": {"bytes": 0, "sha256": ""}}), "no path within"),
    manifest("names nothing of the parameters", without("params"), "names no file of params"),
    Attack(
        "C16",
        "both manifests are damaged: sample",
        draw(run="{here}/run", before=damaged_manifest(b"{}", both=True)),
        ("must hold a whole checkpoint", "manifest.json has no 'files'"),
    ),
    Attack(
        "C16",
        "the newest manifest is damaged: train on",
        train(config="{here}/run.py", before=damaged_manifest(b"{}")),
        ("going back to step 3", "manifest.json has no 'files'"),
        GOES_ON,
        writes=("run/checkpoints/*", "run/lock"),
    ),
    Attack(
        "C16",
        "a file of a checkpoint is a pipe",
        draw(
            run="{here}/run",
            before=lambda given, here: given.copy_of_run(
                here, lambda folder: [(folder / "6/meta/metadata").unlink(), os.mkfifo(folder / "6/meta/metadata")]
            ),
        ),
        ("passed over", "meta/metadata is no file"),
        GOES_ON,
    ),
    Attack(
        "C16",
        "checkpoints beside folders named ² and 007",
        draw(
            run="{here}/run",
            before=lambda given, here: given.copy_of_run(
                here, lambda folder: [(folder / name).mkdir() for name in ("²", "007", "٣")]
            ),
        ),
        "",
        GOES_ON,
    ),
    record("is empty", "", "is empty"),
    record("is nested 100,000 deep", NESTED, "is nested too deeply"),
    record("is a list", "[1]", "must be an object"),
    record("is binary", bytes(range(256)), "is no text"),
    record("has an FID of NaN", '{"step": 6, "best_step": 6, "best_fid": NaN}', "not finite"),
    record("has a step that is a text", '{"step": "6"}', "must be a whole number, found '6'"),
    record("has a step of 5,000 digits", '{"step": %s}' % ("9" * 5000), "is no JSON"),
    log_of("has a line that is a list", '{"step": 5}\n[1]\n', "line 2 of metrics.jsonl must be an object"),
    log_of("has a line that is nested", '{"step": 5}\n' + NESTED + "\n", "line 2 of metrics.jsonl is nested"),
    log_of("is binary", bytes(range(255, 0, -1)) + b"\n", "line 1 of metrics.jsonl is no text"),
    log_of("has a step that is a text", '{"step": "5"}\n{"step": 5}\n', "must be a whole number, found '5'"),
    metadata("is nested 100,000 deep", NESTED.encode(), "nested too deeply"),
    metadata("is binary", bytes(range(256)), "is no text"),
    metadata("has a scale of NaN", changed(scaling_factor=float("nan")), "not finite"),
    metadata("has a shape of text", changed(latent_shape=["a", 8, 4]), "must be a whole number, found 'a'"),
    metadata(
        "names a shard above it",
        changed(shards=[{"name": "../a", "records": 8, "bytes": 1}]),
        "'../a', which is no path within",
    ),
    Attack(
        "C16",
        "a result of an evaluation is a list: plot",
        evaluate("--plot", "{here}/one.json", "--output", "{here}/fid.png", before=write("one.json", "[]")),
        "one.json must be the result of an evaluation of a run's samples, but one.json must be an object",
    ),
    Attack(
        "C16",
        "a result of an evaluation is nested 100,000 deep: plot",
        evaluate("--plot", "{here}/one.json", "--output", "{here}/fid.png", before=write("one.json", NESTED)),
        "one.json is nested too deeply",
    ),
]


@rows(ATTACKS)
def test_a_damaged_file_is_said(attack, withstand):
    withstand(attack)
