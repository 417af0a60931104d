"""A training run, read top to bottom: the loop owns nothing but order."""

import logging
import pathlib
import signal
import threading
from typing import Any

import jax
import numpy as np

from gspn_jax import data, models
from gspn_jax.config import Config
from gspn_jax.data.images import grid
from gspn_jax.sampling import Sampler
from gspn_jax.training import ema, sharding
from gspn_jax.training.checkpoints import Checkpoints
from gspn_jax.training.logs import RunLog
from gspn_jax.training.state import abstract_state, create_state
from gspn_jax.training.step import make_step
from gspn_jax.training.throughput import Throughput, peak_flops

log = logging.getLogger(__name__)

GRID_PER_CLASS, GRID_CLASSES = 4, 10


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not finite; the message says at which step and what to try."""


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved; the same command goes on."""


def train(config: Config) -> pathlib.Path:
    """Runs `config` to its last step, from its latest checkpoint if there is one; returns the run directory.

    Raises ConfigError, DataError or CheckpointError before any device work, NonFiniteError at a bad step (nothing of
    which is applied), and Interrupted after SIGINT or SIGTERM.
    """
    # --- what can be wrong is found first
    models.resolve(config.model)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    source = data.make_source(config.data)
    first_host = jax.process_index() == 0
    run_dir = pathlib.Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)

    with Checkpoints(config, source.fingerprint, source.class_names) as checkpoints, _Stop() as stop:
        # --- state: the latest checkpoint, or born sharded
        restored = checkpoints.restore(abstract_state(config, mesh))
        first_step, state = restored or (0, create_state(config, mesh))

        # --- data and step
        batch_size = config.train.batch_size
        loader = data.make_loader(config.data, source, batch_size=batch_size, seed=config.train.seed,
                                  start_step=first_step, num_hosts=jax.process_count(), host=jax.process_index())
        train_step = make_step(config, mesh)
        sampler = Sampler(config, mesh) if config.train.sample_every else None

        # --- loop
        size = config.data.image_size
        flops = models.forward_flops(models.resolve(config.model), config.data.channels, size, size)
        peak = peak_flops(jax.devices()[0].device_kind)
        with (data.prefetch_to_device(loader, sharding.batch_sharding(mesh)) as batches,
              RunLog(run_dir, start_step=first_step, steps=config.train.steps, enabled=first_host) as run_log):
            run_log.say(_opening(config, mesh, source, first_step))
            meter = Throughput(flops, peak * jax.device_count() if peak else None)
            window: list[dict[str, jax.Array]] = []
            saved = first_step
            for step in range(first_step + 1, config.train.steps + 1):
                with meter.waiting():
                    batch = next(batches)
                if step == first_step + 1:
                    with meter.pause():  # compilation
                        state, metrics = jax.block_until_ready(train_step(state, batch))
                else:
                    with jax.transfer_guard("disallow"):
                        state, metrics = train_step(state, batch)
                    meter.add(batch_size)
                window.append(metrics)
                run_log.advance(step)

                asked = stop.asked
                last = step == config.train.steps or asked is not None
                saving = last or step % config.train.save_every == 0
                sampling = sampler and (last or step % config.train.sample_every == 0)
                if not (saving or sampling or step % config.train.log_every == 0):
                    continue
                values = jax.device_get(window)
                bad = next((i for i, v in enumerate(values) if not v["finite"]), None)
                if bad is not None:
                    good_step = step - len(values) + bad
                    if good_step > saved:
                        checkpoints.save(good_step, state)
                    raise NonFiniteError(_advice(good_step + 1, values[bad], config))
                run_log.metrics(step, {name: float(np.mean([v[name] for v in values]))
                                       for name in values[0] if name != "finite"} | meter.read())
                window = []
                with meter.pause():
                    if sampling:
                        run_log.image(step, "samples", sample_grid(sampler, state.ema, config, source.class_names))
                    if saving:
                        checkpoints.save(step, state)
                        saved = step
                if asked and step < config.train.steps:
                    raise Interrupted(f"stopped by {asked} and saved at step {step}; the same command goes on")
    return run_dir


def sample_grid(sampler: Sampler, averages: dict[str, Any], config: Config, class_names: tuple[str, ...]):
    """A labelled grid from the first EMA: the same classes and seeds at each call, so that grids can be compared."""
    count = min(GRID_CLASSES, config.data.num_classes)
    classes = np.linspace(0, config.data.num_classes - 1, count).astype(int)
    labels = np.repeat(classes, GRID_PER_CLASS)
    images = sampler(averages[ema.name(config.train.ema_decays[0])], labels, np.arange(len(labels)))
    return grid(images, [class_names[label] for label in labels], columns=GRID_PER_CLASS)


def _opening(config: Config, mesh, source, first_step: int) -> str:
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    start = f"going on from step {first_step}" if first_step else "starting"
    return (f"{config.model.preset} ({models.count_parameters(config) / 1e6:.1f}M parameters) on "
            f"{len(source):,} images of {config.data.num_classes} classes; {jax.device_count()} "
            f"{jax.devices()[0].device_kind} ({shape}); {start} in {config.run_dir}")


def _advice(step: int, metrics: dict[str, np.ndarray], config: Config) -> str:
    return (f"step {step} gave a loss of {metrics['loss']} and a gradient norm of {metrics['grad_norm']}; it was not "
            f"applied and the state of step {step - 1} is saved: try a lower optimizer.learning_rate (now "
            f"{config.optimizer.learning_rate:g}), a smaller optimizer.clip_norm (now {config.optimizer.clip_norm:g}), "
            "more optimizer.warmup_steps, or train.precision 'params=float32,compute=float32'")


class _Stop:
    """Notes SIGINT and SIGTERM, so that the loop can save before it stops; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():  # signals reach no other thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
