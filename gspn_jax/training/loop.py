"""A training run, read top to bottom: the loop owns nothing but order."""

import contextlib
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gspn_jax import data, models
from gspn_jax.config import Config
from gspn_jax.data.images import grid
from gspn_jax.sampling import Sampler
from gspn_jax.training import ema, sharding
from gspn_jax.training.checkpoints import Checkpoints
from gspn_jax.training.evaluation import Evaluation, Record
from gspn_jax.training.logs import RunLog
from gspn_jax.training.signals import Stop
from gspn_jax.training.spikes import DivergedError, Guard
from gspn_jax.training.state import TrainState, abstract_state, create_state
from gspn_jax.training.step import make_step
from gspn_jax.training.throughput import Throughput, peak_flops

log = logging.getLogger(__name__)

GRID_PER_CLASS, GRID_CLASSES = 4, 10


class NonFiniteError(DivergedError):
    """The loss or the gradient is not finite; the message says at which step and what to try."""


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved; the same command goes on."""


def train(config: Config) -> pathlib.Path:
    """Runs `config` to its last step, from its latest checkpoint if there is one; returns the run directory.

    Raises ConfigError, DataError or CheckpointError before any device work, CheckpointError when a checkpoint cannot be
    written, NonFiniteError at a bad step (nothing of which is applied), DivergedError when numbers go bad more often
    than `config.guard` allows, and Interrupted after SIGINT or SIGTERM.
    """
    # --- what can be wrong is found first
    models.resolve(config.model)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    source = data.make_source(config.data)
    first_host = jax.process_index() == 0
    evaluation = Evaluation(config, mesh) if config.eval.every else None
    run_dir = pathlib.Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)

    # a signal is noted until the last save is on the disk
    with Stop() as stop, Checkpoints(config, source.fingerprint, source.class_names) as checkpoints:
        # --- state: the latest checkpoint, or born sharded
        target = abstract_state(config, mesh)
        restored = checkpoints.restore(target)
        first_step, state = restored or (0, create_state(config, mesh))
        _forget_evaluations(run_dir, first_step, evaluation, checkpoints)
        guard = Guard(config.guard, checkpoints.notes)

        # --- data and step
        batch_size = config.train.batch_size

        def open_batches(start_step: int) -> data.DevicePrefetcher:
            loader = data.make_loader(
                config.data, source, batch_size=batch_size, seed=guard.data_seed(config.train.seed),
                start_step=start_step, num_hosts=jax.process_count(), host=jax.process_index())
            return data.prefetch_to_device(loader, sharding.batch_sharding(mesh))

        train_step = make_step(config, mesh)
        sampler = Sampler(config, mesh) if config.train.sample_every else None

        # --- loop
        size = config.data.image_size
        flops = models.forward_flops(models.resolve(config.model), config.data.channels, size, size)
        peak = peak_flops(jax.devices()[0].device_kind)
        with (contextlib.ExitStack() as opened,
              RunLog(run_dir, start_step=first_step, steps=config.train.steps, enabled=first_host) as run_log):
            batches = opened.enter_context(open_batches(first_step))
            run_log.say(_opening(config, mesh, source, first_step))
            meter = Throughput(flops, peak * jax.device_count() if peak else None)
            window: list[dict[str, jax.Array]] = []
            saved = step = first_step
            if evaluation and evaluation.missed(first_step):
                with meter.pause():
                    _evaluate(evaluation, first_step, state, checkpoints, run_log, stop)
                if evaluation.stopped_by:
                    raise Interrupted(f"stopped by {evaluation.stopped_by} while evaluating step {first_step}; the "
                                      "same command goes on")
            while step < config.train.steps:
                step += 1
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

                asked = stop.asked()
                checkpoints.check()
                last = step == config.train.steps or asked is not None
                evaluating = evaluation and not asked and evaluation.due(step)
                saving = last or evaluating or step % config.train.save_every == 0
                sampling = sampler and (last or step % config.train.sample_every == 0)
                if not (saving or sampling or step % config.train.log_every == 0):
                    continue
                values = jax.device_get(window)
                finite = [v for v in values if v["finite"]]
                if len(finite) < len(values) and config.guard.nonfinite == "stop":
                    bad = next(i for i, v in enumerate(values) if not v["finite"])
                    good_step = step - len(values) + bad
                    if good_step > saved:
                        checkpoints.save(good_step, state)
                    raise NonFiniteError(_advice(good_step + 1, values[bad], config))
                guard.left_out(step, len(values) - len(finite))
                spike = guard.see(v["loss"] for v in finite)
                if config.guard.spike_factor:
                    spike = _of_first_host(spike)
                if spike is not None and saved:
                    with meter.pause():
                        state = None  # two states may not fit
                        back, state = checkpoints.restore(target)
                        guard.go_back(step, spike, back)
                        guard.recall(checkpoints.notes)
                        opened.close()
                        batches = opened.enter_context(open_batches(back))
                        run_log.rewind(back)
                        _forget_evaluations(run_dir, back, evaluation, checkpoints)
                    log.warning("the loss rose to %.4g before step %d: back to step %d, and on with another order of "
                                "the data", spike, step, back)
                    step, window = back, []
                    continue
                run_log.metrics(step, {name: float(np.mean([v[name] for v in finite]))
                                       for name in values[0] if name != "finite" and finite} | meter.read()
                                | ({"skipped": guard.skipped} if guard.skipped else {}))
                window = []
                checkpoints.notes = guard.notes
                with meter.pause():
                    if sampling:
                        run_log.image(step, "samples", sample_grid(sampler, state.ema, config, source.class_names))
                    if saving:
                        checkpoints.save(step, state)
                        saved = step
                    if evaluating:
                        _evaluate(evaluation, step, state, checkpoints, run_log, stop)
                        asked = evaluation.stopped_by
                if asked and (step < config.train.steps or (evaluation and evaluation.missed(step))):
                    checkpoints.wait()
                    raise Interrupted(f"stopped by {asked} and saved at step {step}; the same command goes on")
    return run_dir


def _of_first_host(spike: float | None) -> float | None:
    """The first host's judgement on all hosts: one that went back alone would wait for the others for ever."""
    if jax.process_count() == 1:
        return spike
    value = float(multihost_utils.broadcast_one_to_all(np.float32(np.nan if spike is None else spike)))
    return None if np.isnan(value) else value


def _forget_evaluations(run_dir: pathlib.Path, step: int, evaluation: Evaluation | None,
                        checkpoints: Checkpoints) -> None:
    """Of steps after `step`, from which the run goes on."""
    record = Record.rewind(run_dir, step)
    checkpoints.best_step = record.best_step
    if evaluation:
        evaluation.record = record


def _evaluate(evaluation: Evaluation, step: int, state: TrainState, checkpoints: Checkpoints, run_log: RunLog,
              stop: Stop) -> None:
    """Logs the metrics of `step`, which is saved, and keeps its checkpoint if it is the best. If a signal stops the
    evaluation, the run that goes on begins with it."""
    scores = evaluation(step, state, stop.asked)
    if scores is None:
        return
    run_log.metrics(step, {f"eval/{name}": value for name, value in scores.items()})
    checkpoints.best_step = evaluation.best_step
    shown = ", ".join(f"{name} {value:.5g}" for name, value in scores.items() if name != "seconds")
    run_log.say(f"step {step}: {shown}" + (" (the lowest FID: kept)" if evaluation.best_step == step else ""))


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
