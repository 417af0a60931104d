"""Neighbours of attacks that were mended (A6, B12 to B14): the kinds tried a second time."""

import os

import numpy as np

from gspn_jax import classify
from tests.attacks.attack import GOES_ON, Attack, convert, draw, evaluate, flags, prepare, rows, train
from tests.attacks.foreign import autoencoder, npz
from tests.attacks.given import Given, write
from tests.attacks.lost import function, save_small

# --- A6: promises kept in flags

NO_NULL = ("--diffusion.label-dropout", "0")
GUIDED = "sampler.guidance_scale must be 1 for weights that know no null class"


def kept_by_two(given, here, patch):
    from gspn_jax.runs import checkpoints

    save_small(here, 2, 4, 6, keep_every=4)
    save_small(here, 8, 10, 12, 14, 16, keep_every=6)
    assert checkpoints.steps(here / "run") == [4, 6, 12, 14, 16], checkpoints.steps(here / "run")


def best_kept(given, here, patch):
    """The best step of a run with evaluations, then a start without any."""
    from gspn_jax.runs import checkpoints, evaluations

    save_small(here, 2)
    evaluations.Evaluations(here / "run").add(2, 0.5)
    save_small(here, 4, 6, 8)
    assert checkpoints.steps(here / "run") == [2, 6, 8], checkpoints.steps(here / "run")


def resumed(*arguments):
    """A copy of the run goes on with other flags."""
    return train(*arguments, config="{here}/run.py", before=Given.copy_of_run)


CHANGED = ("run/*",)

A6 = [
    Attack(
        "A6",
        "grids in training with guidance, without label dropout",
        train("--sampler.guidance-scale", "2", *NO_NULL),
        GUIDED,
    ),
    Attack(
        "A6",
        "evaluation in training with guidance, without label dropout",
        train(
            "--eval.every",
            "5",
            "--eval.inception",
            "x",
            "--eval.reference",
            "y",
            "--eval.guidance-scale",
            "2",
            *NO_NULL,
        ),
        GUIDED,
    ),
    Attack(
        "A6",
        "guidance of a run of images without classes",
        train("--sampler.guidance-scale", "2", "--data.unconditional"),
        "must be 1",
    ),
    Attack(
        "A6",
        "a run at step 6 is to end at step 4",
        resumed("--train.steps", "4"),
        "the run is at step 6, and train.steps is 4: nothing is left to train",
        GOES_ON,
        writes=CHANGED,
        devices=True,
        slow=True,
    ),
    Attack("A6", "steps kept by --train.keep-every 4, then by 6", function(kept_by_two), "", GOES_ON, writes=("run*",)),
    Attack(
        "A6", "the best step of a run that later is not evaluated", function(best_kept), "", GOES_ON, writes=("run*",)
    ),
    Attack(
        "A6",
        "other averages than a run began with",
        resumed("--train.ema-decays", "0.5"),
        "was started with train.ema_decays [0.9, 0.99], found [0.5]",
        writes=CHANGED,
    ),
    Attack("A6", "--train.keep-every -1", train("--train.keep-every", "-1"), "train.keep_every must be"),
    Attack(
        "A6", "an average that a run does not have", draw("--ema", "0.5"), "must be one that the run kept (0.9, 0.99)"
    ),
    Attack("A6", "a width of a run without snapshots", draw("--ema-width", "0.1"), "--train.snapshot-every keeps them"),
    Attack(
        "A6",
        "guidance by a run that is not there",
        draw("--sampler.guide", "{here}/none", "--sampler.guidance-scale", "2"),
        "no checkpoint in {here}/none/checkpoints",
    ),
    Attack(
        "A6", "guidance in more than the whole", draw("--sampler.guidance-interval", "0", "2"), "must be (low, high)"
    ),
]


# --- B12: autoencoders


def latents(*arguments, vae="{vae}", before=None):
    names = ("--vae", vae, "--output", "{here}/out", "--images", "{images}", "--image-size", "8")
    return prepare("latents", *names, *arguments, before=before)


def of_folder(text=None, **config):
    """prepare latents by an autoencoder whose config.json has these values, or is this text."""

    def before(given, here):
        autoencoder(**config)(given, here)
        if text is not None:
            (here / "vae" / "config.json").write_text(text)

    return latents(vae="{here}/vae", before=before)


