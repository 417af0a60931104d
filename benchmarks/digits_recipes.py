"""Numbers of docs/recipes.md, on scikit-learn's digits: other classes by --init-from, and a GSPN from a DiT.

python benchmarks/digits_recipes.py classes --seed 0     0-4, then 5-9 from it and from scratch: conditional accuracy
python benchmarks/digits_recipes.py teacher --seed 0     a DiT, then GSPNs from it: Frechet distance

With --all also what these are told apart from: shorter runs from scratch, students without positions, without features,
or by Muon.

Runs lie in --output (runs/recipes by default) and are gone on with. A line of JSON for each run that is scored: what it
is, steps, images, conditional accuracy and Frechet distance (`metrics.digits.DigitsJudge`), the mean of `--sets` sets
of 100 samples a class with the standard deviation.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics

import numpy as np
from PIL import Image

from gspn_jax import cli
from gspn_jax.config import Config, DataConfig, DistillConfig

PER_CLASS = 100
"""Samples that are scored."""
SIZE = {"hidden": 64, "depth": 4}
EMA = 0.95
QUARTER, FIFTH = 4, 5
LEARNING_RATE = 5e-3
"""Learning rate of all runs: of the whole length and of a part of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=("classes", "teacher"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="of training from scratch")
    parser.add_argument("--base", type=int, default=1600, help="steps of the model that others begin with (classes)")
    parser.add_argument("--time-mean", type=float, default=0.0, help="diffusion.time_mean of all runs")
    parser.add_argument("--sets", type=int, default=1, help="of samples")
    parser.add_argument("--all", action="store_true", help="also what the recipe is told apart from")
    parser.add_argument("--output", default="runs/recipes")
    flags = parser.parse_args()
    cli.setup()
    {"classes": classes, "teacher": teacher}[flags.recipe](flags)


def classes(flags: argparse.Namespace) -> None:
    """Classes 0 to 4; then 5 to 9 from that model in a quarter of the steps that a model of their own has."""
    root = pathlib.Path(flags.output) / f"classes_{flags.seed}"
    low, high = (digits_of(root / name, names) for name, names in (("low", range(5)), ("high", range(5, 10))))
    base = trained(flags, root / "of_0_to_4", low, flags.base)
    short = flags.steps // QUARTER
    report(flags, "from 0-4", trained(flags, root / "from_0_to_4", high, short, init_from=base.run_dir), first=5)
    report(flags, "scratch", trained(flags, root / "scratch", high, flags.steps), first=5)
    if flags.all:
        report(flags, "scratch, a quarter", trained(flags, root / "scratch_short", high, short), first=5)


def teacher(flags: argparse.Namespace) -> None:
    """A DiT; then a GSPN from it in a fifth of its steps, and one from scratch in as many."""
    root, data = pathlib.Path(flags.output) / f"teacher_{flags.seed}", DataConfig(in_memory=True)
    dit = {"preset": "DiT-S/2", "heads": 4}
    gspn = {"preset": "DiT-S/2", "mixer": "gspn"}
    placed = gspn | {"positions": True}
    short = flags.steps // FIFTH
    theirs = trained(flags, root / "dit", data, flags.steps, model=dit)
    report(flags, "DiT", theirs)
    both = DistillConfig(teacher=theirs.run_dir, features=tuple(range(theirs.model.depth or 0)))
    learned = {"data": data, "steps": short, "distill": both}
    report(flags, "GSPN from a DiT", trained(flags, root / "gspn", model=placed, **learned))
    if not flags.all:
        return
    report(flags, "GSPN from a DiT, Muon", trained(flags, root / "muon", model=placed, optimizer="muon", **learned))
    report(flags, "GSPN from a DiT, without its positions", trained(flags, root / "unplaced", model=gspn, **learned))
    learned["distill"] = DistillConfig(teacher=theirs.run_dir)
    report(flags, "GSPN from a DiT, predictions alone", trained(flags, root / "alone", model=placed, **learned))
    begun = trained(flags, root / "begun", data, short, model=placed, init_from=theirs.run_dir)
    scratch = trained(flags, root / "scratch", data, short, model=placed)
    for what, config in (("GSPN with its other weights", begun), ("GSPN from scratch", scratch)):
        report(flags, what, config)


def digits_of(folder: pathlib.Path, names: range) -> DataConfig:
    """The digits of these classes as a folder of PNG."""
    if not folder.exists():
        images, labels = real()
        for i in np.flatnonzero(np.isin(labels, names)):
            path = folder / str(labels[i]) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i, ..., 0]).save(path)
    return DataConfig(
        source="folder", path=str(folder), image_size=8, channels=1, num_classes=len(names), in_memory=True
    )


def trained(
    flags: argparse.Namespace, run: pathlib.Path, data: DataConfig, steps: int, *, optimizer: str = "adamw", **changes
) -> Config:
    """The config of a finished run: that of configs/digits.py, but smaller and for what is given."""
    from gspn_jax.training.train import train

    base = cli.load_config("digits")
    model = dataclasses.replace(base.model, **SIZE | changes.pop("model", {}))
    config = dataclasses.replace(
        base,
        run_dir=str(run),
        data=data,
        model=model,
        diffusion=dataclasses.replace(base.diffusion, time_mean=flags.time_mean),
        optimizer=dataclasses.replace(
            base.optimizer, name=optimizer, learning_rate=LEARNING_RATE, warmup_steps=min(50, steps // 10)
        ),
        train=dataclasses.replace(
            base.train, steps=steps, seed=flags.seed, ema_decays=(EMA,), sample_every=0, save_every=steps, log_every=20
        ),
        **changes,
    )
    train(config)
    return config


@functools.cache
def real() -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of all digits."""
    from gspn_jax.data import make_source

    source = make_source(DataConfig())
    records = [source[i] for i in range(len(source))]
    return np.stack([r["image"] for r in records]), np.array([r["label"] for r in records])


@functools.cache
def judge():
    from gspn_jax.metrics.digits import DigitsJudge

    return DigitsJudge(*real())


def report(flags: argparse.Namespace, what: str, config: Config, *, first: int = 0) -> None:
    """Prints the scores of each average; class 0 of the run is the digit `first`."""
    from gspn_jax.parallel import sharding
    from gspn_jax.runs import checkpoints
    from gspn_jax.sampling.sampler import Sampler

    mesh, count = sharding.make_mesh(config.mesh), config.data.num_classes
    classes = range(first, first + count)
    labels = np.tile(np.arange(count), PER_CLASS)
    params = checkpoints.restore_params(config.run_dir, config.train.steps, config, mesh)
    samples = [Sampler(config, mesh, seed=seed)(params, labels, np.arange(len(labels))) for seed in range(flags.sets)]
    scores = [judge().score(images, labels + first, classes=classes) for images in samples]
    accuracy, frechet = ([getattr(s, name) for s in scores] for name in ("conditional_accuracy", "frechet"))
    line = {
        "what": what,
        "seed": flags.seed,
        "steps": config.train.steps,
        "images": config.train.steps * config.train.batch_size,
        "accuracy": round(statistics.mean(accuracy), 4),
        "frechet": round(statistics.mean(frechet), 4),
        "deviation": round(statistics.pstdev(frechet), 4),
        "floor": round(scores[0].frechet_floor, 4),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
