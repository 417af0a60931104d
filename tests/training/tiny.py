"""A run small enough to compile and train in seconds."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from gspn_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainConfig,
)


def config(run_dir="unused", *, gspn=False, mesh=None, **train) -> Config:
    """Digits under flow matching; a GSPN of the paper layout, or a DiT."""
    if gspn:
        model = ModelConfig(preset="GSPN-S/2", hidden=32, depth=2, drop_path=0.1)
    else:
        model = ModelConfig(preset="DiT-S/2", hidden=32, depth=2, heads=4, drop_path=0.1)
    settings = {
        "steps": 20,
        "batch_size": 16,
        "precision": "params=float32,compute=float32",
        "log_every": 5,
        "ema_decays": (0.9, 0.99),
        "save_every": 10,
    } | train
    built = Config(
        run_dir=str(run_dir),
        model=model,
        data=DataConfig(),
        diffusion=DiffusionConfig(objective="flow"),
        sampler=SamplerConfig(steps=3),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        train=TrainConfig(**settings),
    )
    return dataclasses.replace(built, mesh=mesh) if mesh else built


def batches(config: Config, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Random images with random labels."""
    rng = np.random.default_rng(1)
    shape = (config.train.batch_size, config.data.image_size, config.data.image_size, config.data.channels)
    for _ in range(count):
        yield {"image": rng.integers(0, 256, shape, np.uint8), "label": rng.integers(0, 10, shape[0], np.int32)}
