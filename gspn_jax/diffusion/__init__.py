"""Diffusion as pure functions: schedules, training objectives (iDDPM, flow matching), samplers, guidance.

Knows functions, not models: a denoiser is any `denoise(x_t, time, condition) -> output` with

    x_t     float32 [B, H, W, C], the noisy images
    time    float32 [B]: the timestep 0..T-1 under "ddpm" (whole in training), 1000 t under "flow" and "x_prediction";
            float32 [B, 2] under "mean_flow": t and the span down to a second time, both in 0..1
    condition  a pytree of arrays [B, ...], such as labels int32 [B]
    output  float [B, H, W, O]: O = C is epsilon ("ddpm"), velocity ("flow"), x_0 ("x_prediction") or mean velocity
            ("mean_flow"); O = 2C adds the variance range of iDDPM
"""

from gspn_jax.diffusion.objectives import drop_condition, loss
from gspn_jax.diffusion.samplers import sample
from gspn_jax.diffusion.schedules import Schedule, make_schedule, respace

__all__ = ["Schedule", "drop_condition", "loss", "make_schedule", "respace", "sample"]
