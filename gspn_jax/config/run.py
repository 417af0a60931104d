"""The config of a run: what every run has, and that of a diffusion model; what older versions of it meant."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, ClassVar

from gspn_jax.config.checks import put_homes, require, require_no_nul
from gspn_jax.config.data import DataConfig
from gspn_jax.config.diffusion import DiffusionConfig, SamplerConfig
from gspn_jax.config.evaluation import EvalConfig
from gspn_jax.config.model import ModelConfig
from gspn_jax.config.teaching import AlignConfig, DistillConfig
from gspn_jax.config.training import GuardConfig, LogConfig, MeshConfig, OptimizerConfig, ProfileConfig, TrainConfig
from gspn_jax.tables import METRICS, OBJECTIVES, samplers_of

Values = dict[str, Any]
"""A config as plain JSON values."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings that a run of any task has; each task adds its own in a class. `run_dir` receives checkpoints,
    logs and pictures."""

    run_dir: str
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    guard: GuardConfig = GuardConfig()
    profile: ProfileConfig = ProfileConfig()
    log: LogConfig = LogConfig()
    init_from: str | None = None
    """Weights that a new run begins with: a run directory (the first average of its newest checkpoint), or a file or
    folder of weights. What does not fit begins anew, as the table init_from.txt of the run directory says; optimizer,
    schedule and averages are new. A run that has checkpoints goes on from them."""

    TASK: ClassVar[str]
    """The name by which a saved config is known to be of this class."""
    VERSION: ClassVar[int] = 1
    """The version of what `to_dict` gives. It grows when a field is renamed, removed or means something else; a new
    field with a default needs no new version."""
    MIGRATIONS: ClassVar[dict[int, Callable[[Values], Values]]] = {}
    """Version of a saved config -> function that makes the next version of it."""
    MACHINE: ClassVar[tuple[str, ...]] = ()
    """Settings that belong to the machine and are not saved."""
    FIXED: ClassVar[tuple[str, ...]] = (
        "model",
        "data",
        "train.batch_size",
        "train.accumulate",
        "train.seed",
        "train.ema_decays",
        "train.only",
        "optimizer.name",
    )
    """Settings (or sections) that are fixed for the life of a run; `train.allow_change` unlocks those of the data and
    the batch."""
    FREE: ClassVar[tuple[str, ...]] = ()
    """Settings among `FIXED` that may change: parameters and the stream of batches stay the same run's. The content of
    the data is compared by its fingerprint."""
    MOVABLE: ClassVar[tuple[str, ...]] = ()
    """Folders among `FIXED` that may lie elsewhere, but neither come nor go; their content is compared as that of the
    data."""
    SHAPES: ClassVar[tuple[str, ...]] = ()
    """Settings among `CHANGEABLE` that the shapes of parameters depend on, so that nothing unlocks them."""

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir", "a folder", self.run_dir)
        require(not re.match(r"[A-Za-z][\w.+-]*://", self.run_dir), "run_dir", "a folder of this machine", self.run_dir)
        put_homes(self, "run_dir", "init_from")
        for name in ("run_dir", "init_from"):
            require_no_nul(name, getattr(self, name))
        require(self.init_from != "", "init_from", "a run directory, a file of weights, or None", self.init_from)
        require(
            self.optimizer.warmup_steps <= self.train.steps,
            "optimizer.warmup_steps",
            f"at most train.steps ({self.train.steps})",
            self.optimizer.warmup_steps,
        )


def _from_version_1(values: Values) -> Values:
    """Had no version, and had model.backend, which is since chosen where a model runs. In model.chunk, None was what
    the preset says and 0 global. The two parts of train.precision could stand in any order."""
    model, train = values.get("model"), values.get("train")
    if isinstance(model, dict):
        model = {name: value for name, value in model.items() if name != "backend"}
        chunk = model.pop("chunk", None)
        if chunk is not None:
            model["chunk"] = [lines or None for lines in chunk] if isinstance(chunk, list | tuple) else chunk or None
        values = values | {"model": model}
    if isinstance(train, dict) and isinstance(train.get("precision"), str):
        parts = sorted(train["precision"].split(","), reverse=True)
        values = values | {"train": train | {"precision": ",".join(parts)}}
    return values


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """One experiment with a diffusion model. `run_dir` receives checkpoints, logs and sample grids."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampler: SamplerConfig = SamplerConfig()
    eval: EvalConfig = EvalConfig()
    distill: DistillConfig = DistillConfig()
    align: AlignConfig = AlignConfig()

    TASK = "diffusion"
    VERSION = 2
    MIGRATIONS = {1: _from_version_1}  # noqa: RUF012 (declared in RunConfig)
    MACHINE = ("model.backend", "model.unroll")
    FIXED = (*RunConfig.FIXED, "diffusion", "distill", "align")
    MOVABLE = ("align.features",)
    FREE = ("model.remat", "model.unroll", "data.path", "data.workers", "data.bad_images", "data.in_memory")
    SHAPES = ("data.channels", "data.num_classes")

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = (*samplers_of(self.diffusion.objective), None)
        require(
            self.sampler.name in allowed,
            "sampler.name",
            f"one of {allowed} with diffusion.objective={self.diffusion.objective!r}",
            self.sampler.name,
        )
        if self.data.unconditional:
            for name, scale in (
                ("sampler.guidance_scale", None if self.sampler.guide else self.sampler.guidance_scale),
                ("eval.guidance_scale", self.eval.guidance_scale),
            ):
                require(scale in (None, 1), name, "1 with data.unconditional: there is no class to guide by", scale)
        require(
            self.align.features is None or self.distill.teacher is None,
            "align.features",
            "None with distill.teacher",
            self.align.features,
        )
        self._check_steps("sampler.steps", self.sampler.steps)
        if self.eval.every:
            self._check_eval()

    def _check_steps(self, field: str, steps: int | None) -> None:
        if OBJECTIVES[self.diffusion.objective].discrete:
            most = self.diffusion.timesteps
            require((steps or 1) <= most, field, f"at most diffusion.timesteps ({most})", steps)

    def _check_eval(self) -> None:
        self._check_steps("eval.steps", self.eval.steps)
        require(
            self.eval.ema in (None, 0.0, *self.train.ema_decays),
            "eval.ema",
            f"None, 0 or one of train.ema_decays {self.train.ema_decays}",
            self.eval.ema,
        )
        require(
            self.eval.reference is not None or not any(METRICS[name].needs for name in self.eval.metrics),
            "eval.reference",
            f"a file of reference statistics for eval.metrics {self.eval.metrics}",
            self.eval.reference,
        )
        require(
            not any(METRICS[name].captions for name in self.eval.metrics),
            "eval.metrics",
            "metrics of images without captions",
            self.eval.metrics,
        )
        latents = self.data.latents
        require(
            latents == (self.eval.vae is not None),
            "eval.vae",
            "the weights of the autoencoder for a run on latents" if latents else "None for a run on pixels",
            self.eval.vae,
        )
