"""Attacks on image classification (E1): configs, validation sets, runs, exports and images that are wrong.

Networks are of two blocks (`tests.classify.tiny`).
"""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gspn_jax import classify
from gspn_jax import train as command
from tests.attacks.attack import Attack, draw, flags, rows
from tests.attacks.given import write, write_images
from tests.classify import tiny

CONFIG = "from tests.classify import tiny\nconfig = tiny.config({!r}, {!r}, {!r})\n"


def config(given, here, validation=None):
    """{here}/c.py trains in {here}/run on the colours, which are evaluated on too unless `validation` says."""
    (here / "c.py").write_text(CONFIG.format(str(here / "run"), str(given.colours), validation or str(given.colours)))


def trained(*arguments, before=config):
    return flags(classify.main, "train", "--config", "{here}/c.py", *arguments, before=before)


def validated_on(make):
    """A `before` of `config`, whose folder {here}/val `make` fills."""

    def before(given, here):
        make(here / "val")
        config(given, here, str(here / "val"))

    return before


def accuracy(*arguments, run="{classifier}", images="{colours}", before=None):
    return flags(classify.main, "evaluate", "--run", run, "--images", images, *arguments, before=before)


def predicted(*images, more=(), run="{classifier}", before=None):
    return flags(classify.main, "predict", "--run", run, "--images", *images, *more, before=before)


def exported(*arguments, run="{classifier}", output="{here}/out", before=None):
    return flags(classify.main, "export", "--run", run, "--output", output, *arguments, before=before)


def colours(*names):
    """Folders of classes with an image each."""
    return lambda folder: [write_images(folder / name, 1) for name in names]


def changed_export(change=lambda header: header, tensors=lambda tensors: tensors):
    """{here}/m, an export with another header, as `change` returns it, or other `tensors`."""

    def before(given, here):
        copy = shutil.copytree(given.classifier_export, here / "m") / "model.safetensors"
        from safetensors import safe_open

        with safe_open(copy, "np") as file:
            metadata = file.metadata()
        header = change(json.loads(metadata["gspn_jax"]))
        text = header if isinstance(header, str) else json.dumps(header)
        save_file(tensors(load_file(copy)), copy, metadata=metadata | {"gspn_jax": text})

    return before


def without_a_class(header):
    return header | {"class_names": header["class_names"][:-1]}


def in_config(section, **fields):
    return lambda header: (
        header | {"config": header["config"] | {section: header["config"][section] | fields} if section else fields}
    )


QUICK = ("trained with evaluation on other classes", "trained from nothing", "trained with erasing of nan")
"""Rows of `train` that stand for the others in the default tests: each looks at a network and a set."""
TRAINED = [
    Attack("E1", what, make, says, slow=what.startswith("trained") and what not in QUICK)
    for what, make, says in (
        (
            "classify train with the config of a diffusion model",
            flags(classify.main, "train", "--config", "digits"),
            "must define `config = ClassifyConfig(...)`, found Config",
        ),
        (
            "gspn-train with the config of a classifier",
            flags(command.main, "--config", "classify_cifar10"),
            "must define `config = Config(...)`, found ClassifyConfig",
        ),
        ("classify without a config", flags(classify.main, "train"), "needs --config NAME_OR_FILE"),
        ("classify paint", flags(classify.main, "paint"), "gspn_jax.classify can: train, evaluate"),
        ("trained with evaluation on a folder that is not there", trained("--eval.path", "{here}/none"), "{here}/none"),
        (
            "trained with evaluation on an empty folder",
            trained(before=validated_on(lambda folder: folder.mkdir())),
            "{here}/val",
        ),
        (
            "trained with evaluation on folders of classes without images",
            trained(before=validated_on(lambda folder: [(folder / c).mkdir(parents=True) for c in tiny.CLASSES])),
            "{here}/val",
        ),
        (
            "trained with evaluation on other classes",
            trained(before=validated_on(colours("blue", "green", "yellow"))),
            "found 3 classes, of which these are on one side only: yellow",
        ),
        (
            "trained with evaluation on one class too few",
            trained(before=validated_on(colours("blue", "green"))),
            "data.num_classes is 3, but the folder '{here}/val' has 2 classes",
        ),
        (
            "trained with evaluation on a class too many",
            trained(before=validated_on(colours("blue", "green", "red", "train"))),
            "has 4 classes (blue, green, red, train)",
        ),
        ("trained with evaluation on a file", trained("--eval.path", "{here}/c.py"), "{here}/c.py"),
        ("trained on 4 classes of 3", trained("--data.num-classes", "4"), "data.num_classes is 4"),
        (
            "trained on crops of area 0 to 1",
            trained("--augment.crop-area", "0", "1"),
            "augment.crop_area must be (low, high) with 0 < low <= high",
        ),
        ("trained with a mean of one channel", trained("--augment.mean", "0.5"), "augment.mean must be 3 numbers"),
        ("trained with erasing of nan", trained("--augment.erasing", "nan"), "augment.erasing must be"),
        ("trained without weights of its own", trained("--model.preset", "GSPN-XXL"), "GSPN-XXL"),
        (
            "trained on latents",
            trained("--data.source", "latents", "--data.path", "{latents}", "--data.channels", "3"),
            "data.source must be a set of images",
        ),
        ("trained where a file is", trained("--run-dir", "{here}/c.py"), "{here}/c.py"),
        (
            "compared without evaluation",
            flags(classify.main, "compare", "--config", "{here}/c.py", "--eval.every", "0", before=config),
            "eval.every must be greater than 0 for a comparison",
        ),
    )
]

