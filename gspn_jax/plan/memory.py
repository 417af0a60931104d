"""Memory of a training step on a GPU: the state, exact, and a formula for the rest, fitted to the compiler's counts.

    rest = GRADIENTS * parameters + images * tokens * width * bytes * (blocks * per_block + once)

for the parameters, images and widths of one device, with per_block and once by mixer, remat and, for line scans, by
where their proxies are expanded: on chip on a GPU of compute capability 9.0, else in memory. The numbers are those that
`benchmarks/memory_gpu.py fit` makes of programs that XLA:GPU compiled for an H200 and an RTX 4090; none was run.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from gspn_jax import models
from gspn_jax.config import Config, ConfigError
from gspn_jax.models.width import widths
from gspn_jax.parallel import sharding
from gspn_jax.parallel.memory import bytes_a_device
from gspn_jax.plan.gpus import expands_on_chip
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.state import TrainState, abstract_state


class Fit(NamedTuple):
    """Numbers of the formula; `error` is its largest from the `programs` that it is fitted to, relative to state and
    rest together, and says nothing of two programs or one: per_block and once are two numbers."""

    gradients: float
    per_block: float
    once: float
    error: float
    programs: int


Kind = tuple[str, str, str]
"""Mixer, remat, and where proxies are expanded: "chip" or "memory" ("chip" for mixers without any)."""

FITTED: dict[Kind, Fit] = {
    ("attention", "dots", "chip"): Fit(0.487, 10.4, 10.6, 0.00116, 3),
    ("gspn", "full", "chip"): Fit(0.487, 1.06, 52, 0.0, 2),
    ("gspn", "full", "memory"): Fit(0.487, 1.85, 30.8, 0.00233, 3),
    ("gspn", "names", "chip"): Fit(0.487, 6.63, 48.5, 0.00106, 4),
    ("gspn", "names", "memory"): Fit(0.487, 10.6, 58.5, 0.0074, 3),
}
"""By `kind_of`."""


class Need(NamedTuple):
    """Bytes of one device."""

    state: float
    rest: float

    @property
    def total(self) -> float:
        return self.state + self.rest


def kind_of(mixer: str, remat: str, gpu: str) -> Kind:
    """The row of FITTED for a GPU of `gpus.MEMORY`."""
    return mixer, remat, "memory" if mixer == "gspn" and not expands_on_chip(gpu) else "chip"


def remats(config: Config, gpu: str) -> list[str]:
    """The values of model.remat that the formula knows for a config's mixer, that which recomputes least first.

    Raises ConfigError for a mixer that it does not know.
    """
    mixer = models.resolve(config.model).mixer
    where = kind_of(mixer, "", gpu)[2]
    found = [remat for known, remat, place in FITTED if (known, place) == (mixer, where)]
    if not found:
        known = ", ".join(dict.fromkeys(known for known, *_ in FITTED))
        raise ConfigError(f"model.mixer must be one whose memory was counted ({known}), found {mixer!r}")
    return found


def state_on(config: Config, data: int, fsdp: int) -> TrainState:
    """The state's shapes, split over a mesh that need not be there."""
    return abstract_state(DiffusionTask(config), AbstractMesh((data, fsdp, 1), sharding.AXES))


def needed(config: Config, state: TrainState, remat: str, images: int, accumulate: int, gpu: str) -> Need:
    """Memory of a step with `images` of a micro-batch on each device."""
    arch = models.resolve(config.model)
    fit = FITTED[kind_of(arch.mixer, remat, gpu)]
    tokens = (config.data.image_size // arch.patch) ** 2
    values = images * tokens * widths(arch)["hidden"] * (arch.blocks * fit.per_block + fit.once)
    gradients = bytes_a_device(state.params)
    rest = fit.gradients * gradients + values * jnp.dtype(config.train.compute).itemsize
    return Need(bytes_a_device(state), rest + (gradients if accumulate > 1 else 0))
