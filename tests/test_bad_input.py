"""Wrong configs, flags, paths, weights, data sets and checkpoints: exit code 2 and a sentence, before device work."""

import dataclasses
import json
import pathlib
import pickle
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import sample
import train_dit
from gspn_jax import autoencoder, prepare
from gspn_jax.autoencoder.weights import expected_shapes
from gspn_jax.data.latents import write_synthetic
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.sampling import sampler
from gspn_jax.training import train as page
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import create_state
from tests.foreign import Foreign
from tests.training import tiny

DIGITS = str(pathlib.Path(__file__).parents[1] / "configs" / "digits.py")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run, damaged runs, data sets and weights, of which each mistake takes what it needs."""
    root = tmp_path_factory.mktemp("files")
    config = tiny.config(root / "run")
    run_config = f"from tests.training import tiny\nconfig = tiny.config({str(root / 'run')!r})\n"
    (root / "run.py").write_text(run_config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    from gspn_jax.data import make_source

    with Checkpoints(config, make_source(config.data).fingerprint, [str(i) for i in range(10)]) as saver:
        for step in (3, 6):
            saver.save(step, create_state(DiffusionTask(config), mesh))

    def damaged(name, damage):
        damage(checkpoints.folder(shutil.copytree(root / "run", root / name)))
        (root / f"{name}.py").write_text(run_config.replace(str(root / "run"), str(root / name)))

    damaged("empty_steps", lambda where: [(shutil.rmtree(p), p.mkdir()) for p in where.iterdir() if p.name.isdigit()])
    damaged("flipped", lambda where: [(p / "ema_0.9" / "_METADATA").write_text("{}") for p in where.iterdir()])
    damaged("newest_flipped", lambda where: (where / "6" / "ema_0.9" / "_METADATA").write_text("{}"))
    damaged("no_manifest", lambda where: [(p / "manifest.json").unlink() for p in where.iterdir()])
    meta = "meta/metadata"
    damaged("no_meta", lambda where: [(p / meta).unlink() for p in where.iterdir()])

    for name in "ab":
        (root / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8)).save(root / "images" / name / f"{i}.png")
    (root / "no_images" / "a").mkdir(parents=True)
    (root / "file").write_text("not what you think")
    (root / "exists.png").write_text("")
    (root / "exists.npz").write_text("")

    def latents(name, damage=lambda folder: None):
        write_synthetic(root / name, records=8, shards=2, latent_shape=(8, 8, 4), num_classes=10)
        damage(root / name)

    def other_metadata(folder, **values):
        path = folder / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    latents("latents")
    latents("old_latents", lambda folder: other_metadata(folder, version=99))
    latents("miscounted", lambda folder: other_metadata(folder, count=7))
    latents("no_shard", lambda folder: next(folder.glob("*array_record*")).unlink())
    latents("cut_shard", lambda folder: [p.write_bytes(p.read_bytes()[:50]) for p in folder.glob("*array_record*")])
    latents("bad_json", lambda folder: (folder / "metadata.json").write_text("{"))

    save_file({"a": np.zeros(3, np.float32)}, root / "other.safetensors")
    sizes = autoencoder.AutoencoderConfig(channels=(32,), layers=1)
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(sizes).items()}, root / "vae.safetensors"
    )
    (root / "cut.safetensors").write_bytes((root / "other.safetensors").read_bytes()[:-4])
    (root / "text.safetensors").write_text("hello" * 10)
    (root / "foreign.bin").write_bytes(pickle.dumps({"a": Foreign(root / "unpickled")}, protocol=2))
    (root / "weights.xyz").write_text("")
    for name, text in (
        ("no_config.py", "x = 1"),
        ("number.py", "config = 3"),
        ("syntax.py", "config = ("),
        ("imports.py", "import no_such_module_at_all"),
        ("raises.py", "config = {}['a']"),
        ("unknown_field.py", "from gspn_jax.config import Config\nconfig = Config('r', color=1)"),
        ("no_steps.py", "from gspn_jax.config import *\nconfig = Config('r', train=TrainConfig(steps=0))"),
    ):
        (root / name).write_text(text)
    return root


def train(*flags, config=DIGITS):
    return train_dit.main, ["--config", config, *flags]


def draw(*flags, run="{}/run"):
    return sample.main, ["--run", run, *flags]


def encode(*flags, vae="{}/vae.safetensors"):
    return prepare.main, ["latents", "--vae", vae, "--output", "{}/out", *flags]


LATENTS = ("--data.source", "latents", "--data.channels", "4", "--data.path")
FOLDER = ("--data.source", "folder", "--data.channels", "3", "--data.num-classes", "2", "--data.path")

MISTAKES = [
    # the config, field by field
    (train("--train.steps", "0"), "train.steps must be greater than 0, found 0"),
    (train("--train.batch-size", "0"), "train.batch_size must be greater than 0, found 0"),
    (train("--train.batch-size", "12"), "train.batch_size must be a multiple of 8"),
    (train("--train.accumulate", "3"), "train.batch_size must be a multiple of train.accumulate (3)"),
    (train("--train.save-every", "0"), "train.save_every must be greater than 0"),
    (train("--train.keep-every", "-1"), "train.keep_every must be 0 or more, found -1"),
    (train("--train.seed", "-1"), "train.seed must be 0 or more"),
    (train("--train.ema-decays", "1.5"), "train.ema_decays must be decays in [0, 1), found (1.5,)"),
    (train("--train.precision", "float8"), "Expected one of ('params=float32,compute=bfloat16',"),
    (train("--train.precision", "params=float32"), "'params=float32,compute=float32')"),
    (train("--train.allow-change", "model"), "train.allow_change must be one of 'data', 'train.batch_size'"),
    (train("--optimizer.learning-rate", "0"), "optimizer.learning_rate must be greater than 0"),
    (train("--optimizer.learning-rate", "nan"), "optimizer.learning_rate must be"),
    (train("--optimizer.final-learning-rate", "1"), "between 0 and optimizer.learning_rate, found 1.0"),
    (train("--optimizer.b1", "1"), "optimizer.b1 must be in [0, 1), found 1.0"),
    (train("--optimizer.clip-norm", "0"), "optimizer.clip_norm must be greater than 0"),
    (train("--optimizer.weight-decay", "-1"), "optimizer.weight_decay must be 0 or more"),
    (train("--optimizer.warmup-steps", "99999"), "optimizer.warmup_steps must be at most train.steps"),
    (train("--diffusion.timesteps", "1"), "diffusion.timesteps must be greater than 1"),
    (train("--diffusion.label-dropout", "1"), "diffusion.label_dropout must be in [0, 1)"),
    (train("--sampler.steps", "0"), "sampler.steps must be greater than 0"),
    (train("--sampler.guidance-scale", "-1"), "sampler.guidance_scale must be 0 or more"),
    (train("--sampler.guidance-interval", "0.8", "0.1"), "0 <= low < high <= 1, found (0.8, 0.1)"),
    (train("--sampler.ddim-eta", "2"), "sampler.ddim_eta must be in [0, 1]"),
    (train("--diffusion.objective", "ddpm", "--sampler.name", "heun"), "sampler.name must be one of"),
    (train("--guard.spike-factor", "-1"), "guard.spike_factor must be 0 or more"),
    (train("--guard.max-rollbacks", "-1"), "guard.max_rollbacks must be 0 or more"),
    (train("--eval.every", "-1"), "eval.every must be 0 or more"),
    (train("--eval.every", "5"), "eval.reference must be a file of reference statistics for eval.metrics"),
    (train("--data.workers", "-1"), "data.workers must be 0 or more"),
    (train("--data.image-size", "0"), "data.image_size must be greater than 0"),
    (train("--data.image-size", "9"), "found"),
    (train("--data.num-classes", "7"), "7"),
    (train("--mesh.data", "0"), "mesh.data must be -1 or greater than 0"),
    (train("--mesh.fsdp", "3"), "must be the 8 devices there are"),
    (train("--mesh.tensor", "16"), "must be the 8 devices there are"),
    (train("--model.preset", "GSPN-XXL/2"), "GSPN-XXL/2"),
    (train("--model.hidden", "0"), "model.hidden must be greater than 0 or None"),
    (train("--model.drop-path", "1"), "model.drop_path must be in [0, 1)"),
    (train("--model.layout", "paper", "--model.mixer", "attention"), "mixer"),
    (train("--model.chunk", "2", "2"), "chunk"),
    (train("--model.preset", "DiT-S/2", "--model.heads", "5"), "heads"),
    (train("--model.groups", "7"), "groups"),
    (train("--model.backend", "mosaic_gpu"), "mosaic_gpu"),
    (train("--run-dir", ""), "run_dir must be a folder"),
    # flags and config files
    (train("--train.stepz", "3"), "Unrecognized options: --train.stepz"),
    (train("--train.steps", "many"), "invalid literal for int()"),
    (train("--diffusion.objective", "gan"), "gan"),
    ((train_dit.main, []), "needs --config NAME_OR_FILE"),
    (train(config="{}/nothing.py"), "which is no file"),
    (train(config="{}/images"), "which is no file"),
    (train(config="{}/no_config.py"), "must define `config = Config(...)`, found NoneType"),
    (train(config="{}/number.py"), "must define `config = Config(...)`, found int"),
    (train(config="{}/syntax.py"), "found SyntaxError"),
    (train(config="{}/imports.py"), "found ModuleNotFoundError"),
    (train(config="{}/raises.py"), "found KeyError"),
    (train(config="{}/unknown_field.py"), "found TypeError"),
    (train(config="{}/no_steps.py"), "train.steps must be greater than 0"),
    (train("--coordinator", "host:1"), "several processes need --coordinator, --num-processes, --process-id"),
    # data sets and paths
    (train("--run-dir", "{}/file"), "{}/file"),
    (train("--run-dir", "{}/file/run"), "{}/file/run"),
    (train("--data.source", "folder"), "data.path must be the image folder"),
    (train(*FOLDER, "{}/nowhere"), "{}/nowhere"),
    (train(*FOLDER, "{}/file"), "{}/file"),
    (train(*FOLDER, "{}/no_images"), "{}/no_images"),
    (
        train(*FOLDER, "{}/images", "--data.num-classes", "3"),
        "data.num_classes is 3, but the folder '{}/images' has 2 classes (a, b)",
    ),
    (train("--data.source", "tfds"), "data.name must be a tensorflow-datasets name"),
    (train("--data.source", "tfds", "--data.name", "no_such_set", "--data.path", "{}/images"), "no_such_set"),
    (train("--data.source", "latents"), "data.path must be the folder of latents"),
    (train(*LATENTS, "{}/images"), "found no metadata.json in"),
    (train(*LATENTS, "{}/old_latents"), "must be of format version 1, found 99"),
    (train(*LATENTS, "{}/miscounted"), "must count the same latents"),
    (train(*LATENTS, "{}/no_shard"), "array_record"),
    (train(*LATENTS, "{}/cut_shard"), "array_record"),
    (train(*LATENTS, "{}/bad_json"), "metadata.json is no JSON"),
    (train(*LATENTS, "{}/latents", "--data.image-size", "4"), "data.image_size"),
    # a run that goes on as another, or has nothing whole to go on from
    (train("--train.seed", "1", config="{}/run.py"), "was started with train.seed 0, found 1"),
    (train("--train.batch-size", "32", config="{}/run.py"), "go on all the same with --train.allow-change"),
    (train("--model.depth", "4", config="{}/run.py"), "was started with model.depth 2, found 4"),
    (train("--data.flip", config="{}/run.py"), "data.flip False, found True"),
    (train(config="{}/empty_steps.py"), "must hold a whole checkpoint, found none (step 6: it has no manifest.json"),
    (train(config="{}/flipped.py"), "ema_0.9/_METADATA has 2 bytes, not the"),
    (train(config="{}/no_manifest.py"), "it was never finished"),
    (train(config="{}/no_meta.py"), "meta/metadata is missing"),
    # sampling
    ((sample.main, []), "gspn-sample needs --run"),
    (draw(run="{}/nowhere"), "no checkpoint in {}/nowhere"),
    (draw(run="{}/images"), "no checkpoint in {}/images"),
    (draw(run="{}/flipped"), "must hold a whole checkpoint"),
    (draw("--step", "6", run="{}/newest_flipped"), "must be as it was saved, but ema_0.9/_METADATA has 2 bytes"),
    (draw("--step", "7"), "no checkpoint of step 7"),
    (draw("--step", "last"), "invalid int value: 'last'"),
    (draw("--ema", "0.5"), "one that the run kept (0.9, 0.99)"),
    (draw("--output", "grid.npz"), "--output must end in .png, found 'grid.npz'"),
    (draw("--num-samples", "4", "--output", "samples.png"), "--output must end in .npz"),
    (draw("--output", "{}/nowhere/grid.png"), "must lie in a folder that exists"),
    (draw("--output", "{}/exists.png"), "{}/exists.png exists already"),
    (draw("--num-samples", "4", "--output", "{}/exists.npz"), "{}/exists.npz exists already"),
    (draw("--per-class", "0"), "--per-class must be 1 or more"),
    (draw("--num-samples", "-1"), "--num-samples must be 0 or more"),
    (draw("--batch-size", "0"), "--batch-size must be 1 or more"),
    (draw("--classes", "99"), "--classes must be numbers in 0..9"),
    (draw("--classes", "cat"), "found 'cat'"),
    (draw("--sampler.name", "ddim"), "sampler.name must be one of"),
    (draw("--sampler.steps", "0"), "sampler.steps must be greater than 0"),
    (draw("--image-size", "7", "8"), "must be a multiple of the patch (2), found 7x8"),
    (draw("--vae", "{}/other.safetensors"), "--vae is for a run on latents"),
    (draw("--mesh.fsdp", "3"), "must be the 8 devices there are"),
    (draw("--colour", "red"), "--colour"),
    # preparation and weights
    ((prepare.main, ["nothing"]), "gspn_jax.prepare can prepare"),
    (encode(), "one of --images, --tars and --tfds must be given"),
    (encode("--images", "{}/images", "--tars", "{}/images"), "one of --images, --tars and --tfds must be given"),
    (encode("--images", "{}/nowhere"), "{}/nowhere"),
    (encode("--images", "{}/images", "--image-size", "0"), "image"),
    (encode("--images", "{}/images", "--num-hosts", "2", "--host", "2"), "host"),
    (encode("--tars", "{}/images"), "tar"),
    (encode("--images", "{}/images", vae="{}/other.safetensors"), "must be those of an AutoencoderKL"),
    (encode("--images", "{}/images", vae="{}/nowhere.safetensors"), "the weights must be a file, found nothing at"),
    (encode("--images", "{}/images", vae="{}/cut.safetensors"), "cut.safetensors"),
    (encode("--images", "{}/images", vae="{}/text.safetensors"), "text.safetensors"),
    (encode("--images", "{}/images", vae="{}/weights.xyz"), "weights.xyz"),
    (encode("--images", "{}/images", vae="{}/foreign.bin"), "foreign.bin"),
]


def test_there_are_at_least_sixty():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize(
    ("call", "said"), MISTAKES, ids=[" ".join([call[0].__module__, *call[1]]).replace("/", "|") for call, _ in MISTAKES]
)
def test_a_mistake_gets_a_sentence_and_code_2_without_device_work(call, said, files, tmp_path, capsys, monkeypatch):
    main, arguments = call
    arguments = [argument.replace("{}", str(files)) for argument in arguments]
    if main is train_dit.main and "--run-dir" not in arguments and DIGITS in arguments:
        arguments += ["--run-dir", str(tmp_path / "run")]

    def device_work(*_, **__):
        raise AssertionError("the devices were put to work")

    for module, name in (
        (page, "create_state"),
        (page, "make_step"),
        (checkpoints, "read_items"),
        (sampler.Sampler, "__call__"),
        (autoencoder.Autoencoder, "encode"),
    ):
        monkeypatch.setattr(module, name, device_work)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2, shown
    assert "Traceback" not in shown
    assert said.replace("{}", str(files)) in " ".join(shown.replace("│", " ").split()), shown
    assert not (files / "unpickled").exists()


def test_going_on_as_saved_is_no_mistake(files):
    """The run of the table is fine as it is: what is refused there is refused for its change."""
    config = dataclasses.replace(tiny.config(files / "run"))
    assert checkpoints.read_config(files / "run") == (6, config)
