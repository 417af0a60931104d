"""Small configs and random parameters for the tests of the denoisers."""

import jax
import numpy as np

from gspn_jax import models
from gspn_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

FLOAT32 = "params=float32,compute=float32"
BFLOAT16 = "params=float32,compute=bfloat16"

PAPER = ModelConfig(preset="GSPN-S/2", hidden=16, depth=4, proxy_ratio=4)
DIT = ModelConfig(preset="DiT-S/2", hidden=16, depth=2, heads=2)
MODERN = ModelConfig(
    preset="DiT-S/2", hidden=16, depth=2, heads=2, mlp="swiglu", norm="rms", qk_norm=True, rope=True, bottleneck=5
)
DIT_GSPN = ModelConfig(preset="DiT-S/2", hidden=16, depth=2, mixer="gspn", proxy_ratio=4)


def make_config(
    model: ModelConfig,
    *,
    precision: str = FLOAT32,
    channels: int = 3,
    num_classes: int = 5,
    image_size: int = 8,
    objective: str = "ddpm",
) -> Config:
    return Config(
        run_dir="unused",
        model=model,
        train=TrainConfig(precision=precision),
        data=DataConfig(image_size=image_size, channels=channels, num_classes=num_classes),
        diffusion=DiffusionConfig(objective=objective),
    )


def random_params(config: Config, seed: int = 0) -> dict:
    """Parameters of which none is zero: kernels scaled by their inputs, everything else around 0.3."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stacked = name.startswith("trunk")
        shape = leaf.shape[1:] if stacked else leaf.shape
        inputs = int(np.prod(shape[:2])) if "conv" in name else shape[0]
        scale = inputs**-0.5 if name.endswith("kernel") else 0.3
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, models.abstract(config)[1])


def random_inputs(batch: int, height: int, width: int, channels: int = 3, num_classes: int = 5, seed: int = 1):
    """An image, times in 0..1000 and classes, of which the last is "no class"."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, height, width, channels)).astype(np.float32)
    t = rng.uniform(0, 1000, batch).astype(np.float32)
    y = np.concatenate([rng.integers(0, num_classes, batch - 1), [num_classes]]).astype(np.int32)
    return x, t, y


def run(config: Config, params: dict, *inputs, **kwargs) -> np.ndarray:
    """The output of the denoiser, jitted."""
    graphdef, _ = models.abstract(config)
    return np.asarray(jax.jit(lambda *args: models.apply(graphdef, *args, **kwargs))(params, *inputs))


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest error over the largest magnitude of the truth."""
    return float(np.abs(np.asarray(found, np.float64) - truth).max() / np.abs(truth).max())
