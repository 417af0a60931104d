"""Samplers of Stable Diffusion: rows of `samplers.Table` at the timesteps that its schedulers visit, and their loop;
`tables.STABLE_DIFFUSION_SAMPLERS` has them by name.

The state is variance preserving throughout, x = signal * x_0 + sigma * noise with signal^2 + sigma^2 = 1, which is also
what the network sees. diffusers' Euler moves x / signal; here the coefficients are divided instead. All samplers are
deterministic. Facts and defaults are those of diffusers 0.42.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, PyTree

from gspn_jax.config import ConfigError
from gspn_jax.diffusion.samplers import Table, linear
from gspn_jax.diffusion.scheduler_config import PredictionType, SchedulerConfig, Spacing, alphas_cumprod

_SMALLEST = 2.0**-24
"""alpha_bar of the noisiest timestep where a zero would be divided by."""


class MultistepTable(NamedTuple):
    """Coefficients of each evaluation of a method that remembers a state and three outputs of the network."""

    time: Float[np.ndarray, "S"]
    signal: Float[np.ndarray, "S"]
    sigma: Float[np.ndarray, "S"]
    on_x: Float[np.ndarray, "S"]
    on_saved: Float[np.ndarray, "S"]
    """On the state that was remembered last."""
    on_output: Float[np.ndarray, "S"]
    on_first: Float[np.ndarray, "S"]
    on_second: Float[np.ndarray, "S"]
    on_third: Float[np.ndarray, "S"]
    """On the outputs that were remembered, the latest first."""
    keeps: Float[np.ndarray, "S"]
    """1 where state and output are remembered, 0 where not."""


class Sampler(NamedTuple):
    """A sampler of Stable Diffusion, a line of `tables.STABLE_DIFFUSION_SAMPLERS`."""

    table: Callable[[SchedulerConfig, int], Any]
    """(scheduler, steps) -> its rows, one an evaluation: NumPy columns with `time`, `signal` and `sigma` among them."""
    moves: Literal["x0", "output"] = "x0"
    """Kind of prediction that it takes: clean latents, or the output of the network as it is."""
    start: Callable[[SchedulerConfig, Any], float] = lambda scheduler, table: 1.0
    """Scale of the first noise."""
    move: Callable[..., Array] = linear
    """move(x, prediction, memory, row) -> x."""
    remember: Callable[..., PyTree[Array]] = lambda x, prediction, memory, row: prediction
    """remember(x, prediction, memory, row) -> memory of the next row."""
    memory: Callable[[Array], PyTree[Array]] = jnp.zeros_like
    """memory(x) -> that of the first row."""
    takes_karras: bool = False
    takes_zero_snr: bool = True


def sample(
    sampler: Sampler,
    scheduler: SchedulerConfig,
    steps: int,
    denoise: Callable[..., Float[Array, "M H W C"]],
    noise: Float[Array, "N H W C"],
    condition: PyTree[Array],
    *,
    null: PyTree[Array],
    guidance: float = 1.0,
    rescale: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Array, "N H W C"]:
    """Latents of `noise` (unit variance), one for each condition, float32.

    `denoise(x, time [M], condition)` is the network, M = N, or 2 N with guidance other than 1, which leads away from
    `null`, the same tree as `condition` without the axis N. `rescale` 0..1 is how far a guided prediction gets the
    deviation of the conditional one (Lin et al. 2024, eq. 15 and 16). `progress(done, total)` is called on the host
    after each evaluation, in no guaranteed order. Pure: call it inside jit. Raises ConfigError as `make_table`.
    """
    table = make_table(sampler, scheduler, steps)
    total = len(table.time)

    def output(x, time):
        times = jnp.broadcast_to(time, len(x))
        if guidance == 1.0:
            return denoise(x, times, condition)
        pairs = jax.tree.map(_paired, condition, null)
        both = denoise(jnp.repeat(x, 2, axis=0), jnp.repeat(times, 2), pairs).reshape(len(x), 2, *x.shape[1:])
        return guide(both[:, 0], both[:, 1], guidance, rescale)

    def evaluate(carry, row):
        (x, memory), (index, row) = carry, row
        prediction = output(x, row.time)
        if sampler.moves == "x0":
            prediction = clean(scheduler.prediction, prediction, x, row.signal, row.sigma)
        moved = sampler.move(x, prediction, memory, row)
        if progress is not None:
            jax.debug.callback(lambda done: progress(int(done) + 1, total), index)
        return (moved, sampler.remember(x, prediction, memory, row)), None

    start = noise.astype(jnp.float32) * sampler.start(scheduler, table)
    rows = jnp.arange(total), jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), table)
    (latents, _), _ = jax.lax.scan(evaluate, (start, sampler.memory(start)), rows)
    return latents


def make_table(sampler: Sampler, scheduler: SchedulerConfig, steps: int) -> Any:
    """Rows of a sampler. Raises ConfigError for a number of steps, or settings, that it does not take."""
    if not 1 <= steps <= scheduler.timesteps:
        raise ConfigError(f"--steps must be between 1 and the model's {scheduler.timesteps} timesteps, found {steps}")
    if scheduler.zero_snr and not sampler.takes_zero_snr:
        raise ConfigError("a model of zero terminal SNR must be sampled by ddim, euler or dpm++, found pndm")
    if scheduler.zero_snr and scheduler.prediction == "epsilon":
        raise ConfigError("a model of zero terminal SNR must predict v, found one that predicts epsilon")
    table = sampler.table(scheduler, steps)
    if table.time.max() > scheduler.timesteps - 1:
        raise ConfigError(
            f"--steps must be fewer, as the scheduler's steps_offset {scheduler.steps_offset} leads beyond its "
            f"{scheduler.timesteps} timesteps, found {steps}"
        )
    return table


def clean(
    kind: PredictionType,
    output: Float[Array, "N H W C"],
    x: Float[Array, "N H W C"],
    signal: Float[Array, ""],
    sigma: Float[Array, ""],
) -> Float[Array, "N H W C"]:
    """The clean latents that the output of a network tells."""
    return (x - sigma * output) / signal if kind == "epsilon" else signal * x - sigma * output


def guide(
    conditional: Float[Array, "N H W C"], unconditional: Float[Array, "N H W C"], scale: float, rescale: float
) -> Float[Array, "N H W C"]:
    """unconditional + scale (conditional - unconditional), by `rescale` at the deviation of the conditional one."""
    guided = unconditional + scale * (conditional - unconditional)
    if rescale == 0.0:
        return guided
    ratio = conditional.std((1, 2, 3), keepdims=True) / guided.std((1, 2, 3), keepdims=True)
    return guided * (rescale * ratio + 1.0 - rescale)


def ddim(config: SchedulerConfig, steps: int) -> Table:
    """Song et al. 2021, eq. 12, eta 0; each step is as long as all, whatever the next timestep is."""
    alphas = alphas_cumprod(config)
    times = _timesteps(config, steps, config.spacing or "leading")
    now, after = _at(alphas, times), _after(config, alphas, times - config.timesteps // steps, to_one=True)
    on_x = np.sqrt(1.0 - after) / np.sqrt(1.0 - now)
    return _rows(times, np.sqrt(now), np.sqrt(1.0 - now), on_x=on_x, on_x0=np.sqrt(after) - on_x * np.sqrt(now))


def euler(config: SchedulerConfig, steps: int) -> Table:
    """Euler's method on dx/dsigma of x / signal (Karras et al. 2022, algorithm 1 without its correction)."""
    spacing = config.spacing or "linspace"
    times = np.linspace(0, config.timesteps - 1, steps)[::-1]  # fractions, unlike the others
    if spacing != "linspace":
        times = _timesteps(config, steps, spacing)
    levels = _levels(config)
    noise = np.interp(times, np.arange(config.timesteps), levels)
    if config.karras:
        noise = _karras(noise[0], noise[-1], steps)
        times = _time_of(levels, noise)
    after = np.append(noise[1:], 0.0)
    signal, next_signal = 1.0 / np.sqrt(noise**2 + 1.0), 1.0 / np.sqrt(after**2 + 1.0)
    on_x = next_signal / signal * after / noise
    return _rows(times, signal, noise * signal, on_x=on_x, on_x0=next_signal * (1.0 - after / noise))


