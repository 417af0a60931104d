"""From what a U-Net of Stable Diffusion predicts to the clean latents and the noise."""

from typing import Literal

from jaxtyping import Array, Float

from gspn_jax.config import ConfigError

Prediction = Literal["epsilon", "v_prediction"]
"""`prediction_type` of a scheduler's config: the noise (Ho et al. 2020), or v (Salimans and Ho 2022)."""


def split_prediction(
    kind: Prediction, output: Float[Array, "B H W C"], x: Float[Array, "B H W C"], alpha_bar: Float[Array, "#B 1 1 1"]
) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]:
    """The clean latents x0 and the noise e of x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) e, as `output` tells them.

    v = sqrt(alpha_bar) e - sqrt(1 - alpha_bar) x0. Raises ConfigError for another kind.
    """
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if kind == "epsilon":
        return (x - sigma * output) / signal, output
    if kind == "v_prediction":
        return signal * x - sigma * output, signal * output + sigma * x
    raise ConfigError(f"the prediction_type must be 'epsilon' or 'v_prediction', found {kind!r}")
