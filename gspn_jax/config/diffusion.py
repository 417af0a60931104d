"""Settings of what a denoiser learns, and of how it is sampled."""

import dataclasses
from typing import TYPE_CHECKING, Literal, get_args

from gspn_jax.config.checks import (
    check_numbers,
    put_homes,
    require,
    require_fraction,
    require_one_of,
    require_positive,
    require_width,
)
from gspn_jax.tables import OBJECTIVES, SAMPLERS, Choice

if TYPE_CHECKING:
    ObjectiveName = SamplerName = str
else:  # the command line offers the table's names as they are when it reads its flags

    class ObjectiveName(Choice):
        table = OBJECTIVES

    class SamplerName(Choice):
        table = SAMPLERS


DiffusionForm = Literal["constant", "sigma", "decreasing", "increasing-decreasing"]


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