def dpm_solver(config: SchedulerConfig, steps: int) -> Table:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2); the first and the last step are of first order."""
    spacing = config.spacing or "linspace"
    if spacing == "trailing":
        times = _timesteps(config, steps, spacing)
    elif spacing == "leading":
        times = np.arange(steps, 0, -1) * (config.timesteps // (steps + 1)) + config.steps_offset
    else:
        times = np.linspace(0, config.timesteps - 1, steps + 1).round()[:0:-1]
    levels = _levels(config)
    noise = np.interp(times, np.arange(config.timesteps), levels)
    if config.karras:
        noise = _karras(levels[-1], levels[0], steps)
        times = _time_of(levels, noise).round()
    after = np.append(noise[1:], 0.0)
    signal, next_signal = 1.0 / np.sqrt(noise**2 + 1.0), 1.0 / np.sqrt(after**2 + 1.0)
    on_x = after * next_signal / (noise * signal)
    on_x0 = next_signal * (1.0 - after / noise)  # e^-h is the ratio of noise levels
    extrapolation = np.zeros(steps)
    lengths = np.log(noise[:-1]) - np.log(noise[1:])
    extrapolation[1:-1] = 0.5 * lengths[1:] / lengths[:-1]
    return _rows(
        times,
        signal,
        noise * signal,
        on_x=on_x,
        on_x0=(1.0 + extrapolation) * on_x0,
        on_previous=-extrapolation * on_x0,
    )


def pndm(config: SchedulerConfig, steps: int) -> MultistepTable:
    """The linear multistep method of Liu et al. 2022 as Stable Diffusion has it, without Runge-Kutta: the first step is
    taken twice, the second time with the mean of its outputs at both ends; steps + 1 evaluations.

    It combines outputs of the network, v as well, and only then makes noise of them (eq. 9).
    """
    alphas, length = alphas_cumprod(config), config.timesteps // steps
    times = _timesteps(config, steps, config.spacing or "leading")
    times = np.concatenate([times[:2], times[1:]])
    begins, ends = times.copy(), times - length
    if steps > 1:
        begins[1], ends[1] = times[1] + length, times[1]
    now, after = _at(alphas, begins), _after(config, alphas, ends, to_one=False)
    on_noise = -(after - now) / (now * np.sqrt(1.0 - after) + np.sqrt(now * (1.0 - now) * after))
    on_x, on_output = np.sqrt(after / now), on_noise
    if config.prediction == "v_prediction":
        on_x, on_output = on_x + on_noise * np.sqrt(1.0 - now), on_noise * np.sqrt(now)

    again = np.arange(len(times)) == 1
    weights = np.array([_PLMS[min(i, len(_PLMS) - 1)] for i in range(len(times))]).T * on_output
    told = _at(alphas, times)
    return MultistepTable(
        times,
        np.sqrt(told),
        np.sqrt(1.0 - told),
        np.where(again, 0.0, on_x),
        np.where(again, on_x, 0.0),
        *weights,
        keeps=1.0 - again,
    )


_PLMS = (
    (1.0, 0.0, 0.0, 0.0),
    (1 / 2, 1 / 2, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Shares of this output and of those remembered at each evaluation; the last line holds from then on."""


