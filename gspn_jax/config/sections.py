"""The sections of a config: frozen dataclasses, validated when built."""

import dataclasses
import re
from typing import TYPE_CHECKING, Literal, get_args

from gspn_jax.config.checks import (
    LARGEST,
    ConfigError,
    check_numbers,
    put_homes,
    require,
    require_fraction,
    require_one_of,
    require_positive,
    require_width,
    whole_number,
)
from gspn_jax.tables import METRICS, MIXERS, OBJECTIVES, SAMPLERS, SOURCES, Choice

if TYPE_CHECKING:
    SourceName = MixerName = ObjectiveName = SamplerName = MetricName = str
else:  # the command line offers the table's names as they are when it reads its flags

    class SourceName(Choice):
        table = SOURCES

    class MixerName(Choice):
        table = MIXERS

    class ObjectiveName(Choice):
        table = OBJECTIVES

    class SamplerName(Choice):
        table = SAMPLERS

    class MetricName(Choice):
        table = METRICS


Layout = Literal["paper", "dit"]
MlpName = Literal["gelu", "swiglu"]
NormName = Literal["layer", "rms"]
Backend = Literal["scan", "reference", "mosaic_gpu"]
Precision = Literal["params=float32,compute=bfloat16", "params=float32,compute=float32"]
DiffusionForm = Literal["constant", "sigma", "decreasing", "increasing-decreasing"]
Remat = Literal["none", "dots", "names", "full"]

