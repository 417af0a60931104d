"""A real run for as long as there is time: a GSPN on CIFAR-10's pixels, its samples, and what a classifier says.

    python benchmarks/gpu_run.py --images CIFAR --seconds 120 --out run.json --grid samples.png

`CIFAR` holds `train/<class>/*.jpg` and `test/<class>/*.jpg`, or is a .tar.gz of those. GSPN-S/2 in patches of 2
(16x16 tokens), flow matching, bfloat16, images in memory, a constant learning rate after the warm-up, samples from
the average of the parameters. When the time is up the run gets SIGTERM, as from a scheduler, saves and stops; then a
grid of samples is drawn from its checkpoint, and `--samples` more are judged by a classifier that is trained on the
same images: the share that it gives the class asked for, and the Frechet distance in its features, beside that of
held-out real images. Those numbers are not FID. Results are written after each part. `--rehearse`: a tiny network, a
few steps.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from gpu_record import Record
from image_loader import make_images

from gspn_jax import cli, data, models
from gspn_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainConfig,
)
from gspn_jax.data.memory import MemorySource
from gspn_jax.metrics.classifier import ClassifierJudge
from gspn_jax.parallel import sharding
from gspn_jax.runs import checkpoints
from gspn_jax.sampling.drawing import Drawing
from gspn_jax.sampling.grid import grid
from gspn_jax.sampling.weights import Weights
from gspn_jax.training.loop import Interrupted
from gspn_jax.training.train import train

AFTER_TRAINING = 75.0
"""Seconds kept for samples and their judge; in a rehearsal there is no hurry."""
SHORTEST = 20.0
"""Seconds that training gets at the least: until it listens to signals and has compiled a step."""
EPOCHS_OF_JUDGE = 5
SHOWN_OF_CLASS = 8
CURVE_POINTS = 200


@contextlib.contextmanager
def unpacked(images: pathlib.Path | None) -> Iterator[pathlib.Path]:
    """The folder that holds train/ and test/: `images`, or where its archive is unpacked to; None makes some up."""
    with contextlib.ExitStack() as opened:
        root = pathlib.Path(opened.enter_context(tempfile.TemporaryDirectory()))
        if images is None:
            images = root
            for part in ("train", "test"):
                make_images(root / part, 32, 40)
        elif images.is_file():
            with tarfile.open(images) as tar:
                tar.extractall(root, filter="data")
            images = next((path.parent for path in sorted(root.rglob("train")) if path.is_dir()), root)
        for part in ("train", "test"):
            if not (images / part).is_dir():
                raise ConfigError(f"--images must hold the folders train and test, found no {part} in {images}")
        yield images


def make_config(folder: pathlib.Path, run_dir: str, classes: int, rehearse: bool) -> Config:
    small = {"hidden": 64, "depth": 2, "proxy_ratio": 8} if rehearse else {}
    compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return Config(
        run_dir=run_dir,
        model=ModelConfig(preset="GSPN-S/2", drop_path=0.0, **small),
        data=DataConfig(
            source="folder", path=str(folder), image_size=32, channels=3, num_classes=classes, flip=True, in_memory=True
        ),
        diffusion=DiffusionConfig(objective="flow"),
        sampler=SamplerConfig(name="heun", steps=2 if rehearse else 20, guidance_scale=1.5),
        optimizer=OptimizerConfig(learning_rate=6e-4, final_learning_rate=6e-4, warmup_steps=2 if rehearse else 200),
        train=TrainConfig(
            steps=4 if rehearse else 1_000_000,
            batch_size=8 if rehearse else 256,
            log_every=1 if rehearse else 50,
            save_every=1_000_000,
            ema_decays=(0.999,),
            precision=f"params=float32,compute={compute}",
        ),
    )


def train_until(config: Config, deadline: float) -> str:
    """Trains until `deadline` on the clock of time.monotonic, or to the last step; says which."""
    timer = threading.Timer(max(SHORTEST, deadline - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        train(config)
        return "reached its last step"
    except Interrupted as stopped:
        return str(stopped)
    finally:
        timer.cancel()


def curve(run_dir: str) -> list[dict[str, float]]:
    """Lines of metrics.jsonl, thinned out."""
    lines = [json.loads(line) for line in pathlib.Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return lines[-1 :: -max(1, len(lines) // CURVE_POINTS)][::-1]  # the last one is always among them


def summary(config: Config, lines: list[dict[str, float]]) -> dict[str, float | int]:
    """Of the run as a whole; rates are medians over what was logged, the start left out."""
    steps = lines[-1]["step"]
    found = {
        "parameters": models.count_parameters(config),
        "steps": steps,
        "images_seen": steps * config.train.batch_size,
        "last_loss": lines[-1]["loss"],
    }
    for name in ("images_per_second", "mfu", "data_wait"):
        values = [line[name] for line in lines if name in line]
        if values:
            found[name] = float(np.median(values[1:] or values))
    return found


def draw(config: Config, count: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of the newest checkpoint's average, of every class in turn, and the classes."""
    step, _ = checkpoints.read_config(config.run_dir)
    labels, images = np.arange(count) % config.data.num_classes, []
    weights = Weights(config.run_dir, step, config, sharding.make_mesh(config.mesh))
    with Drawing(weights, config.sampler, total=count, batch_size=batch_size) as drawing:
        for start in range(0, count, batch_size):
            rows = np.arange(start, min(start + batch_size, count))
            images.append(drawing(labels[rows], rows))
            drawing.done(int(rows[-1]) + 1)
    return np.concatenate(images), labels


