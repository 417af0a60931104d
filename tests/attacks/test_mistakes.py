"""Everyday mistakes (D): wrong settings, flags, paths, weights, data sets and runs; a sentence before device work."""

import json
import re
import shutil

from gspn_jax import sample
from gspn_jax import train as command
from tests.attacks.attack import GOES_ON, Attack, draw, flags, prepare, rows, train
from tests.attacks.given import RUN_CONFIG, write


def run(name, damage=lambda checkpoints: None):
    """A copy of the run in {here}/NAME, with the config file {here}/NAME.py; `damage` changes its checkpoints."""

    def before(given, here):
        copy = shutil.copytree(given.run, here / name)
        (here / f"{name}.py").write_text(RUN_CONFIG.format(str(copy)))
        damage(copy / "checkpoints")

    return {name: before, f"{name}.py": before}


def latents(name, damage):
    """A copy of the latents in {here}/NAME, changed."""

    def before(given, here):
        damage(shutil.copytree(given.latents, here / name))

    return {name: before}


def other_metadata(folder, **values):
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def empty(steps):
    for step in steps.iterdir():
        shutil.rmtree(step)
        step.mkdir()


FILES = {
    **run("run"),
    **run("empty_steps", empty),
    **run("flipped", lambda steps: [(step / "ema_0.9/_METADATA").write_text("{}") for step in steps.iterdir()]),
    **run("newest_flipped", lambda steps: (steps / "6/ema_0.9/_METADATA").write_text("{}")),
    **run("no_manifest", lambda steps: [(step / "manifest.json").unlink() for step in steps.iterdir()]),
    **run("no_meta", lambda steps: [(step / "meta/metadata").unlink() for step in steps.iterdir()]),
    **latents("old_latents", lambda folder: other_metadata(folder, version=99)),
    **latents("miscounted", lambda folder: other_metadata(folder, count=7)),
    **latents("no_shard", lambda folder: next(folder.glob("*array_record*")).unlink()),
    **latents("cut_shard", lambda folder: [p.write_bytes(p.read_bytes()[:50]) for p in folder.glob("*array_record*")]),
    **latents("bad_json", lambda folder: (folder / "metadata.json").write_text("{")),
    "no_images": lambda given, here: (here / "no_images/a").mkdir(parents=True),
    "cut.safetensors": lambda given, here: (here / "cut.safetensors").write_bytes(
        given.other_weights.read_bytes()[:-4]
    ),
    "foreign.bin": lambda given, here: shutil.copy(given.foreign_weights, here / "foreign.bin"),
}
"""What a row that names {here}/NAME finds there: (what is given, the row's folder) -> None."""
FILES |= {
    name: write(name, content)
    for name, content in {
        "file": "not what you think",
        "exists.png": "",
        "exists.npz": "",
        "text.safetensors": "hello" * 10,
        "weights.xyz": "",
        "no_config.py": "x = 1",
        "number.py": "config = 3",
        "syntax.py": "config = (",
        "imports.py": "import no_such_module_at_all",
        "raises.py": "config = {}['a']",
        "unknown_field.py": "from gspn_jax.config import Config\nconfig = Config('r', color=1)",
        "no_steps.py": "from gspn_jax.config import *\nconfig = Config('r', train=TrainConfig(steps=0))",
    }.items()
}


def mistake(kind, make, says, **more):
    """A row named after its command, which finds the `FILES` that it names."""
    names = sorted(FILES.keys() & set(re.findall(r"\{here\}/([\w.]+)", make.command)))

    def made(given, here):
        for name in names:
            FILES[name](given, here)
        return make(given, here)

    return Attack(kind, make.command.replace("{digits}", "digits"), made, says, **{"writes": ("*/lock",)} | more)


def encode(*arguments, vae="{vae}"):
    return prepare("latents", "--vae", vae, "--output", "{here}/out", *arguments)


def begin(*arguments):
    """A new run, in {here}/new: {here}/run is a copy of one that has checkpoints."""
    return train("--run-dir", "{here}/new", *arguments)


