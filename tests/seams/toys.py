"""What one adds to the project, as one would write it outside of it: a mixer, an objective, a sampler, a source, and a
metric with a feature network."""

import dataclasses
import hashlib
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gspn_jax.config import Config, DataConfig, DiffusionConfig, MeshConfig, ModelConfig, SamplerConfig, TrainConfig
from gspn_jax.data.source import hash_of
from gspn_jax.data.sources import Kind
from gspn_jax.diffusion import flow, samplers
from gspn_jax.metrics.moments import on_host
from gspn_jax.metrics.scores import Metric
from gspn_jax.models.mixers import own_options
from gspn_jax.models.parameters import logical

FLOAT32, BFLOAT16 = (f"params=float32,compute={name}" for name in ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class RollOptions:
    """Every token gets those `shift` rows above and columns before it."""

    shift: int = 1

    needs_positions = False
    has_chunks = False
    remat_on_cpu = "none"
    aligned = False

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        return cls(**own_options(cls, model))

    def build(self, width, *, dtype, rngs) -> "Roll":
        return Roll(width, self, dtype=dtype, rngs=rngs)

    def flops(self, width: int, tokens: int) -> float:
        return 2.0 * tokens * 2 * width**2


class Roll(nnx.Module):
    """Two linears around the rolls, and a matrix `sharp` that stays float32 although it is large enough to be split."""

    def __init__(self, width: int, options: RollOptions, *, dtype, rngs: nnx.Rngs):
        self.shift, self.dtype = options.shift, dtype
        into, out = logical("embed", "channels"), logical("channels", "embed")
        self.into = nnx.Linear(width, width, dtype=dtype, rngs=rngs, kernel_metadata=into)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs, kernel_metadata=out)
        self.sharp = nnx.Param(jnp.eye(width), **logical(None, "channels", float32=True))

    def __call__(self, x, *, chunk=None):
        assert self.sharp[...].dtype == jnp.float32 and self.into.kernel[...].dtype == self.dtype
        y = self.into(x)
        y = y + jnp.roll(y, self.shift, 1) + jnp.roll(y, self.shift, 2)
        return self.out((y.astype(jnp.float32) * self.sharp[...].diagonal()).astype(y.dtype))


@dataclasses.dataclass(frozen=True)
class Clean:
    """x_0 itself on straight paths, and tokens after the first block that are not far from zero."""

    sampler = "small steps"
    learns_sigma = False
    discrete = False

    def fits(self, kind) -> bool:
        return kind.moves == "velocity"

    def loss(self, config, denoise, x0, condition, key):
        time_key, noise_key = jax.random.split(key)
        t = flow.sample_times(time_key, x0.shape[0], config.time_distribution)
        time, noise = t[:, None, None, None], jax.random.normal(noise_key, x0.shape)
        x_t = (1 - time) * x0 + time * noise
        output, tokens = denoise(x_t, flow.TIME_SCALE * t, condition, features=(0,))
        mse = jnp.square(output - x0).mean((1, 2, 3))
        size = jnp.square(tokens[0].astype(jnp.float32)).mean((1, 2, 3))
        return mse + 0.01 * size, {"mse": mse, "size": size}

    def prediction(self, output, x, row, clip):
        return (x - (jnp.clip(output, -1, 1) if clip else output)) / row.sigma

    def describe(self, config, learned_variance) -> str:
        return "the clean image"


def _bounded(x, prediction, previous, row):
    """Euler's step, kept in [-4, 4]."""
    return jnp.clip(x + row.on_prediction * prediction, -4.0, 4.0)


SMALL_STEPS = samplers.SamplerKind("velocity", lambda config, diffusion: samplers.euler(config.steps), move=_bounded)


class Stripes:
    """Forty images of 8x8, striped in one of two directions."""

    class_names = ("rows", "columns")
    fingerprint = hash_of(["stripes"])

    def __len__(self):
        return 40

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        stripes = np.tile(rng.integers(0, 256, (8, 1, 1), np.uint8), (1, 8, 1))
        return {"image": stripes if index % 2 == 0 else stripes.swapaxes(0, 1).copy(), "label": np.int32(index % 2)}


STRIPES = Kind(lambda config, size: Stripes(), lambda config: "the stripes")


class Brightness:
    """A feature network: the mean of each row of an image and of each column, scaled by its one weight."""

    def require(self, path, flag):
        return path

    def read(self, path):
        return {"scale": np.float32(path)}

    def digest(self, state_dict):
        return hashlib.sha256(state_dict["scale"].tobytes()).hexdigest()

    def from_state_dict(self, state_dict):
        return dict(state_dict)

    def resize(self, images):
        return images.astype(jnp.float32) / 255

    def network(self, params, images):
        return {"rows": params["scale"] * images.mean((2, 3)), "columns": params["scale"] * images.mean((1, 3))}


class Mean:
    """The mean of the rows' brightness."""

    def __init__(self):
        self._sum, self.count = 0.0, 0

    def add(self, features, mask):
        rows = on_host(features["rows"])[on_host(mask)]
        self._sum, self.count = self._sum + rows.mean(1).sum(), self.count + len(rows)

    @property
    def value(self):
        return self._sum / self.count


GLARE = Metric(
    label="glare",
    keeps="mean brightness",
    keep=Mean,
    score=lambda kept, reference, float16: float(kept.value - reference.kept["mean brightness"].value),
    needs="images",
    network="brightness",
)
"""How much brighter samples are than the images of the reference."""


def config(run_dir, mesh: MeshConfig, *, precision: str = FLOAT32, **model) -> Config:
    """A run of four steps on all of the toys but those of a `model` that is said otherwise."""
    model = {"hidden": 32, "depth": 2, "drop_path": 0.0, "mixer": "roll", "mixer_options": ("shift=2",)} | model
    return Config(
        run_dir=str(run_dir),
        model=ModelConfig(preset="DiT-S/2", **model),
        data=DataConfig(source="stripes", num_classes=2, in_memory=True),
        diffusion=DiffusionConfig(objective="clean"),
        sampler=SamplerConfig(steps=3, guidance_scale=1.5),
        mesh=mesh,
        train=TrainConfig(
            steps=4, batch_size=8, precision=precision, log_every=1, save_every=4, sample_every=4, ema_decays=(0.5,)
        ),
    )
