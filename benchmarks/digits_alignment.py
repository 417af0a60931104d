"""Alignment with features of a frozen network (docs/recipes.md) on scikit-learn's digits, beside flow matching alone.

python benchmarks/digits_alignment.py --seeds 0 1      in --output (runs/alignment); killed, the same command goes on

A DiT of width 64 and depth 4, 800 steps of 64 images, as in the table of docs/recipes.md: alone; aligned with a small
convolutional classifier that is trained here on these digits and their labels; and with a DINOv2 of random weights,
whose features are a fixed function of the pixels that nothing was learned for. A line of JSON for each: conditional
accuracy and Frechet distance of 1,000 samples a set (`metrics.digits.DigitsJudge`, another network than both).
"""

import argparse
import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits_recipes import real, report
from jaxtyping import Array, Float, Float32, UInt8

from gspn_jax import cli, prepare
from gspn_jax.config import AlignConfig, Config, DataConfig, ModelConfig, SamplerConfig
from gspn_jax.tables import FEATURE_NETWORKS

GRID, BLOCK = 4, 2
"""Side of the square of tokens of 8x8 pixels in patches of 2, and the block after which they are compared."""


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Two convolutions with a ReLU and a linear of their mean; its tokens are the 4x4 places of the second.

    A feature network for `prepare features`, known to this script alone.
    """

    width: int = 64

    def tokens(self, side: int) -> "Classifier":
        assert side == GRID
        return self

    def require(self, path: str | None, flag: str) -> str | None:
        return path

    def read(self, path: str) -> dict[str, np.ndarray]:
        with np.load(path) as file:
            return dict(file)

    def digest(self, state_dict: dict[str, np.ndarray]) -> str:
        return hashlib.sha256(b"".join(state_dict[name].tobytes() for name in sorted(state_dict))).hexdigest()

    def from_state_dict(self, state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return state_dict

    def resize(self, images: UInt8[Array, "N 8 8 3"]) -> Float32[Array, "N 8 8 1"]:
        return images[..., :1].astype(jnp.float32) / 127.5 - 1

    def network(self, params: dict[str, Any], images: Float32[Array, "N 8 8 1"]) -> Float[Array, "N 4 4 D"]:
        x = images
        for name, stride in (("first", 1), ("second", 2)):
            x = jax.lax.conv_general_dilated(
                x, params[name], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + params[f"{name}_bias"])
        return x

    def trained(self, seed: int, steps: int = 600) -> dict[str, np.ndarray]:
        """Parameters for the digits and their labels, by Adam."""
        images, labels = real()
        x, y = self.resize(jnp.repeat(jnp.asarray(images), 3, axis=-1)), jnp.asarray(labels)
        keys, width = jax.random.split(jax.random.key(seed), 3), self.width
        shapes = {"first": (3, 3, 1, width), "second": (3, 3, width, width), "linear": (width, 10)}
        params = {
            name: jax.random.normal(key, shape) * (2 / np.prod(shape[:-1])) ** 0.5
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        params |= {"first_bias": jnp.zeros(width), "second_bias": jnp.zeros(width)}
        optimizer, rng = optax.adam(2e-3), np.random.default_rng(seed)

        def loss(params, rows):
            logits = self.network(params, x[rows]).mean((1, 2)) @ params["linear"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        @jax.jit
        def step(params, state, rows):
            value, gradient = jax.value_and_grad(loss)(params, rows)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(params, updates), state, value

        state, value = optimizer.init(params), jnp.inf
        for _ in range(steps):
            params, state, value = step(params, state, rng.integers(len(x), size=128))
        print(f"the classifier's loss: {float(value):.4f}")
        return {name: np.asarray(leaf) for name, leaf in params.items()}


def random_dinov2(seed: int) -> dict[str, np.ndarray]:
    """Tensors of a DINOv2 of four layers: normal, with the spread that keeps the size of tokens."""
    from gspn_jax.text.dinov2 import Dinov2Config, expected_shapes

    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_shapes(Dinov2Config(width=192, layers=4, heads=3, hidden=768, grid=GRID)).items():
        if name.endswith(("norm1.weight", "norm2.weight", "layernorm.weight", "lambda1")):
            value = np.ones(shape)
        elif name.endswith("bias"):
            value = np.zeros(shape)
        else:
            value = rng.standard_normal(shape) / (1 if len(shape) < 2 or "embeddings." in name else shape[-1] ** 0.5)
        tensors[name] = value.astype(np.float32)
    tensors["embeddings.patch_embeddings.projection.weight"] /= (3 * 14 * 14) ** 0.5
    return tensors


def prepared(root: pathlib.Path, seed: int) -> dict[str, pathlib.Path]:
    """The folders of features by the names of their networks, made by the command."""
    from safetensors.numpy import save_file

    root.mkdir(parents=True, exist_ok=True)
    FEATURE_NETWORKS["digits"] = Classifier()
    weights = {"digits": root / "classifier.npz", "dinov2": root / "dinov2.safetensors"}
    if not weights["digits"].exists():
        np.savez(weights["digits"], **Classifier().trained(seed))
    if not weights["dinov2"].exists():
        save_file(random_dinov2(seed), weights["dinov2"])
    found = {}
    for name, path in weights.items():
        found[name] = root / f"features_{name}"
        words = ["features", "--digits", "--image-size", "8", "--tokens", str(GRID), "--network", name]
        prepare.main([*words, "--no-flips", "--weights", str(path), "--output", str(found[name])])
    return found


def trained(run: pathlib.Path, seed: int, steps: int, features: pathlib.Path | None) -> Config:
    """The config of a finished run."""
    from gspn_jax.training.train import train

    base = cli.load_config("digits")
    train_settings = {"steps": steps, "seed": seed, "sample_every": 0, "save_every": steps, "log_every": 20}
    config = dataclasses.replace(
        base,
        run_dir=str(run),
        data=DataConfig(in_memory=True),
        model=ModelConfig(preset="DiT-S/2", hidden=64, depth=4, heads=4, drop_path=0.0),
        sampler=SamplerConfig(steps=10),
        train=dataclasses.replace(base.train, **train_settings),
        align=AlignConfig(features=features and str(features), depth=BLOCK, hidden=256),
    )
    train(config)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--sets", type=int, default=1, help="of samples")
    parser.add_argument("--output", default="runs/alignment")
    flags = parser.parse_args()
    cli.setup()
    for seed in flags.seeds:
        root = pathlib.Path(flags.output) / str(seed)
        features = prepared(root, seed)
        for what, folder in (
            ("flow", None),
            ("flow, aligned with a classifier", features["digits"]),
            ("flow, aligned with a random DINOv2", features["dinov2"]),
        ):
            config = trained(root / what.replace(" ", "_").replace(",", ""), seed, flags.steps, folder)
            report(argparse.Namespace(seed=seed, sets=flags.sets), what, config)


if __name__ == "__main__":
    main()
