"""Memory of a training step on a GPU: the state, exact, and a formula for the rest, fitted to the compiler's counts.

    rest = GRADIENTS * parameters + images * tokens * width * bytes * (blocks * per_block + once)

for the parameters, images and widths of one device, with per_block and once by mixer and remat. The numbers are those
that `benchmarks/memory_gpu.py fit` makes of programs that XLA:GPU compiled for an H200 and an RTX 4090; none was run.
GSPN-B/2 with 64 images takes 1.9 ("names") and 3.5 % ("full") more on the latter, where the directions of the two
blocks that scan every line do not meet on chip. Both take bfloat16, and the RTX 4090 JAX 0.11.2 or newer, for kernels
at all.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from gspn_jax import models
from gspn_jax.config import Config, ConfigError
from gspn_jax.models.width import widths
from gspn_jax.parallel import sharding
from gspn_jax.parallel.memory import bytes_a_device
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import TrainState, abstract_state


class Fit(NamedTuple):
    """Numbers of the formula; `error` is its largest from the `programs` that it is fitted to, relative to state and
    rest together."""

    gradients: float
    per_block: float
    once: float
    error: float
    programs: int


FITTED: dict[tuple[str, str], Fit] = {
    ("attention", "dots"): Fit(0.524, 10.2, 12, 0.00323, 3),
    ("gspn", "full"): Fit(0.524, 1.24, 28, 0.0173, 5),
    ("gspn", "names"): Fit(0.524, 6.42, 37.3, 0.0096, 7),
}
"""By mixer and remat."""


class Need(NamedTuple):
    """Bytes of one device."""

    state: float
    rest: float

    @property
    def total(self) -> float:
        return self.state + self.rest


def remats(config: Config) -> list[str]:
    """The values of model.remat that the formula knows for a config's mixer, that which recomputes least first.

    Raises ConfigError for a mixer that it does not know.
    """
    mixer = models.resolve(config.model).mixer
    found = [remat for known, remat in FITTED if known == mixer]
    if not found:
        known = ", ".join(dict.fromkeys(known for known, _ in FITTED))
        raise ConfigError(f"model.mixer must be one whose memory was counted ({known}), found {mixer!r}")
    return found


def state_on(config: Config, data: int, fsdp: int) -> TrainState:
    """The state's shapes, split over a mesh that need not be there."""
    return abstract_state(DiffusionTask(config), AbstractMesh((data, fsdp, 1), sharding.AXES))


def needed(config: Config, state: TrainState, remat: str, images: int, accumulate: int) -> Need:
    """Memory of a step with `images` of a micro-batch on each device."""
    arch = models.resolve(config.model)
    fit = FITTED[arch.mixer, remat]
    tokens = (config.data.image_size // arch.patch) ** 2
    values = images * tokens * widths(arch)["hidden"] * (arch.blocks * fit.per_block + fit.once)
    gradients = bytes_a_device(state.params)
    rest = fit.gradients * gradients + values * jnp.dtype(config.train.compute).itemsize
    return Need(bytes_a_device(state), rest + (gradients if accumulate > 1 else 0))