def decoded_by_another(given, here, patch):
    """The autoencoder of a run whose checkpoint says that its latents have another scale; their set is gone."""
    from gspn_jax.sampling.decoding import load_autoencoder
    from tests.training import tiny

    autoencoder(scaling_factor=0.13025)(given, here)
    config = tiny.config()
    object.__setattr__(config.data, "source", "latents")
    load_autoencoder(str(here / "vae"), config, latents={"scaling_factor": 0.18215, "shift_factor": 0.0})


B12 = [
    *(
        Attack("B12", f"--vae-scale {value}", latents("--vae-scale", value), says)
        for value, says in (
            ("0", "--vae-scale must be greater than 0"),
            ("-1", "--vae-scale must be greater than 0"),
            ("1e30", "--vae-scale must be greater than 0 and its shift a number, up to 1e+06"),
            ("nan", "--vae-scale must be finite"),
            ("abc", "could be instantiated"),
        )
    ),
    Attack("B12", "--vae-shift alone", latents("--vae-shift", "1"), "--vae-shift needs --vae-scale"),
    *(
        Attack("B12", f"an autoencoder {what}", make, says)
        for what, make, says in (
            ("whose config.json is a list", of_folder("[]"), "must hold a JSON object, found list"),
            ("whose config.json is cut", of_folder('{"scaling_f'), "must be a JSON file"),
            ("of the scale true", of_folder(scaling_factor=True), "must be greater than 0 and its shift a number"),
            ("of a scale of 400 digits", of_folder(scaling_factor=10**400), "found a longer one and 0.0"),
            ("of a scale that float32 does not hold", of_folder(scaling_factor=1e39), "up to 1e+06, found 1e+39"),
            ("whose shift is a list", of_folder(scaling_factor=1, shift_factor=[1]), "its shift a number"),
        )
    ),
    Attack(
        "B12",
        "an autoencoder of another scale than the latents of a run whose set is gone",
        function(decoded_by_another),
        "tells of latents of scaling_factor 0.13025 and shift_factor 0, found 0.18215 and 0 asked for",
        writes=("vae*",),
    ),
    Attack("B12", "an autoencoder for a run on pixels", draw("--vae", "{vae}"), "--vae is for a run on latents"),
    Attack(
        "B12",
        "an autoencoder that is a broken link",
        latents(vae="{here}/v", before=lambda given, here: (here / "v").symlink_to("nowhere")),
        "the weights must be a file, found nothing at",
    ),
]


# --- B13: scores

FEATURES = np.zeros((8, 2048), np.float32)


def scored(**arrays):
    """Images against a reference of these arrays; weights of Inception that are none would come after it."""
    names = ("--samples", "{images}", "--inception", "{other_weights}", "--reference", "{here}/s.npz")
    return evaluate(*names, before=npz(**arrays))


def samples(before):
    return evaluate("--samples", "{here}/s.npz", before=before)


B13 = [
    *(
        Attack("B13", f"a reference {what}", scored(**arrays), says)
        for what, arrays, says in (
            (
                "whose covariance is not symmetric",
                {"mu": np.zeros(2048, np.float32), "sigma": np.triu(np.ones((2048, 2048), np.float32))},
                "'sigma' in {here}/s.npz must be a covariance",
            ),
            (
                "whose variances are negative",
                {"mu": np.zeros(2048, np.float32), "sigma": -np.eye(2048, dtype=np.float32)},
                "must be a covariance",
            ),
            ("of bool", {"mu": np.zeros(2048, bool), "sigma": np.zeros((2048, 2048), bool)}, "must be numbers"),
            (
                "of -1 images",
                {"features": FEATURES, "num_images": -1},
                "'num_images' in {here}/s.npz must be 4 or more",
            ),
            ("of as many images as a text says", {"features": FEATURES, "num_images": "9"}, "must be integers"),
            (
                "of images of 0 x -3",
                {"features": FEATURES, "image_size": [0, -3]},
                "must be greater than 0, found (0, -3)",
            ),
            ("whose weights are bytes", {"features": FEATURES, "inception_sha256": b"abc"}, "must be text"),
            ("of one image", {"features": FEATURES[:1]}, "must be of 4 images or more for"),
            ("of no image", {"features": FEATURES[:0]}, "must be of 4 images or more for"),
            ("of another network", {"mu": np.zeros(64), "sigma": np.eye(64)}, "must be of 2048 features"),
            ("without covariance", {"mu": np.zeros(2048)}, "must have mu and sigma"),
        )
    ),
    *(
        Attack("B13", f"samples {what}", samples(before), says)
        for what, before, says in (
            ("of which there are none", npz(arr_0=np.zeros((0, 4, 4, 3), np.uint8)), "found uint8 [0, 4, 4, 3]"),
            ("of height 0", npz(arr_0=np.zeros((8, 0, 4, 3), np.uint8)), "found uint8 [8, 0, 4, 3]"),
            ("whose channels come first", npz(arr_0=np.zeros((8, 3, 4, 4), np.uint8)), "found uint8 [8, 3, 4, 4]"),
            ("of 64 bits", npz(arr_0=np.zeros((8, 4, 4, 3), np.int64)), "found int64 [8, 4, 4, 3]"),
            ("of another name", npz(images=np.zeros((8, 4, 4, 3), np.uint8)), "must have images as 'arr_0'"),
            ("that are an .npy", write("s.npz", b"\x93NUMPY\x01\0"), "File is not a zip file"),
            ("that are a folder of that name", lambda given, here: os.mkdir(here / "s.npz"), "found none below"),
        )
    ),
]


