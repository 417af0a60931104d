"""Attacks on what is gone on with (A4): it is as it was written, or it is made again or refused."""

import os
import pathlib
import shutil

import numpy as np

from tests.attacks.attack import GOES_ON, Attack, draw, rows, train
from tests.attacks.given import write
from tests.attacks.lost import begun, function, latents, sampled

# --- A4: progress that is trusted


def flip_a_byte(checkpoints):
    """In a file of the first average, in every checkpoint."""
    for path in checkpoints.glob("*/ema_0.9/_METADATA"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(bytes(content))


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
            "a part of unfinished statistics under the name of another",
            damaged_sums("part-00001.npz", lambda path: path.rename(path.with_name("part-00002.npz")), [0]),
            "part-00002.npz is part-00001.npz under another name",
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


ATTACKS = [*A4]


@rows(ATTACKS)
def test_what_has_changed_is_not_trusted(attack, withstand):
    withstand(attack)
