"""Training in bfloat16 against float32: the same run twice, loss by loss, on CIFAR-10 or any image folder.

python benchmarks/precision_curves.py --images CIFAR/train [--steps 300 --output benchmarks/results]

Both runs see the same batches, noise and initial weights (they depend on the seed and the step only), so the curves
differ by rounding alone. Writes precision_curves_DEVICE.json and .png.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import tempfile

import jax
import numpy as np

from gspn_jax import cli
from gspn_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimizerConfig, TrainConfig

WINDOW = 20
"""Steps that a point of the picture is the mean of."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="a folder with one folder of 32x32 images a class")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    cli.setup()
    from gspn_jax.training.train import train

    curves = {}
    for compute in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as run_dir:
            config = Config(
                run_dir,
                model=ModelConfig(preset="GSPN-S/4", hidden=96, depth=4),
                data=DataConfig(
                    source="folder", path=arguments.images, image_size=32, channels=3, num_classes=10, flip=True
                ),
                diffusion=DiffusionConfig(objective="flow"),
                optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=min(50, arguments.steps)),
                train=TrainConfig(
                    steps=arguments.steps,
                    batch_size=32,
                    log_every=1,
                    save_every=10**6,
                    precision=f"params=float32,compute={compute}",
                ),
            )
            train(config)
            lines = (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines()
            curves[compute] = [json.loads(line)["loss"] for line in lines]
    one, other = (np.array(curves[name]) for name in ("float32", "bfloat16"))
    tail = slice(-max(1, len(one) // 5), None)
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "config": {
            "model": dataclasses.asdict(config.model),
            "batch_size": config.train.batch_size,
            "steps": arguments.steps,
        },
        "first_loss": {name: curve[0] for name, curve in curves.items()},
        "mean_loss_of_the_last_fifth": {name: float(np.mean(curve[tail])) for name, curve in curves.items()},
        "ratio_of_the_last_fifth": float(np.mean(other[tail]) / np.mean(one[tail])),
        "largest_relative_difference": float(np.max(np.abs(other - one) / one)),
        "mean_relative_difference": float(np.mean(np.abs(other - one) / one)),
        "loss": curves,
    }
    path = arguments.output / f"precision_curves_{jax.default_backend()}.json"
    path.write_text(json.dumps(result) + "\n")
    _draw(curves, path.with_suffix(".png"))
    print(json.dumps({name: value for name, value in result.items() if name != "loss"}, indent=1))


def _draw(curves: dict[str, list[float]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, curve in curves.items():
        means = np.convolve(curve, np.ones(WINDOW) / WINDOW, "valid")
        axes.plot(np.arange(len(means)) + WINDOW, means, label=name, linestyle="-" if name == "float32" else "--")
    axes.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps")
    axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
