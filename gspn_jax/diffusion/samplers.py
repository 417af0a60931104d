"""Samplers: each is a table of coefficients, and one loop runs any of them; `tables.SAMPLERS` has them by name.

Every sampler here moves a linear combination of the state, the current and the previous prediction, and fresh noise:

    x <- on_x * x + on_prediction * prediction + on_previous * previous_prediction + on_noise * noise

where the prediction is x_0 or the velocity, which the objective makes of the denoiser's output. One row of the table is
one evaluation of the denoiser. A step of Heun's method is two rows, and a second-order multistep method is the third
term. A sampler that moves otherwise has a function for it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from gspn_jax.config import ConfigError, DiffusionConfig, DiffusionForm, SamplerConfig
from gspn_jax.diffusion.ddpm import Denoise, interpolate_log_variance, split_output
from gspn_jax.diffusion.flow import TIME_SCALE
from gspn_jax.diffusion.guidance import guided_denoiser, guided_steps
from gspn_jax.diffusion.schedules import Schedule, make_schedule, respace
from gspn_jax.tables import OBJECTIVES, SAMPLERS, samplers_of


class Table(NamedTuple):
    """Coefficients of each network evaluation, in sampling order: float64 on the host, float32 in the loop."""

    time: Float[np.ndarray, "S"]
    """Time that the denoiser is told, 0 .. 1000."""
    noise_time: Float[np.ndarray, "S"]
    """Fraction of the noise time, 0 clean to 1 noise: where the guidance interval looks."""
    signal: Float[np.ndarray, "S"]
    sigma: Float[np.ndarray, "S"]
    """x = signal * x_0 + sigma * noise at this time."""
    on_x: Float[np.ndarray, "S"]
    on_prediction: Float[np.ndarray, "S"]
    on_previous: Float[np.ndarray, "S"]
    on_noise: Float[np.ndarray, "S"]
    log_posterior: Float[np.ndarray, "S"]
    log_beta: Float[np.ndarray, "S"]
    """The range of the learned log variance; only "ddpm" uses it."""
    span: Float[np.ndarray, "S"]
    """Noise time between this evaluation and the next, for denoisers that are told it; 0 asks for the velocity here."""


def linear(
    x: Float[Array, "N H W C"], prediction: Float[Array, "N H W C"], previous: Float[Array, "N H W C"], row: Table
) -> Float[Array, "N H W C"]:
    """The linear combination of a row, without its noise."""
    return row.on_x * x + row.on_prediction * prediction + row.on_previous * previous


class SamplerKind(NamedTuple):
    """A sampler, a line of `tables.SAMPLERS`."""

    moves: Literal["x0", "velocity", "mean_velocity"]
    """Kind of prediction that it takes; objectives say which they give."""
    table: Callable[[SamplerConfig, DiffusionConfig], Table]
    """Its rows for a config. Raises ConfigError where they do not fit."""
    learned_variance: bool = False
    """Whether the learned variance range, where there is one, takes the place of `on_noise` where that is not 0."""
    move: Callable[[Array, Array, Array, Table], Array] = linear
    """move(x, prediction, previous prediction, row) -> x, before noise."""


def sample(
    config: SamplerConfig,
    diffusion: DiffusionConfig,
    denoise: Denoise,
    shape: tuple[int, int, int],
    condition: PyTree[Array],
    keys: Key[Array, "N"],
    *,
    null: PyTree[Array | int],
    learn_sigma: bool,
    guide: Denoise | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Array, "N H W C"]:
    """Draws one image of `shape` (H, W, C) for each condition and key, float32, not rounded or clipped at the end.

    Pure: call it inside jit with everything static but `condition`, `keys` and what `denoise` closes over. All noise of
    image i comes from keys[i] (typed threefry keys, JAX's default) and the step, so neither the batch size nor the
    sharding of conditions and keys changes an image beyond rounding.

    `condition` is a tree of arrays [N, ...], such as labels, and `null` that of no condition, from which guidance leads
    away, without the axis N: for labels the number of classes. With `guide`, a denoiser of the same classes and
    objective, it leads away from that one's output for the same condition (autoguidance), and `null` is not used.

    `learn_sigma` says whether the denoiser has 2C outputs; the variance range sets the noise of the "ddpm" sampler,
    which without it has the posterior's variance. `progress(done, total)` is called on the host after each network
    evaluation, in no guaranteed order. `config.clip_denoised` clips each predicted x_0 to [-1, 1]: right for pixels,
    not for latents. Raises ValueError for inputs that do not fit together and ConfigError for settings that do not.
    """
    leaves = jax.tree.leaves(condition)
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or any(leaf.shape[:1] != keys.shape for leaf in leaves):
        raise ValueError(
            "sample needs conditions [N, ...] and as many typed keys [N] (jax.random.key), found conditions "
            f"{', '.join(f'{leaf.dtype}{list(leaf.shape)}' for leaf in leaves)} and keys {keys.dtype}{list(keys.shape)}"
        )
    kind, objective = SAMPLERS[sampler_name(config, diffusion)], OBJECTIVES[diffusion.objective]
    table = kind.table(config, diffusion)
    steps = guided_steps(config, table.noise_time, table.signal, table.sigma)
    guided = guided_denoiser(config, denoise, steps, shape[-1], null, guide)
    total = len(table.time)

    def draw(step: Int[Array, ""]) -> Float[Array, "N H W C"]:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32))(keys)

    def evaluate(carry, row):
        x, previous = carry
        index, is_guided, step = row
        output = guided(is_guided, x, _told(objective, step, len(keys)), condition)
        prediction, variance_range = split_output(output, shape[-1])
        if (variance_range is not None) != learn_sigma:
            raise ValueError(
                f"learn_sigma={learn_sigma} does not fit a denoiser with {output.shape[-1]} outputs for "
                f"{shape[-1]}-channel images"
            )
        prediction = objective.prediction(prediction, x, step, config.clip_denoised)
        moved = kind.move(x, prediction, previous, step)
        if table.on_noise.any():
            std = step.on_noise
            if kind.learned_variance and learn_sigma:
                log_variance = interpolate_log_variance(variance_range, step.log_posterior, step.log_beta)
                std = jnp.where(step.on_noise > 0, jnp.exp(0.5 * log_variance), 0.0)
            moved += std * draw(index + 1)
        if progress is not None:
            jax.debug.callback(lambda done: progress(int(done) + 1, total), index)
        return (moved, prediction), None

    start = draw(jnp.asarray(0))
    rows = (jnp.arange(total), jnp.asarray(steps), Table(*(jnp.asarray(column, jnp.float32) for column in table)))
    (images, _), _ = jax.lax.scan(evaluate, (start, jnp.zeros_like(start)), rows)
    return images


def _told(objective: Any, row: Table, count: int) -> Float[Array, "N"] | Float[Array, "N 2"]:
    """Times that the denoiser of `count` images is told in one evaluation."""
    if getattr(objective, "spans", False):
        return jnp.broadcast_to(jnp.stack([row.noise_time, row.span]), (count, 2))
    return jnp.broadcast_to(row.time, (count,))


def sampler_name(config: SamplerConfig, diffusion: DiffusionConfig) -> str:
    """`config.name`, or the objective's default: "heun" for flow, "ddpm" for ddpm.

    Raises ConfigError for a sampler that does not fit the objective.
    """
    names = samplers_of(diffusion.objective)
    if config.name not in (*names, None):
        raise ConfigError(
            f"sampler.name must be one of {', '.join(map(repr, names))} with "
            f"diffusion.objective={diffusion.objective!r}, found {config.name!r}"
        )
    return config.name or names[0]


def make_table(config: SamplerConfig, diffusion: DiffusionConfig) -> Table:
    """The table of the sampler and number of steps that the config says; raises ConfigError where they do not fit."""
    return SAMPLERS[sampler_name(config, diffusion)].table(config, diffusion)


def ddpm(schedule: Schedule) -> Table:
    """Ancestral sampling: the posterior q(x_{t-1} | x_t, x_0) at the predicted x_0 (Ho et al. 2020, eq. 7)."""
    return _discrete_table(
        schedule,
        on_x=schedule.posterior_mean_xt,
        on_prediction=schedule.posterior_mean_x0,
        on_noise=np.sqrt(schedule.posterior_variance),
    )


def ddim(schedule: Schedule, eta: float) -> Table:
    """Song et al. 2021, eq. 12 and 16: deterministic with eta = 0, as noisy as "ddpm" with eta = 1."""
    prev = schedule.alphas_cumprod_prev
    std = eta * np.sqrt(schedule.posterior_variance)
    on_x = np.sqrt(1.0 - prev - std**2) / np.sqrt(1.0 - schedule.alphas_cumprod)
    on_x0 = np.sqrt(prev) - on_x * np.sqrt(schedule.alphas_cumprod)
    return _discrete_table(schedule, on_x=on_x, on_prediction=on_x0, on_noise=std)


def dpm_solver(schedule: Schedule, steps: int) -> Table:
    """DPM-Solver++(2M), data prediction, multistep (Lu et al. 2022, algorithm 2), uniform in log SNR.

    `schedule` is the one of training. The times between its timesteps are fractions, as that grid wants: even steps in
    timesteps end with one so long in log SNR that the extrapolation overshoots (20 % in the deviation of a Gaussian
    after 20 steps, against 1.4 % here). The first step has no history and is of first order; the last one goes from
    timestep 0 to no noise, where it is x_0 itself.
    """
    trained_log_snr = 0.5 * np.log(schedule.alphas_cumprod / (1.0 - schedule.alphas_cumprod))
    log_snr = np.linspace(trained_log_snr[-1], trained_log_snr[0], steps)
    time = np.interp(-log_snr, -trained_log_snr, schedule.timesteps)  # np.interp wants an increasing axis
    signal, sigma = np.sqrt(1.0 / (1.0 + np.exp(-2.0 * log_snr))), np.sqrt(1.0 / (1.0 + np.exp(2.0 * log_snr)))
    next_signal, next_sigma = np.append(signal[1:], 1.0), np.append(sigma[1:], 0.0)

    on_x = next_sigma / sigma
    on_x0 = next_signal - on_x * signal
    extrapolation = np.full(steps, 0.5)  # 1 / (2 r) of the paper with r = 1, all steps being equal
    extrapolation[[0, -1]] = 0.0
    return _table(
        time=time,
        noise_time=time / (schedule.trained_timesteps - 1),
        signal=signal,
        sigma=sigma,
        on_x=on_x,
        on_prediction=(1.0 + extrapolation) * on_x0,
        on_previous=-extrapolation * on_x0,
    )


def euler(steps: int) -> Table:
    """Euler's method on dx/dt = velocity, from t = 1 to 0 in equal steps."""
    time = 1.0 - np.arange(steps) / steps
    return _flow_table(time, on_prediction=np.full(steps, -1.0 / steps))


def heun(steps: int) -> Table:
    """Heun's second-order method, two evaluations a step, from t = 1 to 0 in equal steps.

    The last step is Euler's (as in Karras et al. 2022, algorithm 1): the denoiser never sees t = 0, which training does
    not draw either. In all 2 steps - 1 evaluations.
    """
    size = 1.0 / steps
    time = np.repeat(1.0 - np.arange(steps + 1) / steps, 2)[1:-2]  # 1, 1-h, 1-h, 1-2h, 1-2h, ..., h, h
    corrects = np.arange(2 * steps - 1) % 2 == 1
    # The predictor has gone size * v1 too far by half: x - size/2 (v1 + v2) = (x - size v1) + size/2 v1 - size/2 v2.
    return _flow_table(
        time, on_prediction=np.where(corrects, -0.5 * size, -size), on_previous=np.where(corrects, 0.5 * size, 0.0)
    )


def mean_flow(steps: int) -> Table:
    """Equal steps from t = 1 to 0, each by the mean velocity over it (MeanFlow, arXiv 2505.13447, equation 12): exact
    in any number of evaluations, also in one, as far as the mean velocity is."""
    return euler(steps)._replace(span=np.full(steps, 1.0 / steps))


def euler_maruyama(
    steps: int, form: DiffusionForm = "sigma", norm: float = 1.0, last: Literal["mean", "euler"] = "mean",
    last_size: float = 0.04,
) -> Table:  # fmt: skip
    """Euler-Maruyama on the reverse SDE of straight paths, as SiT has it (arXiv 2401.08740).

    dx = (velocity - D(t) score) dt + sqrt(2 D(t)) dW backwards in t, with score = -(x + (1 - t) velocity) / t. From
    t = 1 to `last_size` in steps - 1 equal steps, then one without noise to 0: with the SDE's drift ("mean") or the
    velocity alone ("euler", which on straight paths is SiT's "Tweedie" too: E[x_0 | x]). `steps` evaluations.
    SiT's "SBDM", D = t / (1 - t), has no value at t = 1 and is left out; its "linear" is "sigma" on these paths.
    Raises ConfigError for a single step.
    """
    if steps < 2:
        raise ConfigError(f"sampler.steps must be 2 or more with sampler.name='sde', found {steps}")
    time = np.linspace(1.0, last_size, steps)
    size = np.append(np.full(steps - 1, (1.0 - last_size) / (steps - 1)), last_size)
    diffusion = {
        "constant": norm * np.ones(steps),
        "sigma": norm * time,
        "decreasing": 0.25 * (1.0 - norm * np.cos(np.pi * time)) ** 2,
        "increasing-decreasing": norm * np.sin(np.pi * time) ** 2,
    }[form]
    noise = np.sqrt(2.0 * diffusion * size)
    noise[-1] = 0.0
    if last == "euler":
        diffusion[-1] = 0.0
    pull = size * diffusion / time
    table = _flow_table(time, on_prediction=-size - pull * (1.0 - time), on_noise=noise)
    return table._replace(on_x=1.0 - pull)


def _discrete_table(schedule: Schedule, **columns: Float[np.ndarray, "S"]) -> Table:
    """Turns columns in the order of the schedule (clean to noisy) into a table in the order of sampling."""
    table = _table(
        time=schedule.timesteps.astype(np.float64),
        noise_time=schedule.timesteps / (schedule.trained_timesteps - 1),
        signal=np.sqrt(schedule.alphas_cumprod),
        sigma=np.sqrt(1.0 - schedule.alphas_cumprod),
        log_posterior=schedule.posterior_log_variance,
        log_beta=np.log(schedule.betas),
        **columns,
    )
    return Table(*(column[::-1] for column in table))


def _flow_table(time: Float[np.ndarray, "S"], **columns: Float[np.ndarray, "S"]) -> Table:
    return _table(
        time=TIME_SCALE * time, noise_time=time, signal=1.0 - time, sigma=time, on_x=np.ones_like(time), **columns
    )


def _table(**columns: Float[np.ndarray, "S"]) -> Table:
    """A table in which the columns that are not given are 0."""
    zeros = np.zeros_like(columns["time"])
    return Table(**{name: columns.get(name, zeros) for name in Table._fields})


def _spaced(config: SamplerConfig, diffusion: DiffusionConfig) -> Schedule:
    return respace(make_schedule(diffusion), config.steps)


DDPM = SamplerKind("x0", lambda config, diffusion: ddpm(_spaced(config, diffusion)), learned_variance=True)
DDIM = SamplerKind("x0", lambda config, diffusion: ddim(_spaced(config, diffusion), config.ddim_eta))
DPM_SOLVER = SamplerKind("x0", lambda config, diffusion: dpm_solver(make_schedule(diffusion), config.steps))
EULER = SamplerKind("velocity", lambda config, diffusion: euler(config.steps))
HEUN = SamplerKind("velocity", lambda config, diffusion: heun(config.steps))
MEAN_FLOW = SamplerKind("mean_velocity", lambda config, diffusion: mean_flow(config.steps))
SDE = SamplerKind(
    "velocity",
    lambda config, diffusion: euler_maruyama(
        config.steps, config.sde_diffusion, config.sde_norm, config.sde_last, config.sde_last_size
    ),
)