CHANGEABLE = ("data", "train.batch_size", "train.accumulate", "train.seed")
"""Names that `train.allow_change` can hold."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A denoiser: a row of `gspn_jax.models.presets.PRESETS`, named by `preset`; a field left None keeps its value.

    `chunk` is the local scan length of each block: an int for all blocks, None for global scans as in the operator,
    "preset" for what the preset says (in the paper layout local 2, the last two blocks global), or a tuple with one int
    or None a block.
    """

    preset: str = "GSPN-B/2"
    layout: Layout | None = None
    mixer: MixerName | None = None
    hidden: int | None = None
    depth: int | None = None
    heads: int | None = None
    patch: int | None = None
    mlp: MlpName | None = None
    """In the DiT layout: two linears around a GELU, or SwiGLU of as many parameters."""
    norm: NormName | None = None
    """In the DiT layout: layer norm without parameters, or RMS norm with a learned scale."""
    qk_norm: bool | None = None
    """RMS norm with a learned scale of the queries and keys of each head of attention."""
    rope: bool | None = None
    """Rotary positions in attention, of rows and of columns, beside the sine-cosine ones that are added."""
    positions: bool | None = None
    """In the DiT layout: adds sine-cosine positions to the tokens. None: where the mixer does not know them, as
    attention. True for one that does, where other weights are those of a model with them (`distill`, `init_from`)."""
    bottleneck: int | None = None
    """Width through which patches are embedded by two linears (JiT); 0 is one linear."""
    chunk: int | None | Literal["preset"] | tuple[int | None, ...] = "preset"  # noqa: RUF036 (tried in this order)
    groups: int | None = None
    """Number of sets of propagation weights: None is one per channel (GSPN), 1 is one for all (GSPN-2)."""
    proxy_ratio: int = 16
    skip: bool = False
    """Adds the per-pixel skip term of the authors' released code (not in the paper)."""
    mixer_options: tuple[str, ...] = ()
    """NAME=VALUE of a mixer that has options beside those above."""
    drop_path: float = 0.1
    learn_sigma: bool | None = None
    """None: two outputs per channel (prediction and variance range) under the "ddpm" objective, one under "flow"."""
    remat: Remat = "none"
    """Values that the backward pass computes again: none, all but the linears, all but what is dear to compute for its
    size (`gspn_jax.models.remat.NAMES`), all. Under mesh.fsdp "none" is "dots"."""
    backend: Backend | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "model")
        for name in ("hidden", "depth", "heads", "patch", "groups"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name}", "greater than 0 or None", value)
        require_one_of("model.layout", self.layout, (*get_args(Layout), None))
        require_one_of("model.mixer", self.mixer, (*MIXERS, None))
        require_one_of("model.mlp", self.mlp, (*get_args(MlpName), None))
        require_one_of("model.norm", self.norm, (*get_args(NormName), None))
        require(
            self.bottleneck is None or self.bottleneck >= 0, "model.bottleneck", "0 or more, or None", self.bottleneck
        )
        require_one_of("model.remat", self.remat, get_args(Remat))
        require_one_of("model.backend", self.backend, (*get_args(Backend), None))
        require_positive(self, "model", "proxy_ratio")
        require_fraction(self, "model", "drop_path")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Source of the images: "digits" (scikit-learn's, embedded), "folder" (one folder a class), "tfds", "records"
    (decoded images that `gspn_jax.prepare images` wrote), or "latents" (VAE moments that `gspn_jax.prepare latents`
    wrote; `image_size` and `channels` are then those of the latents)."""

    source: SourceName = "digits"
    path: str | None = None
    """The folder of images, records or latents, or the data_dir of tensorflow-datasets."""
    name: str | None = None
    """The tensorflow-datasets name, such as "imagenet2012"."""
    split: str = "train"
    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    flip: bool = False
    bad_images: Literal["error", "skip"] = "error"
    """Effect of a corrupt image: stop with its name, or be replaced by another one and counted in a warning."""
    workers: int = 0
    """Grain worker processes; 0 decodes in threads of the main process."""
    unconditional: bool = False
    """Trains without classes: `path` of a "folder" is then any folder of images, and `num_classes` is 1, whatever it
    is set to. There is nothing to guide by."""
    in_memory: bool = False
    """Decodes all images once, before training, and keeps them in the memory of every host: for small sets, which then
    feed fast devices. The batches are the same; Grain is not needed."""

    def __post_init__(self) -> None:
        check_numbers(self, "data")
        put_homes(self, "path")
        if self.unconditional:
            object.__setattr__(self, "num_classes", 1)
        require_one_of("data.source", self.source, SOURCES)
        require_one_of("data.bad_images", self.bad_images, ("error", "skip"))
        require_positive(self, "data", "image_size", "channels", "num_classes")
        require(self.workers >= 0, "data.workers", "0 or more", self.workers)
        if self.source == "folder":
            require(bool(self.path), "data.path", "the image folder when data.source is 'folder'", self.path)
        if self.source == "records":
            require(bool(self.path), "data.path", "the folder of records when data.source is 'records'", self.path)
        if self.latents:
            require(bool(self.path), "data.path", "the folder of latents when data.source is 'latents'", self.path)
            require(
                not self.in_memory,
                "data.in_memory",
                "False when data.source is 'latents', which are not decoded",
                self.in_memory,
            )
        require(
            not (self.in_memory and self.workers),
            "data.workers",
            "0 with data.in_memory, which leaves nothing to decode while training",
            self.workers,
        )
        if self.source == "tfds":
            require(bool(self.name), "data.name", "a tensorflow-datasets name when data.source is 'tfds'", self.name)

    @property
    def latents(self) -> bool:
        """Tells whether images are latents of an autoencoder: floats in their final scale, looked at once decoded."""
        return self.source == "latents"


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The training objective: "ddpm" (iDDPM: epsilon, learned range variance, hybrid loss), "flow" (velocity),
    "x_prediction" (clean image, loss of the velocity) or "mean_flow" (mean velocity between two times)."""

    objective: ObjectiveName = "ddpm"
    timesteps: int = 1000
    beta_schedule: Literal["linear", "cosine"] = "linear"
    time_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    """Law of the noise times of flow matching, x_prediction and mean_flow."""
    time_mean: float = 0.0
    time_std: float = 1.0
    """Mean and deviation of the normal in "logit_normal"; as t = 1 is noise, a mean in JiT's terms changes its sign."""
    span_share: float = 0.25
    """Share of images of "mean_flow" whose two times differ; the others are those of flow matching."""
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(self, "diffusion")
        require_one_of("diffusion.objective", self.objective, OBJECTIVES)
        require_one_of("diffusion.beta_schedule", self.beta_schedule, ("linear", "cosine"))
        require_one_of("diffusion.time_distribution", self.time_distribution, ("logit_normal", "uniform"))
        require(self.timesteps > 1, "diffusion.timesteps", "greater than 1", self.timesteps)
        require_positive(self, "diffusion", "time_std")
        require(0.0 <= self.span_share <= 1.0, "diffusion.span_share", "in [0, 1]", self.span_share)
        require_fraction(self, "diffusion", "label_dropout")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Settings of sampling. `name` None is the objective's own: "ddpm" for ddpm, "heun" for flow and x_prediction,
    "mean_flow" for mean_flow."""

    name: SamplerName | None = None
    steps: int = 250
    guidance_scale: float = 1.0
    """Classifier-free guidance: 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The part of the noise time, 0 clean to 1 pure noise, in which guidance acts."""
    guidance_sigmas: tuple[float, float] | None = None
    """The same as noise levels, LOW < sigma <= HIGH of x_0 + sigma noise, as arXiv 2404.07724 has them: t / (1 - t) at
    noise time t of flow matching. In units of the data as the network sees them; those of EDM2 are half of ours."""
    guide: str | None = None
    """Autoguidance (arXiv 2406.02507): the run of a smaller or less trained model, whose prediction for the same
    condition is what guidance leads away from, in place of that without a condition."""
    guide_step: int | None = None
    """The guide's checkpoint; the latest by default."""
    guide_ema: float | None = None
    """The guide's EMA decay: the first of its run by default; 0 is the parameters themselves."""
    guide_ema_width: float | None = None
    """The width of a power-function average of the guide, in place of a decay."""
    guidance_channels: Literal["all", "first3"] = "all"
    """"first3" guides three latent channels only, as in the code behind DiT's published numbers."""
    ddim_eta: float = 0.0
    sde_diffusion: DiffusionForm = "sigma"
    """Noise of "sde" over the noise time t, as SiT names it: 1, t, sin^4(pi t / 2) and sin^2(pi t)."""
    sde_norm: float = 1.0
    """Factor of that; in "decreasing" that of its cosine, as in SiT."""
    sde_last: Literal["mean", "euler"] = "mean"
    """The last step of "sde", without noise: the drift of the SDE, or of the ODE, which lands on the expected x_0."""
    sde_last_size: float = 0.04
    """The noise time from which the last step goes to 0."""
    clip_denoised: bool = False
    """Clips each predicted clean image to [-1, 1]: for pixels, not for latents."""

    def __post_init__(self) -> None:
        check_numbers(self, "sampler")
        require_one_of("sampler.name", self.name, (*SAMPLERS, None))
        require_one_of("sampler.guidance_channels", self.guidance_channels, ("all", "first3"))
        require_positive(self, "sampler", "steps")
        require(self.guidance_scale >= 0, "sampler.guidance_scale", "0 or more", self.guidance_scale)
        low, high = self.guidance_interval
        require(
            0.0 <= low < high <= 1.0,
            "sampler.guidance_interval",
            "(low, high) with 0 <= low < high <= 1",
            self.guidance_interval,
        )
        require(0.0 <= self.ddim_eta <= 1.0, "sampler.ddim_eta", "in [0, 1]", self.ddim_eta)
        require_one_of("sampler.sde_diffusion", self.sde_diffusion, get_args(DiffusionForm))
        require_one_of("sampler.sde_last", self.sde_last, ("mean", "euler"))
        require(self.sde_norm >= 0, "sampler.sde_norm", "0 or more", self.sde_norm)
        require(0 < self.sde_last_size < 1, "sampler.sde_last_size", "between 0 and 1", self.sde_last_size)
        if self.guidance_sigmas is not None:
            self._check_sigmas(self.guidance_sigmas)
        self._check_guide()

    def _check_sigmas(self, found: tuple[float, float]) -> None:
        whole = len(found) == 2 and 0.0 <= found[0] < found[1]
        require(whole, "sampler.guidance_sigmas", "(low, high) with 0 <= low < high, or None", found)
        require(
            tuple(self.guidance_interval) == (0.0, 1.0),
            "sampler.guidance_interval",
            "(0, 1) beside sampler.guidance_sigmas, which say the same in other units",
            self.guidance_interval,
        )

    def _check_guide(self) -> None:
        put_homes(self, "guide")
        require(self.guide != "", "sampler.guide", "a run directory, or None", self.guide)
        for name in ("guide_step", "guide_ema", "guide_ema_width"):
            value = getattr(self, name)
            require(value is None or self.guide is not None, f"sampler.{name}", "None without sampler.guide", value)
        if self.guide_ema_width is not None:
            require_width("sampler.guide_ema_width", self.guide_ema_width)
            require(self.guide_ema is None, "sampler.guide_ema", "None beside sampler.guide_ema_width", self.guide_ema)


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
class EvalConfig:
    """Metrics of samples while training goes on: of averaged parameters, on the mesh that trains."""

    every: int = 0
    """Evaluates every so many steps and at the last; 0 is never."""
    num_samples: int = 10_000
    """Published numbers are of 50,000; fewer give a higher FID, which still tells checkpoints apart."""
    metrics: tuple[MetricName, ...] = ("fid",)
    """With "fid", the checkpoint of the lowest one is kept for good beside the latest."""
    reference: str | None = None
    """Reference statistics (.npz), such as `python -m gspn_jax.prepare stats` makes; only "is" needs none."""
    inception: str | None = None
    """Weights of Inception-v3 of 2015 (.pth or .safetensors)."""
    networks: tuple[str, ...] = ()
    """NAME=FILE: weights of other feature networks."""
    vae: str | None = None
    """Weights of the autoencoder that decodes the samples of a run on latents."""
    batch_size: int = 64
    """Samples at a time over all devices: bounds the memory of sampling, decoding and Inception."""
    ema: float | None = None
    """The EMA decay to sample from; None is the first of train.ema_decays, 0 the parameters themselves."""
    guidance_scale: float | None = None
    """None is that of the sampler."""
    steps: int | None = None
    """Sampling steps; None is those of the sampler."""
    labels: Literal["random", "balanced"] = "random"
    """Uniform at random, as published numbers use, or equally many of each class."""
    seed: int = 0
    """The noise of sample i comes from the seed and i, at each evaluation the same."""

    def __post_init__(self) -> None:
        check_numbers(self, "eval")
        put_homes(self, "reference", "inception", "vae")
        require(self.every >= 0, "eval.every", "0 or more", self.every)
        require(self.num_samples > 3, "eval.num_samples", "4 or more", self.num_samples)
        require(
            len(self.metrics) > 0 and len(set(self.metrics)) == len(self.metrics),
            "eval.metrics",
            "some metrics, each once",
            self.metrics,
        )
        for name in self.metrics:
            require_one_of("eval.metrics", name, METRICS)
        require_positive(self, "eval", "batch_size")
        require(
            self.guidance_scale is None or self.guidance_scale >= 0,
            "eval.guidance_scale",
            "0 or more, or None",
            self.guidance_scale,
        )
        require(self.steps is None or self.steps > 0, "eval.steps", "greater than 0, or None", self.steps)
        require_one_of("eval.labels", self.labels, ("random", "balanced"))
        require(0 <= self.seed < 2**64, "eval.seed", "0 or more and below 2**64", self.seed)


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


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """Alignment of tokens with features of a frozen network (REPA, arXiv 2410.06940), whose settings are the
    defaults."""

    features: str | None = None
    """The folder of features of the images that are trained on, which `gspn_jax.prepare features` wrote. None aligns
    nothing."""
    depth: int = 8
    """Blocks after which tokens are projected and compared."""
    weight: float = 0.5
    """Weight of 1 - cosine beside the objective's loss."""
    hidden: int = 2048
    """Width of the projector, an MLP of three linears that is trained beside the denoiser and in none of its files."""

    def __post_init__(self) -> None:
        check_numbers(self, "align")
        put_homes(self, "features")
        require(self.features != "", "align.features", "a folder of features, or None", self.features)
        require_positive(self, "align", "depth", "hidden")
        require(self.weight >= 0, "align.weight", "0 or more", self.weight)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Learning from a teacher, a trained denoiser of the same images and classes."""

    teacher: str | None = None
    """Run directory of the teacher, whose first average is taken; a new run begins with those of its weights that fit,
    unless `init_from` names others. None is no teacher."""
    step: int | None = None
    """Checkpoint of the teacher; None is the newest."""
    prediction_weight: float = 1.0
    """Weight of the mean squared distance from its prediction."""
    features: tuple[int, ...] = ()
    """Numbers of blocks, from 0, whose tokens are compared as well."""
    feature_weight: float = 1.0
    """Weight of that distance, which is relative to the mean square of the teacher's tokens."""
    data_weight: float = 0.0
    """Weight of the objective's own loss."""

    def __post_init__(self) -> None:
        check_numbers(self, "distill")
        put_homes(self, "teacher")
        require(self.teacher != "", "distill.teacher", "a run directory, or None", self.teacher)
        require(all(i >= 0 for i in self.features), "distill.features", "numbers of blocks from 0", self.features)
        for name in ("prediction_weight", "feature_weight", "data_weight"):
            require(getattr(self, name) >= 0, f"distill.{name}", "0 or more", getattr(self, name))