def _move_multistep(x, output, memory, row):
    saved, first, second, third = memory
    mixed = row.on_output * output + row.on_first * first + row.on_second * second + row.on_third * third
    return row.on_x * x + row.on_saved * saved + mixed


def _remember_multistep(x, output, memory, row):
    return jax.tree.map(lambda new, old: jnp.where(row.keeps > 0, new, old), (x, output, *memory[1:3]), memory)


def _euler_start(config: SchedulerConfig, table: Table) -> float:
    """Noise of "leading" has unit variance; the others leave out the signal that is still in x."""
    return 1.0 if config.spacing == "leading" else float(table.sigma[0])


DDIM = Sampler(ddim)
EULER = Sampler(euler, start=_euler_start, takes_karras=True)
DPM_SOLVER = Sampler(dpm_solver, takes_karras=True)
PNDM = Sampler(
    pndm,
    moves="output",
    move=_move_multistep,
    remember=_remember_multistep,
    memory=lambda x: (jnp.zeros_like(x),) * 4,
    takes_zero_snr=False,
)


def _paired(leaf: Array, none: Array) -> Array:
    """[N, ...] and what stands for none -> [2 N, ...]; the two of an image stay together, so that a batch that is split
    over devices is doubled without moving."""
    none = jnp.broadcast_to(jnp.asarray(none, leaf.dtype), leaf.shape)
    return jnp.stack([leaf, none], axis=1).reshape(-1, *leaf.shape[1:])