STARTED = [
    Attack("E1", what, make, says, slow=what not in QUICK)
    for what, make, says in (
        ("trained from nothing", trained("--init-from", "{here}/none"), "{here}/none"),
        ("trained from a run of a diffusion model", trained("--init-from", "{run}"), "classif"),
        ("trained from a config file", trained("--init-from", "{here}/c.py"), "{here}/c.py"),
        ("trained from an empty folder", trained("--init-from", "{colours}"), "no checkpoint in {colours}"),
        (
            "trained from weights of another origin",
            trained("--init-from", "{other_weights}"),
            "found 1 tensors of another origin",
        ),
    )
]

USED = [
    Attack("E1", what, make, says)
    for what, make, says in (
        ("scored without a run", flags(classify.main, "evaluate", "--images", "{colours}"), "--run"),
        ("a run that is not there is scored", accuracy(run="{here}/none"), "no checkpoint in {here}/none"),
        ("a diffusion model is scored as a classifier", accuracy(run="{run}"), "classif"),
        ("a classifier is sampled", draw(run="{classifier}"), "classif"),
        ("scored at a step that is not there", accuracy("--step", "7"), "no checkpoint of step 7"),
        ("an average is scored that was not kept", accuracy("--ema", "0.5"), "0.5"),
        (
            "a step of an exported file is scored",
            accuracy("--step", "2", run="{classifier_export}"),
            "--step and --ema choose from a run directory, found the file",
        ),
        ("scored on nothing", flags(classify.main, "evaluate", "--run", "{classifier}"), "found none"),
        ("scored on two sets", accuracy("--records", "{colours}"), "found ['images', 'records']"),
        ("scored on images that are not there", accuracy(images="{here}/none"), "{here}/none"),
        (
            "scored on images of other classes",
            accuracy(images="{images}"),
            "found 2 classes, of which these are on one side",
        ),
        (
            "scored on records that are images",
            flags(classify.main, "evaluate", "--run", "{classifier}", "--records", "{colours}"),
            "{colours}",
        ),
        ("scored into a folder", accuracy("--output", "{here}"), "{here}"),
        ("scored in batches of none", accuracy("--batch-size", "0"), "--batch-size must be 1 or more"),
        ("nothing is named", predicted("{here}/none.jpg"), "found nothing at '{here}/none.jpg'"),
        (
            "a folder without images is named",
            predicted("{here}/empty", before=lambda given, here: (here / "empty").mkdir()),
            "{here}/empty",
        ),
        (
            "a link to nothing is named",
            predicted("{here}/a.jpg", before=lambda given, here: (here / "a.jpg").symlink_to("none")),
            "found nothing at",
        ),
        (
            "a pipe is named",
            predicted("{here}/a.jpg", before=lambda given, here: os.mkfifo(here / "a.jpg")),
            "found nothing at",
        ),
        ("the classes of no images are asked for", predicted(), "--images"),
        ("the likeliest 0 classes", predicted("{colours}", more=("--top", "0")), "--top must be 1 or more"),
        ("the classes of a diffusion model's run", predicted("{colours}", run="{run}"), "classif"),
        ("exported onto a folder that is there", exported(output="{colours}"), "{colours}"),
        ("exported into a folder that is not there", exported(output="{here}/none/out"), "{here}/none"),
        ("exported under a license of two lines", exported("--license", "mit\ntags: [x]"), "--license"),
        ("exported from an export", exported(run="{classifier_export}"), "no checkpoint in"),
        ("exported from a diffusion model's run", exported(run="{run}"), "classif"),
        *(
            (f"an export {what} is used", accuracy(run="{here}/m", before=before), says)
            for what, before, says in (
                ("that names a class too few", changed_export(without_a_class), "3 names of classes, found"),
                ("of version 9", changed_export(lambda header: header | {"version": 9}), "format version 1, found 9"),
                (
                    "whose header is a list",
                    changed_export(lambda header: []),
                    "what `export` writes beside the tensors",
                ),
                ("whose header is cut", changed_export(lambda header: json.dumps(header)[:40]), "but its header"),
                ("whose header nests", changed_export(lambda header: "[" * 10**5), "but its header"),
                ("of a negative step", changed_export(lambda header: header | {"step": -1}), "found step -1"),
                ("of an unknown field", changed_export(in_config("model", colour="red")), "colour"),
                ("of a preset that is none", changed_export(in_config("model", preset=["x"])), "preset"),
                ("of 10**12 classes", changed_export(in_config("data", num_classes=10**12)), "num_classes"),
                ("of no config", changed_export(in_config(None)), "{here}/m"),
                (
                    "with a tensor too few",
                    changed_export(tensors=lambda found: dict(list(found.items())[1:])),
                    "found 'backbone",
                ),
                (
                    "with a tensor of another shape",
                    changed_export(tensors=lambda found: {name: np.zeros(3, np.float32) for name in found}),
                    "must have shape",
                ),
                (
                    "with a tensor of other values",
                    changed_export(tensors=lambda found: {name: value + 1 for name, value in found.items()}),
                    "found that their SHA-256 has changed",
                ),
            )
        ),
    )
]

IMAGES = [
    Attack(
        "E1",
        f"the classes of {what} are asked for",
        predicted("{here}/a.jpg", before=write("a.jpg", content)),
        "{here}/a.jpg",
        devices=True,
    )
    for what, content in (("a text", "no image"), ("nothing", b""), ("half an image", b"\xff\xd8\xff\xe0\0\x10JFIF"))
]


ATTACKS = [*TRAINED, *STARTED, *USED, *IMAGES]


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    tiny.use(monkeypatch)


@rows(ATTACKS)
def test_a_classifier_says_what_is_wrong(attack, withstand):
    withstand(attack)
