"""This project's sides of `peers.py`; `peers_torch.py` has functions of the same names."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import itertools
from collections.abc import Callable

import jax
import numpy as np

from gspn_jax import models
from gspn_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, SamplerConfig, TrainConfig
from gspn_jax.data import make_loader, make_source
from gspn_jax.metrics.frechet import Gaussian
from gspn_jax.metrics.frechet import moments as mean_and_covariance
from gspn_jax.metrics.moments import Moments
from gspn_jax.metrics.neighbours import precision_recall as improved_precision_recall
from gspn_jax.parallel import sharding
from gspn_jax.sampling.sampler import Sampler
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import create_state
from gspn_jax.training.step import make_step

SIZE, CHANNELS, CLASSES = 32, 4, 1000


def _config(model: ModelConfig, batch_size: int, steps: int = 4) -> Config:
    return Config(
        run_dir="unused",
        model=model,
        diffusion=DiffusionConfig(objective="flow"),
        data=DataConfig(image_size=SIZE, channels=CHANNELS, num_classes=CLASSES),
        sampler=SamplerConfig(name="euler", steps=steps),
        train=TrainConfig(batch_size=batch_size, ema_decays=(0.9999,), precision="params=float32,compute=float32"),
    )


def _trainer(model: ModelConfig, batch_size: int) -> Callable[[], None]:
    config = _config(model, batch_size)
    mesh = sharding.make_mesh(config.mesh)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.standard_normal((batch_size, SIZE, SIZE, CHANNELS)).astype(np.float32),
        "label": rng.integers(0, CLASSES, batch_size).astype(np.int32),
    }
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    task = DiffusionTask(config)
    state, step = create_state(task, mesh), make_step(task, mesh)

    def call() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        float(metrics["loss"])

    return call


def train_dit(hidden: int, depth: int, heads: int, batch_size: int) -> Callable[[], None]:
    model = ModelConfig(preset="DiT-S/2", hidden=hidden, depth=depth, heads=heads, learn_sigma=False, drop_path=0.0)
    return _trainer(model, batch_size)


def train_gspn(hidden: int, depth: int, batch_size: int) -> Callable[[], None]:
    return _trainer(
        ModelConfig(preset="GSPN-S/2", hidden=hidden, depth=depth, learn_sigma=False, drop_path=0.0), batch_size
    )


def sample_dit(hidden: int, depth: int, heads: int, batch_size: int, steps: int) -> Callable[[], np.ndarray]:
    config = _config(
        ModelConfig(preset="DiT-S/2", hidden=hidden, depth=depth, heads=heads, learn_sigma=False), batch_size, steps
    )
    mesh = sharding.make_mesh(config.mesh)
    sampler, params = Sampler(config, mesh), models.init(config, jax.random.key(0))
    return lambda: sampler(params, np.arange(batch_size), np.arange(batch_size))


def fid_moments(rows: int, size: int, batch_size: int) -> Callable[[], Gaussian]:
    """Batch by batch, as the features come."""
    features = _features(rows, size, 0)
    batches = [jax.device_put(features[start : start + batch_size]) for start in range(0, rows, batch_size)]

    def call() -> Gaussian:
        moments = Moments()
        for batch in batches:
            moments.add(batch)
        return moments.gaussian()

    return call


def fid_distance(rows: int, size: int) -> Callable[[], float]:
    """Of two Gaussians, nothing of which is kept from call to call."""
    one, other = (mean_and_covariance(_features(rows, size, seed)) for seed in (0, 1))
    return lambda: Gaussian(*one).distance(Gaussian(*other))


def precision_recall(rows: int, size: int) -> Callable[[], tuple[float, float]]:
    """In the float16 of the ADM evaluator."""
    samples, reference = (_features(rows, size, seed) for seed in (0, 1))
    return lambda: improved_precision_recall(reference, samples, float16=True)


def _features(rows: int, size: int, seed: int) -> np.ndarray:
    """As large as Inception's."""
    return (0.5 * np.abs(np.random.default_rng(seed).standard_normal((rows, size)))).astype(np.float32)


def image_folder(size: int, batch_size: int, batches: int, workers: int, folder: str) -> Callable[[], None]:
    return _reader(
        DataConfig(
            source="folder", path=folder, image_size=size, channels=3, num_classes=4, flip=True, workers=workers
        ),
        batch_size,
        batches,
    )


def latents(batch_size: int, batches: int, folder: str) -> Callable[[], None]:
    return _reader(
        DataConfig(
            source="latents", path=f"{folder}/ours", image_size=SIZE, channels=CHANNELS, num_classes=CLASSES, flip=True
        ),
        batch_size,
        batches,
    )


def _reader(config: DataConfig, batch_size: int, batches: int) -> Callable[[], None]:
    loader = make_loader(config, make_source(config), batch_size=batch_size, seed=0)

    def call() -> None:
        for batch in itertools.islice(loader, batches):
            assert len(batch["label"]) == batch_size

    return call