def _timesteps(config: SchedulerConfig, steps: int, spacing: Spacing) -> Float64[np.ndarray, "steps"]:
    """Timesteps of a spacing, whole numbers, the noisiest first (Lin et al. 2024, table 2)."""
    if spacing == "leading":
        return np.arange(steps - 1.0, -1, -1) * (config.timesteps // steps) + config.steps_offset
    if spacing == "trailing":
        return np.round(config.timesteps - np.arange(steps) * (config.timesteps / steps)) - 1.0
    return np.linspace(0, config.timesteps - 1, steps).round()[::-1]


def _at(alphas: Float64[np.ndarray, "T"], times: Float64[np.ndarray, "S"]) -> Float64[np.ndarray, "S"]:
    return alphas[np.minimum(times, len(alphas) - 1).astype(int)]  # what is beyond is refused by `make_table`


def _after(
    config: SchedulerConfig, alphas: Float64[np.ndarray, "T"], times: Float64[np.ndarray, "S"], *, to_one: bool
) -> Float64[np.ndarray, "S"]:
    """alpha_bar at the end of each step, where a time below 0 stands for the last."""
    last = 1.0 if (to_one if config.alpha_to_one is None else config.alpha_to_one) else alphas[0]
    return np.where(times < 0, last, _at(alphas, np.maximum(times, 0)))


def _levels(config: SchedulerConfig) -> Float64[np.ndarray, "T"]:
    """sigma / signal of every timestep."""
    alphas = alphas_cumprod(config)
    if config.zero_snr:
        alphas[-1] = _SMALLEST
    return np.sqrt((1.0 - alphas) / alphas)


def _karras(most: float, least: float, steps: int) -> Float64[np.ndarray, "steps"]:
    return np.linspace(most ** (1 / 7), least ** (1 / 7), steps) ** 7


def _time_of(levels: Float64[np.ndarray, "T"], noise: Float64[np.ndarray, "S"]) -> Float64[np.ndarray, "S"]:
    return np.interp(np.log(noise), np.log(levels), np.arange(len(levels)))


def _rows(times, signal, sigma, *, on_x, on_x0, on_previous=None) -> Table:
    zeros = np.zeros(len(times))
    return Table(
        time=np.asarray(times, np.float64),
        noise_time=zeros,
        signal=signal,
        sigma=sigma,
        on_x=on_x,
        on_prediction=on_x0,
        on_previous=zeros if on_previous is None else on_previous,
        on_noise=zeros,
        log_posterior=zeros,
        log_beta=zeros,
        span=zeros,
    )
