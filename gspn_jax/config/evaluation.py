"""Settings of what a run scores as it goes."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from gspn_jax.config.checks import check_numbers, put_homes, require, require_one_of, require_positive
from gspn_jax.tables import METRICS, Choice

if TYPE_CHECKING:
    MetricName = str
else:  # the command line offers the table's names as they are when it reads its flags

    class MetricName(Choice):
        table = METRICS


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
