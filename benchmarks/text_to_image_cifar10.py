"""A small real run from images to figures: a U-Net of pixels with attention learns CIFAR-10 by captions made from its
classes, and is distilled into GSPN (docs/text_to_image.md).

python benchmarks/text_to_image_cifar10.py --images CIFAR/train --held-out CIFAR/test --work WORK
python benchmarks/text_to_image_cifar10.py --images CIFAR/train --held-out CIFAR/test --work WORK --record

CIFAR is one folder of image files a class. WORK receives the model, the captions, both runs and what they give; a step
whose result is there is left out, and a run that was ended goes on. --record writes benchmarks/results and docs/images.
The text tower has random weights and is not trained: it gives each caption states of its own, and no more.
"""

import argparse
import csv
import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
NAME = "text_to_image_cifar10"

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SYNONYMS = {"airplane": "plane", "automobile": "car", "ship": "boat"}
TEMPLATES = ("a photo of {}", "{}", "a small picture of {}", "{} in a photo")
WIDTHS = (16, 32, 64, 128)
TEXT_WIDTH, TOKENS = 64, 16
SIZES = ((32, 32), (48, 48), (32, 64))
"""Height and width of samples; the first was trained on."""
GUIDANCE, STEPS, EACH = 3.0, 20, 3
"""Settings of the samples (DPM-Solver++), and how many each class has."""
HELD_OUT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of training images, one folder a class")
    parser.add_argument("--held-out", required=True, help="such a folder of test images")
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results and docs/images")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    teach(work, arguments.images, arguments.held_out)
    distil(work)
    draw(work)
    losses = read_losses(work)
    summary = summarized(work, losses)
    print(json.dumps(summary, indent=1))
    where = (RESULTS, IMAGES) if arguments.record else (work, work)
    write_losses(where[0] / f"{NAME}.csv", losses)
    (where[0] / f"{NAME}_cpu.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(losses, where[1] / f"{NAME}.png")
    for size in SIZES:
        grid(work, size).save(where[1] / f"{NAME}_{'x'.join(map(str, size))}.png")


# --- the model and its captions
def teach(work: pathlib.Path, images: str, held_out: str) -> None:
    """Prepares everything and trains the U-Net with attention: WORK/teacher."""
    if not (work / "untrained").exists():
        write_folder(work / "untrained", [caption(name, i) for name in CLASSES for i in range(len(TEMPLATES) * 2)])
    for name, folder in (("captions", images), ("held_out", held_out)):
        if not (work / name / "metadata.json").exists():
            write_captions(pathlib.Path(folder), work / f"{name}.json")
            call("prepare", "captions", f"--model={work}/untrained", f"--images={folder}",
                 f"--captions={work}/{name}.json", "--image-size=32", "--batch-size=256",
                 f"--output={work}/{name}")  # fmt: skip
    if not (work / "teacher").exists():
        call("text_to_image", "train", f"--config={ROOT}/configs/unet_cifar10.py", f"--model.folder={work}/untrained",
             f"--data.path={work}/captions", f"--run-dir={work}/unet")  # fmt: skip
        call("text_to_image", "export", f"--run={work}/unet", f"--output={work}/teacher")


def distil(work: pathlib.Path) -> None:
    """Trains GSPN layers as the student of the attentions: WORK/layers.safetensors."""
    if not (work / "layers.safetensors").exists():
        call("text_to_image", "distill", f"--config={ROOT}/configs/gspn_unet_cifar10.py",
             f"--model.folder={work}/teacher", f"--data.path={work}/captions", f"--run-dir={work}/gspn")  # fmt: skip
        call("text_to_image", "export", f"--run={work}/gspn", f"--output={work}/layers.safetensors")


def call(command: str, *arguments: str) -> None:
    """Runs a command of the project."""
    subprocess.run([sys.executable, "-m", f"gspn_jax.{command}", *arguments], check=True, cwd=ROOT)


def caption(name: str, number: int) -> str:
    """Caption of image `number` of a class: its templates in turn, then those with a synonym where there is one."""
    word = SYNONYMS.get(name, name) if number // len(TEMPLATES) % 2 else name
    article = "an" if word[0] in "aeiou" else "a"
    return TEMPLATES[number % len(TEMPLATES)].format(f"{article} {word}")


def write_captions(folder: pathlib.Path, path: pathlib.Path) -> None:
    """A file of captions for the images of a folder."""
    found = {}
    for name in CLASSES:
        files = sorted(file.name for file in (folder / name).iterdir())
        found |= {f"{name}/{file}": caption(name, i) for i, file in enumerate(files)}
    path.write_text(json.dumps(found))


def write_folder(folder: pathlib.Path, captions: list[str]) -> None:
    """A model as diffusers has it, without autoencoder and without weights of the U-Net: a byte-pair tokenizer of the
    captions, a text tower of random weights, the scheduler of DDPM (Ho et al. 2020) with v-prediction."""
    from safetensors.numpy import save_file

    from gspn_jax import text

    vocabulary, merges = tokenizer_of(captions)
    tower = {
        "architectures": ["CLIPTextModel"],
        "hidden_size": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 4 * TEXT_WIDTH,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": TOKENS,
    }
    levels = len(WIDTHS)
    transformers = (False, True, True, False)
    network = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(WIDTHS),
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in transformers],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(transformers)],
        "layers_per_block": 1,
        "attention_head_dim": [max(1, width // 32) for width in WIDTHS],
        "norm_num_groups": 8,
        "transformer_layers_per_block": [1] * levels,
        "cross_attention_dim": TEXT_WIDTH,
    }
    scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    parts = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline", "vae": [None, None]},
        "scheduler/scheduler_config.json": scheduler,
        "unet/config.json": network,
        "text_encoder/config.json": tower,
        "tokenizer/vocab.json": vocabulary,
        "tokenizer/tokenizer_config.json": {"model_max_length": TOKENS},
    }
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    rng = np.random.default_rng(0)

    def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.full(shape, float(name.endswith("weight")), np.float32)
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    shapes = text.expected_shapes(text.TextConfig.from_json(tower))
    weights = {f"text_model.{name}": drawn(name, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "text_encoder" / "model.safetensors")


def tokenizer_of(captions: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of a byte-pair encoding, as CLIP's, in which every word of the captions is a token."""
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    model.train_from_iterator(captions, trainer)
    found = json.loads(model.to_str())["model"]
    words = [word for word, _ in sorted(found["vocab"].items(), key=lambda item: item[1])]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return vocabulary, [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in found["merges"]]


# --- samples
def draw(work: pathlib.Path) -> None:
    """The same prompts, noise and sizes with the teacher's attention and with GSPN: WORK/drawn."""
    (work / "drawn").mkdir(exist_ok=True)
    (work / "prompts.txt").write_text("".join(f"{caption(name, 0)}\n" for name in CLASSES))
    mixers = {"attention": (), "gspn": ("--mixer=gspn", f"--gspn-layers={work}/layers.safetensors")}
    for mixer, flags in mixers.items():
        for height, width in SIZES:
            output = work / "drawn" / f"{mixer}_{height}x{width}.png"
            if not output.with_stem(f"{output.stem}_0").exists():
                call("text_to_image", f"--model={work}/teacher", f"--prompts={work}/prompts.txt", f"--images={EACH}",
                     f"--output={output}", f"--guidance={GUIDANCE}", f"--steps={STEPS}", "--sampler=dpm++",
                     "--batch-size=30",
                     "--size", str(height), str(width), *flags)  # fmt: skip


def grid(work: pathlib.Path, size: tuple[int, int], *, zoom: int = 2, edge: int = 2, label: int = 62) -> Image.Image:
    """A row for each class: images by attention, and those of the same noise by GSPN."""
    height, width = (zoom * side for side in size)
    columns = 2 * EACH
    sheet = Image.new(
        "RGB", (label + columns * (width + edge) + 4 * edge, 16 + len(CLASSES) * (height + edge)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for block, mixer in enumerate(("attention", "gspn")):
        left = label + block * (EACH * (width + edge) + 4 * edge)
        pen.text((left, 1), {"attention": "attention (teacher)", "gspn": "GSPN (student)"}[mixer], "black")
        for row, name in enumerate(CLASSES):
            pen.text((2, 16 + row * (height + edge) + height // 2 - 6), name, "black")
            for column in range(EACH):
                path = work / "drawn" / f"{mixer}_{size[0]}x{size[1]}_{EACH * row + column}.png"
                image = Image.open(path).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(image, (left + column * (width + edge), 16 + row * (height + edge)))
    return sheet.quantize(256)


def sample_gap(work: pathlib.Path, size: tuple[int, int]) -> dict[str, float]:
    """Mean absolute difference in levels of 255 of the samples by attention and by GSPN, and of different samples of a
    caption by attention."""

    def drawn(mixer: str) -> np.ndarray:
        paths = (work / "drawn" / f"{mixer}_{size[0]}x{size[1]}_{i}.png" for i in range(EACH * len(CLASSES)))
        return np.stack([np.asarray(Image.open(path), float) for path in paths]).reshape(len(CLASSES), EACH, *size, 3)

    teacher, student = drawn("attention"), drawn("gspn")
    return {
        "gspn": float(np.abs(teacher - student).mean()),
        "other_noise": float(np.abs(teacher - np.roll(teacher, 1, axis=1)).mean()),
    }


# --- losses
def read_losses(work: pathlib.Path) -> dict[str, list[dict[str, float]]]:
    """Logged losses of both runs by images seen."""
    from gspn_jax.runs import checkpoints

    found = {}
    for run in ("unet", "gspn"):
        lines = map(json.loads, (work / run / "metrics.jsonl").read_text().splitlines())
        batch = checkpoints.read_meta(work / run)[1]["config"]["train"]["batch_size"]
        names = ("loss", "noise", "teacher", "features")
        found[run] = [
            {"images": line["step"] * batch} | {name: line[name] for name in names if name in line}
            for line in lines
            if "loss" in line
        ]
    return found


def write_losses(path: pathlib.Path, losses: dict[str, list[dict[str, float]]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "images", "loss", "noise", "teacher", "features"])
        for run, lines in losses.items():
            for line in lines:
                writer.writerow(
                    [run, line["images"], *(f"{line[n]:.5g}" if n in line else "" for n in
                                            ("loss", "noise", "teacher", "features"))]
                )  # fmt: skip


def held_out(work: pathlib.Path) -> dict[str, Any]:
    """Losses on images that neither was trained on, at the same timesteps and noise: of the teacher, also told the
    captions of other images or without its self-attentions, of the student, and of the student before it was
    trained."""
    import jax
    import jax.numpy as jnp

    from gspn_jax import unet
    from gspn_jax.config import MeshConfig
    from gspn_jax.parallel import sharding
    from gspn_jax.runs import checkpoints
    from gspn_jax.text_to_image import gspn_layers, layer_files
    from gspn_jax.text_to_image.captions_task import mean_square
    from gspn_jax.text_to_image.config import LayersConfig
    from gspn_jax.text_to_image.distillation import LayersTask

    _, config = checkpoints.read_config(work / "gspn", cls=LayersConfig)
    task = LayersTask(_elsewhere(config, str(work / "teacher"), str(work / "held_out")))
    (frozen,) = task.frozen(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    fresh = jax.jit(task.init)(jax.random.key(config.train.seed))
    layers = {
        "before": gspn_layers.started_from(fresh, frozen),
        "student": layer_files.load(work / "layers.safetensors", task.unet_config).params,
    }

    @jax.jit
    def teacher(batch, times, noise):
        noised = task.noised(batch, times, noise, jnp.float32)

        def loss(context, mixer=None):
            output = unet.apply(frozen, task.unet_config, noised.x, times, context, noised.added, mixer=mixer)
            return mean_square(output, noised.target)

        context = batch["context"]
        return {
            "noise_of_teacher": loss(context),
            "noise_of_teacher_told_others": loss(jnp.roll(context, 1, axis=0)),
            "noise_without_self_attention": loss(context, lambda name, x: jnp.zeros_like(x)),
        }

    losses = jax.jit(task.losses)
    sums: dict[str, Any] = {"attention": {}} | {name: {} for name in layers}
    size = config.train.batch_size
    count = HELD_OUT // size
    with task.loader(task.source(), seed=0) as loader:
        for number in range(count):
            batch = {name: jnp.asarray(value) for name, value in next(loader).items()}
            time_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(1), number))
            times = jax.random.randint(time_key, (size,), 0, task.scheduler.timesteps)
            noise = jax.random.normal(noise_key, batch["image"].shape)
            found = {"attention": teacher(batch, times, noise)}
            found |= {name: losses(params, frozen, batch, times, noise) for name, params in layers.items()}
            for name, terms in found.items():
                for term, value in terms.items():
                    sums[name][term] = sums[name].get(term, 0.0) + float(value) / count
    return {"images": HELD_OUT} | sums.pop("attention") | sums


def _elsewhere(config: Any, folder: str, captions: str) -> Any:
    """The config with the model and the captions elsewhere."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, folder=folder),
        data=dataclasses.replace(config.data, path=captions),
    )


def summarized(work: pathlib.Path, losses: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    import jax

    from gspn_jax import unet
    from gspn_jax.text_to_image.folder import read_unet_config

    config = read_unet_config(work / "teacher")

    def last(run: str, name: str) -> float:
        tail = losses[run][-max(1, len(losses[run]) // 20) :]
        return float(np.mean([line[name] for line in tail]))

    return {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": "CPU",
        "parameters": {
            "unet": sum(int(np.prod(shape)) for shape in unet.shapes(config).values()),
            "attn1": sum(int(np.prod(shape)) for name, shape in unet.shapes(config).items() if ".attn1." in name),
            "gspn": json.loads((work / "layers.json").read_text())["parameters"],
        },
        "images_seen": {run: lines[-1]["images"] for run, lines in losses.items()},
        "hours": {run: hours(work / run) for run in losses},
        "last_twentieth": {
            "unet": last("unet", "loss"),
            "gspn": {name: last("gspn", name) for name in ("noise", "teacher", "features")},
        },
        "held_out": held_out(work),
        "samples": {"x".join(map(str, size)): sample_gap(work, size) for size in SIZES},
    }


def hours(run: pathlib.Path) -> float:
    """Hours of a run by its log: from the first line that was logged to the last, with compilation left out."""
    times = [json.loads(line)["time"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"time"' in line]
    return round((times[-1] - times[0]) / 3600, 2) if times else 0.0


def plot(losses: dict[str, list[dict[str, float]]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))

    def drawn(axes: Any, run: str, name: str, label: str) -> None:
        images = [line["images"] / 1000 for line in losses[run]]
        values = smoothed(line[name] for line in losses[run])
        axes.plot(images, values, label=label)

    drawn(left, "unet", "loss", "v")
    left.set(title="U-Net with attention", xlabel="thousand images seen", ylabel="mean squared error", yscale="log")
    for name, label in (("noise", "noise (v)"), ("teacher", "teacher"), ("features", "features")):
        drawn(right, "gspn", name, label)
    right.set(title="GSPN layers, distilled", xlabel="thousand images seen", yscale="log")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def smoothed(values: Iterable[float], keep: float = 0.8) -> list[float]:
    """An exponential mean, without bias at the start."""
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


if __name__ == "__main__":
    main()