# --- B14: names


def config_of(fields):
    """train_dit.py with a config file that sets fields of a small config."""
    text = (
        "import dataclasses\nfrom gspn_jax.config import *\nfrom tests.training import tiny\n"
        f"config = dataclasses.replace(tiny.config('r'), {fields})\n"
    )
    return train(config="{here}/one.py", before=write("one.py", text))


HOME = "{home}/none"

B14 = [
    *(
        Attack("B14", f"a run directory {what}", train("--run-dir", name), says)
        for what, name, says in (
            ("in a bucket of gs", "gs://a/b", "run_dir must be a folder of this machine"),
            ("that is an address of a file", "file:///tmp/x", "run_dir must be a folder of this machine"),
            ("of an empty name", "", "run_dir must be a folder"),
            ("whose name is no text", "{here}/\udcff", "run_dir must lie in a path of valid Unicode"),
            ("whose name has a NUL", "{here}/a\0b", "run_dir must be a text without NUL"),
            ("whose name is too long", "{here}/" + "x" * 300, "File name too long"),
            ("that is a file", "{vae}", "run_dir must be a folder, found a file at"),
            ("below a file", "{vae}/run", "Not a directory"),
        )
    ),
    *(
        Attack("B14", f"the class {name!r}", draw(f"--classes={name}"), f"found {name!r}")
        for name in ("", "-1", "1.0", " 1", "01", "+1", "1_0", "10")
    ),
    *(
        Attack("B14", f"a home in {what}", make, HOME)
        for what, make in (
            ("a config file's init_from", config_of("init_from='~/none'")),
            ("a config file's teacher", config_of("distill=DistillConfig(teacher='~/none')")),
            ("a config file's data", config_of("data=DataConfig(source='folder', path='~/none')")),
            ("a config file's Inception", config_of("eval=EvalConfig(every=5, metrics=('is',), inception='~/none')")),
            (
                "NAME=FILE of a network",
                train("--eval.every", "5", "--eval.metrics", "is", "--eval.networks", "inception=~/none"),
            ),
            (
                "a classifier's data",
                flags(
                    classify.main, "train", "--config", "classify_cifar10", "--data.path=~/none", "--eval.path=~/none"
                ),
            ),
            ("weights to import", convert("import", "--weights", "~/none", "--output", "{here}/run")),
        )
    ),
    Attack(
        "B14", "data whose path has a NUL", config_of("data=DataConfig(source='folder', path='a\\0b')"), "without NUL"
    ),
    Attack(
        "B14",
        "data in a bucket",
        train("--data.source", "folder", "--data.path", "gs://b/x"),
        "found nothing at 'gs://b/x'",
    ),
    Attack("B14", "weights in a bucket", train("--init-from", "s3://bucket/x"), "found nothing at 's3://bucket/x'"),
    Attack("B14", "samples into a bucket", draw("--output", "s3://bucket/a.png"), "must lie in a folder that exists"),
]

ATTACKS = A6 + B12 + B13 + B14


@rows(ATTACKS)
def test_a_neighbour_is_withstood_too(attack, withstand):
    withstand(attack)
