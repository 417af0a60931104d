"""Noise and timesteps of a Stable Diffusion model, as its `scheduler_config.json` says."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float64

from gspn_jax.config import ConfigError

Spacing = Literal["leading", "trailing", "linspace"]
Betas = Literal["scaled_linear", "linear"]
PredictionType = Literal["epsilon", "v_prediction"]

MOST_TIMESTEPS = 10**6
"""A thousand times as many as anybody trains with; each takes a row of a table."""
_FIXED = {
    "trained_betas": None,
    "thresholding": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "euler_at_final": False,
    "lambda_min_clipped": -math.inf,
    "timestep_type": "discrete",
    "interpolation_type": "linear",
    "final_sigmas_type": "zero",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "sigma_min": None,
    "sigma_max": None,
}
"""Options of diffusers that Stable Diffusion leaves at one value, which is all that is built here."""


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Noise that a model was trained with, and which timesteps its samplers visit."""

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    betas: Betas = "scaled_linear"
    """"scaled_linear": squares of a line between the roots."""
    prediction: PredictionType = "epsilon"
    spacing: Spacing | None = None
    """None is the sampler's own: "leading" of DDIM and PNDM, "linspace" of Euler and DPM-Solver++."""
    steps_offset: int = 0
    """Added to timesteps of "leading"."""
    karras: bool = False
    """Spaces noise levels as Karras et al. 2022, eq. 5, with rho 7 (Euler and DPM-Solver++)."""
    zero_snr: bool = False
    """Shifts the betas so that the noisiest timestep has no signal (Lin et al. 2024, algorithm 1)."""
    alpha_to_one: bool | None = None
    """Whether the last step of DDIM and PNDM ends without noise, not with that of timestep 0; None is the sampler's
    own: DDIM's does."""

    def __post_init__(self) -> None:
        for name, kinds in (
            ("betas", get_args(Betas)),
            ("prediction", get_args(PredictionType)),
            ("spacing", (*get_args(Spacing), None)),
        ):
            if (found := getattr(self, name)) not in kinds:
                raise ConfigError(
                    f"the scheduler's {_NAMES[name]} must be one of {', '.join(map(repr, kinds))}, found {found!r}"
                )
        for name in ("beta_start", "beta_end"):
            if not isinstance(found := getattr(self, name), float | int) or not 0 < found < 1:
                raise ConfigError(f"the scheduler's {name} must be between 0 and 1, found {found!r}")
        for name, least in (("timesteps", 2), ("steps_offset", 0)):
            found = getattr(self, name)
            if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= MOST_TIMESTEPS:
                raise ConfigError(
                    f"the scheduler's {_NAMES[name]} must be a whole number from {least} to {MOST_TIMESTEPS:,}, found "
                    f"{found!r}"
                )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "SchedulerConfig":
        """Reads a `scheduler_config.json`; what it does not say is diffusers' default.

        Raises ConfigError for a field that is wrong, or an option that Stable Diffusion does not use.
        """
        for name, value in _FIXED.items():
            if content.get(name, value) != value:
                raise ConfigError(f"the scheduler's {name} must be {value!r}, found {content[name]!r}")
        defaults = {"beta_start": 0.0001, "beta_end": 0.02, "betas": "linear"}
        given = {ours: content[theirs] for ours, theirs in _NAMES.items() if theirs in content}
        return cls(**(defaults | given))


_NAMES = {
    "timesteps": "num_train_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "betas": "beta_schedule",
    "prediction": "prediction_type",
    "spacing": "timestep_spacing",
    "steps_offset": "steps_offset",
    "karras": "use_karras_sigmas",
    "zero_snr": "rescale_betas_zero_snr",
    "alpha_to_one": "set_alpha_to_one",
}
"""Fields of `SchedulerConfig` as diffusers' files name them."""


def alphas_cumprod(config: SchedulerConfig) -> Float64[np.ndarray, "T"]:
    """alpha_bar of every timestep: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

    Rounded to float32 where diffusers does: 1 - alpha_bar_0 has but four digits then.
    """
    ends = config.beta_start, config.beta_end
    if config.betas == "scaled_linear":
        betas = np.linspace(ends[0] ** 0.5, ends[1] ** 0.5, config.timesteps) ** 2
    else:
        betas = np.linspace(*ends, config.timesteps)
    found = np.cumprod(np.float32(1) - betas.astype(np.float32), dtype=np.float64).astype(np.float32).astype(np.float64)
    if config.zero_snr:
        signal = np.sqrt(found)
        found = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    return found