def run(arguments: argparse.Namespace, record: Record, images: pathlib.Path, run_dir: str, start: float) -> None:
    classes = sum(path.is_dir() for path in (images / "train").iterdir())
    config = make_config(images / "train", run_dir, classes, arguments.rehearse)
    record |= {
        "model": config.model.preset,
        "batch_size": config.train.batch_size,
        "learning_rate": config.optimizer.learning_rate,
    }
    after = 0 if arguments.rehearse else AFTER_TRAINING
    record["ended"] = train_until(config, start + arguments.seconds - after)
    record["curve"] = curve(run_dir)
    record |= summary(config, record["curve"]) | {"train_seconds": time.monotonic() - start}
    record.write()

    count = min(arguments.samples, len(list((images / "test").glob("*/*"))))
    samples, wanted = draw(config, count, min(500, count))
    columns = min(SHOWN_OF_CLASS, count // classes)
    shown = np.concatenate([np.flatnonzero(wanted == k)[:columns] for k in range(classes)])
    train_set = data.make_source(config.data)
    picture = grid(samples[shown], list(train_set.class_names), columns=columns)
    if arguments.grid:
        picture.save(arguments.grid)
    record["sampled_after_seconds"] = time.monotonic() - start
    record.write()

    test = MemorySource(
        data.make_source(dataclasses.replace(config.data, path=str(images / "test"), in_memory=False)), config.data
    )
    steps = 3 if arguments.rehearse else EPOCHS_OF_JUDGE * len(train_set) // 256
    judge = ClassifierJudge(train_set.images, train_set.labels, steps=steps, flip=True)
    record["judge"] = dataclasses.asdict(judge.score(samples, wanted, test.images, test.labels))
    record["seconds"] = time.monotonic() - start
    record.write()


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=pathlib.Path, help="CIFAR-10 as images, or its archive; needed unless --rehearse"
    )
    parser.add_argument("--seconds", type=float, default=120, help="for all of it")
    parser.add_argument("--samples", type=int, default=2000, help="that are judged")
    parser.add_argument("--rehearse", action="store_true", help="a tiny network and a few steps")
    parser.add_argument("--run-dir", help="kept there; a temporary folder by default")
    parser.add_argument("--grid", type=pathlib.Path, help="a picture of samples, a row a class")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    if not (arguments.images or arguments.rehearse):
        parser.error("--images must name CIFAR-10 as images")
    cli.setup()
    with cli.user_errors(data.DataError), tempfile.TemporaryDirectory() as folder:
        record = Record(arguments.out)
        with unpacked(arguments.images) as images:
            run(arguments, record, images, arguments.run_dir or os.path.join(folder, "run"), start)
    print(json.dumps({name: value for name, value in record.items() if name != "curve"}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