LATENTS = ("--data.source", "latents", "--data.channels", "4", "--data.path")
FOLDER = ("--data.source", "folder", "--data.channels", "3", "--data.num-classes", "2", "--data.path")
ATTACKS = [
    # the config, field by field
    mistake("D1", train("--train.steps", "0"), "train.steps must be greater than 0, found 0"),
    mistake("D1", train("--train.batch-size", "0"), "train.batch_size must be greater than 0, found 0"),
    mistake("D1", train("--train.batch-size", "12"), "train.batch_size must be a multiple of 8"),
    mistake("D1", train("--train.accumulate", "3"), "train.batch_size must be a multiple of train.accumulate (3)"),
    mistake("D1", train("--train.save-every", "0"), "train.save_every must be greater than 0"),
    mistake("D1", train("--train.keep-every", "-1"), "train.keep_every must be 0 or more, found -1"),
    mistake("D1", train("--train.seed", "-1"), "train.seed must be 0 or more"),
    mistake("D1", train("--train.ema-decays", "1.5"), "train.ema_decays must be decays in [0, 1), found (1.5,)"),
    mistake("D1", train("--train.precision", "float8"), "Expected one of ('params=float32,compute=bfloat16',"),
    mistake("D1", train("--train.precision", "params=float32"), "'params=float32,compute=float32')"),
    mistake(
        "D1", train("--train.allow-change", "model"), "train.allow_change must be one of 'data', 'train.batch_size'"
    ),
    mistake("D1", train("--optimizer.learning-rate", "0"), "optimizer.learning_rate must be greater than 0"),
    mistake("D1", train("--optimizer.learning-rate", "nan"), "optimizer.learning_rate must be"),
    mistake("D1", train("--optimizer.final-learning-rate", "1"), "between 0 and optimizer.learning_rate, found 1.0"),
    mistake("D1", train("--optimizer.b1", "1"), "optimizer.b1 must be in [0, 1), found 1.0"),
    mistake("D1", train("--optimizer.clip-norm", "0"), "optimizer.clip_norm must be greater than 0"),
    mistake("D1", train("--optimizer.weight-decay", "-1"), "optimizer.weight_decay must be 0 or more"),
    mistake("D1", train("--optimizer.warmup-steps", "99999"), "optimizer.warmup_steps must be at most train.steps"),
    mistake("D1", train("--diffusion.timesteps", "1"), "diffusion.timesteps must be greater than 1"),
    mistake("D1", train("--diffusion.label-dropout", "1"), "diffusion.label_dropout must be in [0, 1)"),
    mistake("D1", train("--sampler.steps", "0"), "sampler.steps must be greater than 0"),
    mistake("D1", train("--sampler.guidance-scale", "-1"), "sampler.guidance_scale must be 0 or more"),
    mistake("D1", train("--sampler.guidance-interval", "0.8", "0.1"), "0 <= low < high <= 1, found (0.8, 0.1)"),
    mistake("D1", train("--sampler.ddim-eta", "2"), "sampler.ddim_eta must be in [0, 1]"),
    mistake("D1", train("--diffusion.objective", "ddpm", "--sampler.name", "heun"), "sampler.name must be one of"),
    mistake("D1", train("--guard.spike-factor", "-1"), "guard.spike_factor must be 0 or more"),
    mistake("D1", train("--guard.max-rollbacks", "-1"), "guard.max_rollbacks must be 0 or more"),
    mistake("D1", train("--eval.every", "-1"), "eval.every must be 0 or more"),
    mistake("D1", train("--eval.every", "5"), "eval.reference must be a file of reference statistics for eval.metrics"),
    mistake("D1", train("--data.workers", "-1"), "data.workers must be 0 or more"),
    mistake("D1", train("--data.image-size", "0"), "data.image_size must be greater than 0"),
    mistake("D1", train("--data.image-size", "9"), "found"),
    mistake("D1", train("--data.num-classes", "7"), "7"),
    mistake("D1", train("--mesh.data", "0"), "mesh.data must be -1 or greater than 0"),
    mistake("D1", train("--mesh.fsdp", "3"), "must be the 8 devices there are"),
    mistake("D1", train("--mesh.tensor", "16"), "must be the 8 devices there are"),
    mistake("D1", train("--model.preset", "GSPN-XXL/2"), "GSPN-XXL/2"),
    mistake("D1", train("--model.hidden", "0"), "model.hidden must be greater than 0 or None"),
    mistake("D1", train("--model.drop-path", "1"), "model.drop_path must be in [0, 1)"),
    mistake("D1", train("--model.layout", "paper", "--model.mixer", "attention"), "mixer"),
    mistake("D1", train("--model.chunk", "2", "2"), "chunk"),
    mistake("D1", train("--model.preset", "DiT-S/2", "--model.heads", "5"), "heads"),
    mistake("D1", train("--model.groups", "7"), "groups"),
    mistake("D1", train("--model.backend", "mosaic_gpu"), "mosaic_gpu"),
    mistake("D1", train("--run-dir", ""), "run_dir must be a folder"),
    # flags and config files
    mistake("D2", train("--train.stepz", "3"), "Unrecognized options: --train.stepz"),
    mistake("D2", train("--train.steps", "many"), "invalid literal for int()"),
    mistake("D2", train("--diffusion.objective", "gan"), "gan"),
    mistake("D2", flags(command.main), "needs --config NAME_OR_FILE"),
    mistake("D2", train(config="{here}/nothing.py"), "which is no file"),
    mistake("D2", train(config="{images}"), "which is no file"),
    mistake("D2", train(config="{here}/no_config.py"), "must define `config = Config(...)`, found NoneType"),
    mistake("D2", train(config="{here}/number.py"), "must define `config = Config(...)`, found int"),
    mistake("D2", train(config="{here}/syntax.py"), "found SyntaxError"),
    mistake("D2", train(config="{here}/imports.py"), "found ModuleNotFoundError"),
    mistake("D2", train(config="{here}/raises.py"), "found KeyError"),
    mistake("D2", train(config="{here}/unknown_field.py"), "found TypeError"),
    mistake("D2", train(config="{here}/no_steps.py"), "train.steps must be greater than 0"),
    mistake(
        "D2", train("--coordinator", "host:1"), "several processes need --coordinator, --num-processes, --process-id"
    ),
    # data sets and paths
    mistake("D3", train("--run-dir", "{here}/file"), "{here}/file"),
    mistake("D3", train("--run-dir", "{here}/file/run"), "{here}/file/run"),
    mistake("D3", train("--data.source", "folder"), "data.path must be the image folder"),
    mistake("D3", train(*FOLDER, "{here}/nowhere"), "{here}/nowhere"),
    mistake("D3", train(*FOLDER, "{here}/file"), "{here}/file"),
    mistake("D3", train(*FOLDER, "{here}/no_images"), "{here}/no_images"),
    mistake(
        "D3",
        train(*FOLDER, "{images}", "--data.num-classes", "3"),
        "data.num_classes is 3, but the folder '{images}' has 2 classes (a, b)",
    ),
    mistake("D3", train("--data.source", "tfds"), "data.name must be a tensorflow-datasets name"),
    mistake(
        "D3", train("--data.source", "tfds", "--data.name", "no_such_set", "--data.path", "{images}"), "no_such_set"
    ),
    mistake("D3", train("--data.source", "latents"), "data.path must be the folder of latents"),
    mistake("D3", train(*LATENTS, "{images}"), "found no metadata.json in"),
    mistake("D3", train(*LATENTS, "{here}/old_latents"), "must be of format version 1, found 99"),
    mistake("D3", train(*LATENTS, "{here}/miscounted"), "must count the same latents"),
    mistake("D3", train(*LATENTS, "{here}/no_shard"), "array_record"),
    mistake("D3", train(*LATENTS, "{here}/cut_shard"), "array_record"),
    mistake("D3", train(*LATENTS, "{here}/bad_json"), "metadata.json is no JSON"),
    mistake("D3", train(*LATENTS, "{latents}", "--data.image-size", "4"), "data.image_size"),
    # a run that goes on as another, or has nothing whole to go on from
    mistake("D4", train("--train.seed", "1", config="{here}/run.py"), "was started with train.seed 0, found 1"),
    mistake(
        "D4", train("--train.batch-size", "32", config="{here}/run.py"), "go on all the same with --train.allow-change"
    ),
    mistake("D4", train("--model.depth", "4", config="{here}/run.py"), "was started with model.depth 2, found 4"),
    mistake("D4", train("--data.flip", config="{here}/run.py"), "data.flip False, found True"),
    mistake(
        "D4",
        train(config="{here}/empty_steps.py"),
        "must hold a whole checkpoint, found none (step 6: it has no manifest.json",
    ),
    mistake("D4", train(config="{here}/flipped.py"), "ema_0.9/_METADATA has 2 bytes, not the"),
    mistake("D4", train(config="{here}/no_manifest.py"), "it was never finished"),
    mistake("D4", train(config="{here}/no_meta.py"), "meta/metadata is missing"),
    # sampling
    mistake("D5", flags(sample.main), "gspn-sample needs --run"),
    mistake("D5", draw(run="{here}/nowhere"), "no checkpoint in {here}/nowhere"),
    mistake("D5", draw(run="{images}"), "no checkpoint in {images}"),
    mistake("D5", draw(run="{here}/flipped"), "must hold a whole checkpoint"),
    mistake(
        "D5",
        draw("--step", "6", run="{here}/newest_flipped"),
        "must be as it was saved, but ema_0.9/_METADATA has 2 bytes",
    ),
    mistake("D5", draw("--step", "7"), "no checkpoint of step 7"),
    mistake("D5", draw("--step", "last"), "invalid int value: 'last'"),
    mistake("D5", draw("--ema", "0.5"), "one that the run kept (0.9, 0.99)"),
    mistake("D5", draw("--output", "grid.npz"), "--output must end in .png, found 'grid.npz'"),
    mistake("D5", draw("--num-samples", "4", "--output", "samples.png"), "--output must end in .npz"),
    mistake("D5", draw("--output", "{here}/nowhere/grid.png"), "must lie in a folder that exists"),
    mistake("D5", draw("--output", "{here}/exists.png"), "{here}/exists.png exists already"),
    mistake("D5", draw("--num-samples", "4", "--output", "{here}/exists.npz"), "{here}/exists.npz exists already"),
    mistake("D5", draw("--per-class", "0"), "--per-class must be 1 or more"),
    mistake("D5", draw("--num-samples", "-1"), "--num-samples must be 0 or more"),
    mistake("D5", draw("--batch-size", "0"), "--batch-size must be 1 or more"),
    mistake("D5", draw("--classes", "99"), "--classes must be numbers in 0..9"),
    mistake("D5", draw("--classes", "cat"), "found 'cat'"),
    mistake("D5", draw("--sampler.name", "ddim"), "sampler.name must be one of"),
    mistake("D5", draw("--sampler.steps", "0"), "sampler.steps must be greater than 0"),
    mistake("D5", draw("--image-size", "7", "8"), "must be a multiple of the patch (2), found 7x8"),
    mistake("D5", draw("--vae", "{other_weights}"), "--vae is for a run on latents"),
    mistake("D5", draw("--mesh.fsdp", "3"), "must be the 8 devices there are"),
    mistake("D5", draw("--colour", "red"), "--colour"),
    # preparation and weights
    mistake("D6", prepare("nothing"), "gspn_jax.prepare can prepare"),
    mistake("D6", encode(), "one of --images, --tars and --tfds must be given"),
    mistake(
        "D6", encode("--images", "{images}", "--tars", "{images}"), "one of --images, --tars and --tfds must be given"
    ),
    mistake("D6", encode("--images", "{here}/nowhere"), "{here}/nowhere"),
    mistake("D6", encode("--images", "{images}", "--image-size", "0"), "image"),
    mistake("D6", encode("--images", "{images}", "--num-hosts", "2", "--host", "2"), "host"),
    mistake("D6", encode("--tars", "{images}"), "tar"),
    mistake("D6", encode("--images", "{images}", vae="{other_weights}"), "must be those of an AutoencoderKL"),
    mistake(
        "D6",
        encode("--images", "{images}", vae="{here}/nowhere.safetensors"),
        "the weights must be a file, found nothing at",
    ),
    mistake("D6", encode("--images", "{images}", vae="{here}/cut.safetensors"), "cut.safetensors"),
    mistake("D6", encode("--images", "{images}", vae="{here}/text.safetensors"), "text.safetensors"),
    mistake("D6", encode("--images", "{images}", vae="{here}/weights.xyz"), "weights.xyz"),
    mistake("D6", encode("--images", "{images}", vae="{here}/foreign.bin"), "foreign.bin"),
    # a run that begins with the weights of another, trains a part, has no classes, or learns from a teacher
    mistake("D7", begin("--init-from", "{here}/nowhere"), "found nothing at '{here}/nowhere'"),
    mistake("D7", begin("--init-from", "{here}/nowhere.safetensors"), "found nothing at '{here}/nowhere.safetensors'"),
    mistake("D7", begin("--init-from", ""), "init_from must be a run directory, a file of weights, or None, found ''"),
    mistake("D7", begin("--init-from", "{images}"), "no checkpoint in {images}"),
    mistake("D7", begin("--init-from", "{here}/flipped"), "ema_0.9/_METADATA has 2 bytes, not the"),
    mistake("D7", begin("--init-from", "{here}/no_meta"), "meta/metadata is missing"),
    mistake("D7", begin("--init-from", "{here}/text.safetensors"), "text.safetensors must be a safetensors file"),
    mistake("D7", begin("--init-from", "{here}/cut.safetensors"), "cut.safetensors"),
    mistake("D7", begin("--init-from", "{here}/weights.xyz"), "weights.xyz"),
    mistake("D7", begin("--init-from", "{other_weights}"), "other.safetensors: the weights must be those of a DiT"),
    mistake(
        "D7",
        begin("--init-from", "{run}", "--model.preset", "DiT-S/2", "--model.hidden", "64", "--model.heads", "4"),
        ("init_from must have parameters of the shapes of the config, found", "of shape"),
    ),
    mistake(
        "D7",
        train("--init-from", "{here}/nowhere", config="{here}/run.py"),
        "run has checkpoints and goes on from them: init_from is for a new run",
        code=GOES_ON,
        writes=("run/*",),
    ),
    mistake("D7", train("--train.only", "["), "train.only must be a regular expression, found '['"),
    mistake(
        "D7",
        train("--train.only", "attention"),
        ("found 'attention', which is in none of final/linear/bias,", "time_embed/fc1/bias"),
    ),
    mistake("D7", train("--data.unconditional"), "sampler.guidance_scale must be 1 with data.unconditional"),
    mistake(
        "D7",
        train(*FOLDER, "{here}/nowhere", "--data.unconditional", "--sampler.guidance-scale", "1"),
        "the folder '{here}/nowhere' cannot be read",
    ),
    mistake(
        "D7",
        train(*FOLDER, "{here}/no_images", "--data.unconditional", "--sampler.guidance-scale", "1"),
        "a folder of images must hold JPEG, PNG",
    ),
    mistake("D7", train("--distill.teacher", "{here}/nowhere"), "no checkpoint in {here}/nowhere"),
    mistake("D7", train("--distill.features", "0"), "distill.teacher must be the run directory of a trained denoiser"),
    mistake("D7", train("--distill.features", "-1"), "distill.features must be numbers of blocks from 0"),
    mistake("D7", train("--distill.data-weight", "-1"), "distill.data_weight must be 0 or more"),
    mistake(
        "D7",
        begin("--distill.teacher", "{run}", "--diffusion.objective", "ddpm", "--sampler.name", "ddim"),
        "diffusion.objective must be that of the teacher in {run}, 'flow', found 'ddpm'",
    ),
    mistake(
        "D7",
        begin("--distill.teacher", "{run}", "--data.image-size", "16"),
        "data.image_size must be that of the teacher in {run}, 8, found 16",
    ),
    mistake("D4", train(config="{here}/run.py"), "", code=GOES_ON, writes=("run/*",)),
]


@rows(ATTACKS)
def test_a_mistake_is_said(attack, withstand):
    withstand(attack)
