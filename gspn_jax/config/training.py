"""Settings of how a run trains: optimizer, mesh, steps, guard, profile and log."""

import dataclasses
import re
from typing import Literal, get_args

from gspn_jax.config.checks import (
    LARGEST,
    ConfigError,
    check_numbers,
    require,
    require_fraction,
    require_one_of,
    require_positive,
    require_width,
    whole_number,
)

Precision = Literal["params=float32,compute=bfloat16", "params=float32,compute=float32"]

CHANGEABLE = ("data", "train.batch_size", "train.accumulate", "train.seed")
"""Names that `train.allow_change` can hold."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, with linear warm-up and a half-cosine decay to `final_learning_rate`."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices of blocks and AdamW for the rest (`gspn_jax.training.muon`), at the same learning
    rate and weight decay."""
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-6
    warmup_steps: int = 0
    warmup_start: float = 0.0
    """The learning rate that warm-up begins with."""
    decay_steps: int | None = None
    """The step at which `final_learning_rate` is reached, and kept from then on; None is the last one. A run that is
    made longer goes on without a jump with the steps that it had."""
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    momentum: float = 0.95
    """Decay of the one moment of Muon; `b1` and `b2` are those of AdamW."""
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, "optimizer")
        require_positive(self, "optimizer", "learning_rate", "clip_norm")
        require(
            0 <= self.final_learning_rate <= self.learning_rate,
            "optimizer.final_learning_rate",
            "between 0 and optimizer.learning_rate",
            self.final_learning_rate,
        )
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", "0 or more", self.warmup_steps)
        require(
            self.decay_steps is None or self.decay_steps >= max(1, self.warmup_steps),
            "optimizer.decay_steps",
            f"1 or more and at least optimizer.warmup_steps ({self.warmup_steps}), or None",
            self.decay_steps,
        )
        require(
            0 <= self.warmup_start <= self.learning_rate,
            "optimizer.warmup_start",
            "between 0 and optimizer.learning_rate",
            self.warmup_start,
        )
        require(self.weight_decay >= 0, "optimizer.weight_decay", "0 or more", self.weight_decay)
        require_fraction(self, "optimizer", "b1", "b2", "momentum")
        require_one_of("optimizer.name", self.name, ("adamw", "muon"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh ("data", "fsdp", "tensor"); -1 for `data` takes the devices that the other two leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_numbers(self, "mesh")
        require(self.data == -1 or self.data > 0, "mesh.data", "-1 or greater than 0", self.data)
        require_positive(self, "mesh", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop. Everything counted in steps counts optimizer steps."""

    steps: int = 1000
    batch_size: int = 128
    """Images a step over all devices and hosts."""
    accumulate: int = 1
    """Micro-batches a step is split into."""
    seed: int = 0
    precision: Precision = "params=float32,compute=bfloat16"
    ema_decays: tuple[float, ...] = (0.9999,)
    """The first one is sampled from by default."""
    snapshot_every: int = 0
    """Keeps power-function averages of the widths `ema_widths` from the first step on, and snapshots of them every so
    many steps for good, of which any other width is made afterwards (EDM2, arXiv 2312.02696); 0 keeps none."""
    ema_widths: tuple[float, ...] = (0.05, 0.10)
    """Standard deviations of those averages, relative to the length of training."""
    log_every: int = 50
    sample_every: int = 0
    """A grid of EMA samples every so many steps; 0 is never."""
    save_every: int = 1000
    """The latest checkpoint is replaced every so many steps."""
    keep_every: int = 0
    """Checkpoints at multiples of this are kept for good; 0 keeps the latest only."""
    only: str | None = None
    """Regular expression: parameters in whose names, such as "trunk/blocks/mixer/qkv/kernel", it is found are trained,
    the others keep their bits. None trains all."""
    allow_change: tuple[str, ...] = ()
    """Settings that a run may change when it goes on, although it is then no longer the run that was started: "data",
    "train.batch_size", "train.accumulate", "train.seed"."""

    def __post_init__(self) -> None:
        check_numbers(self, "train")
        require_positive(self, "train", "steps", "batch_size", "accumulate", "log_every", "save_every")
        require(
            self.batch_size % self.accumulate == 0,
            "train.batch_size",
            f"a multiple of train.accumulate ({self.accumulate})",
            self.batch_size,
        )
        require(0 <= self.seed < 2**32, "train.seed", "0 or more and below 2**32", self.seed)
        require(self.sample_every >= 0, "train.sample_every", "0 or more", self.sample_every)
        require(self.keep_every >= 0, "train.keep_every", "0 or more", self.keep_every)
        require(len(self.ema_decays) > 0, "train.ema_decays", "at least one decay", self.ema_decays)
        for decay in self.ema_decays:
            require(0.0 <= decay < 1.0, "train.ema_decays", "decays in [0, 1)", self.ema_decays)
        require(self.snapshot_every >= 0, "train.snapshot_every", "0 or more", self.snapshot_every)
        once = len(set(self.ema_widths)) == len(self.ema_widths) > 0
        require(once, "train.ema_widths", "some widths, each once", self.ema_widths)
        for width in self.ema_widths:
            require_width("train.ema_widths", width)
        for name in self.allow_change:
            require_one_of("train.allow_change", name, CHANGEABLE)
        require_one_of("train.precision", self.precision, get_args(Precision))
        if self.only is not None:
            try:
                re.compile(self.only)
            except re.error as error:
                raise ConfigError(f"train.only must be a regular expression, found {self.only!r}: {error}") from error

    @property
    def compute(self) -> str:
        """The type of the computation; parameters are float32."""
        return self.precision.partition("compute=")[2]


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Answers to numbers that go bad. A spike is looked for when losses are logged, before they are saved."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop before its update, or leave that update out and count it."""
    nonfinite_limit: int = 10
    """With "skip": updates a run may leave out before it stops."""
    spike_factor: float = 0.0
    """Standard deviations by which the mean loss of `spike_steps` steps exceeds the median before it in a spike; the
    run then goes back to its newest checkpoint and on with another order of the data. 0 never looks; 6 is cautious."""
    spike_steps: int = 5
    spike_window: int = 200
    """Steps before that the median and the standard deviation are taken over."""
    max_rollbacks: int = 3
    """Spikes a run may answer by going back before it stops."""

    def __post_init__(self) -> None:
        check_numbers(self, "guard")
        require_one_of("guard.nonfinite", self.nonfinite, ("stop", "skip"))
        require_positive(self, "guard", "spike_steps", "spike_window")
        for name in ("nonfinite_limit", "spike_factor", "max_rollbacks"):
            require(getattr(self, name) >= 0, f"guard.{name}", "0 or more", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps, which xprof and TensorBoard open; in the folder "profile" of the run directory."""

    steps: str | None = None
    """FIRST:LAST, both included, such as "100:103"."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            first, _, last = (whole_number(part) for part in self.steps.partition(":"))
            require(
                first is not None and last is not None and 1 <= first <= last <= LARGEST,
                "profile.steps",
                "FIRST:LAST with 1 <= FIRST <= LAST",
                self.steps,
            )

    @property
    def bounds(self) -> tuple[int, int] | None:
        """(first, last) step, or None for no trace."""
        if self.steps is None:
            return None
        first, last = self.steps.split(":")
        return int(first), int(last)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Logs beside the progress line, metrics.jsonl and TensorBoard events of the run directory."""

    wandb: str | None = None
    """The project of Weights & Biases that gets metrics, pictures and config; WANDB_MODE=offline keeps them here."""

    def __post_init__(self) -> None:
        require(self.wandb != "", "log.wandb", "the name of a project, or None", self.wandb)
