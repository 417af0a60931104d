"""EMA widths, guidance scales and autoguidance on digits: two runs, and grids of their samples, by the commands.

python benchmarks/digits_grid.py DIR      trains in DIR and scores; killed, the same command goes on
Prints the grids that docs/recipes.md has: a GSPN of width 64 and depth 4 after 400 steps, guided by itself and by one
of width 32 and depth 2 after 200, 500 samples a cell.
"""

import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gspn_jax import cli  # noqa: E402 - after the path

LARGE = ("--model.hidden", "64", "--model.depth", "4", "--train.steps", "400")
SMALL = ("--model.hidden", "32", "--model.depth", "2", "--train.steps", "200")
TRAINED = ("--optimizer.learning-rate", "5e-3", "--train.save-every", "100", "--train.sample-every", "0")
SNAPSHOTS = ("--train.snapshot-every", "20")
DRAWN = ("--num-samples", "500", "--batch-size", "500", "--labels", "balanced", "--sampler.steps", "6")
SCORED = ("--metrics", "digits-fd", "--networks", "digits=1")
WIDTHS, DECAYS = ("0.05", "0.1", "0.15", "0.2"), ("0.9", "0.99")
SCALES = ("1", "1.25", "1.5", "2")


class Digits:
    """A feature network for `gspn_jax.evaluate`: the hidden layer of the demo's judge, trained on the real digits."""

    def __init__(self, judge):
        self._judge = judge

    def require(self, path, flag):
        return path

    def read(self, path):
        return {"weights": self._judge.weights, "biases": self._judge.biases}

    def digest(self, state_dict):
        import hashlib

        return hashlib.sha256(b"".join(value.tobytes() for value in state_dict.values())).hexdigest()

    def from_state_dict(self, state_dict):
        return {name: value.astype(np.float32) for name, value in state_dict.items()}

    def resize(self, images):
        return images[..., 0].reshape(len(images), -1) / 255.0

    def network(self, params, images):
        import jax

        return {"hidden": jax.nn.relu(images @ params["weights"] + params["biases"])}


class Hidden:
    """Moments of its features."""

    def __init__(self):
        from gspn_jax.metrics.moments import Moments

        self._moments = Moments()
        self.gaussian = self._moments.gaussian

    def add(self, features, mask):
        self._moments.add(features["hidden"], mask)


def register(folder: pathlib.Path) -> None:
    """The metric "digits-fd" and its network, and DIR/digits.npz, the real digits."""
    from gspn_jax import data
    from gspn_jax.config import DataConfig
    from gspn_jax.metrics.digits import DigitsJudge
    from gspn_jax.metrics.scores import Metric
    from gspn_jax.tables import FEATURE_NETWORKS, METRICS

    source = data.make_source(DataConfig())
    records = [source[i] for i in range(len(source))]
    images = np.stack([record["image"] for record in records])
    FEATURE_NETWORKS["digits"] = Digits(DigitsJudge(images, np.array([record["label"] for record in records])))
    METRICS["digits-fd"] = Metric(
        label="Frechet distance",
        keeps="hidden layer of the digits' judge",
        keep=Hidden,
        score=lambda kept, reference, _: (
            reference.kept["hidden layer of the digits' judge"].gaussian().distance(kept.gaussian())
        ),
        needs="images",
        network="digits",
    )
    if not (folder / "digits.npz").exists():
        np.savez(folder / "digits.npz", arr_0=np.repeat(images, 3, axis=-1))


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    cli.setup()
    from gspn_jax import evaluate, train

    main_run, small_run = str(folder / "main"), str(folder / "small")
    decays = ("--train.ema-decays", *DECAYS)
    train.main(["--config", "digits", "--run-dir", main_run, *LARGE, *TRAINED, *decays, *SNAPSHOTS])
    train.main(["--config", "digits", "--run-dir", small_run, *SMALL, *TRAINED, "--train.ema-decays", "0.9"])
    register(folder)
    scored = [*DRAWN, *SCORED, "--reference", str(folder / "digits.npz")]
    averages = ["--ema-decays", *DECAYS, "--ema-widths", *WIDTHS]
    evaluate.main(["--run", main_run, *scored, *averages, "--guidance-scales", *SCALES])
    guided = ["--ema-widths", "0.1", "--guidance-scales", *SCALES[1:], "--sampler.guide", small_run]
    evaluate.main(["--run", main_run, *scored, *guided])


if __name__ == "__main__":
    main()
