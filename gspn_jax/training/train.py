"""A training run, read top to bottom: what it needs is built here; `loop` owns the order."""

import logging
import pathlib
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from gspn_jax import extras
from gspn_jax.config import Config, DistillConfig, RunConfig
from gspn_jax.data.source import Source
from gspn_jax.parallel import sharding
from gspn_jax.parallel.agreement import agree, on_every_host
from gspn_jax.parallel.memory import bytes_a_device, check_fits
from gspn_jax.runs import readback, same_hosts
from gspn_jax.runs.checkpoints import steps
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.training import hooks, muon, only, start
from gspn_jax.training.alignment import AlignmentTask
from gspn_jax.training.batches import Batches
from gspn_jax.training.diffusion import DiffusionTask
from gspn_jax.training.distillation import DistillationTask
from gspn_jax.training.given import Given
from gspn_jax.training.guard import Guard, advice
from gspn_jax.training.hooks import Run
from gspn_jax.training.logs import RunLog
from gspn_jax.training.loop import Loop
from gspn_jax.training.optimizer import jump
from gspn_jax.training.signals import Stop
from gspn_jax.training.state import TrainState, abstract_state, create_state
from gspn_jax.training.step import make_step
from gspn_jax.training.task import Task
from gspn_jax.training.throughput import Throughput, peak_flops
from gspn_jax.training.weights_and_biases import wandb_log

logger = logging.getLogger(__name__)


def train(config: Config) -> pathlib.Path:
    """Trains a diffusion model as `train_task` says, from a teacher where the config asks for one."""
    return train_task(diffusion_task(config))


def diffusion_task(config: Config) -> DiffusionTask:
    """The task of a config: to learn from images, beside their features too, or from a teacher. Raises ConfigError for
    settings that do not fit together."""
    if config.align.features is not None:
        return AlignmentTask(config)
    return DiffusionTask(config) if config.distill == DistillConfig() else DistillationTask(config)


def train_task(task: Task) -> pathlib.Path:
    """Runs a task to its last step, from its latest checkpoint if there is one; returns the run directory.

    Raises ConfigError, DataError or CheckpointError before any device work, CheckpointError when a checkpoint cannot be
    written, NonFiniteError at a bad step (nothing of which is applied), DivergedError when numbers go bad more often
    than `config.guard` allows, and Interrupted after SIGINT or SIGTERM.
    """
    # --- what can be wrong is found first
    config = task.config
    if config.log.wandb:
        extras.require("wandb", "wandb", by="--log.wandb")
    readback.check_path(config.run_dir, "run_dir")
    same_hosts.check(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config, mesh)
    target = abstract_state(task, mesh)
    source = on_every_host(lambda: _checked_source(task, target, mesh))
    same_hosts.check_data(source.fingerprint, source.class_names)
    evaluation = task.evaluation(mesh)
    begun = bool(agree(len(steps(config.run_dir))))
    if begun and config.init_from:
        logger.warning("%s has checkpoints and goes on from them: init_from is for a new run", config.run_dir)
    given = None if begun else on_every_host(task.given)
    origins = given and start.plan(given, task.shapes)
    frozen = task.frozen(mesh)
    run_dir = pathlib.Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)

    # a signal is noted until the last save is on the disk
    with (
        Stop() as stop,
        Checkpoints(config, source.fingerprint, source.class_names, _latents(source)) as checkpoints,
        wandb_log(config) as wandb,
    ):
        # --- state: the latest checkpoint, or born sharded
        first_step, state = checkpoints.restore(target) or (0, _first_state(task, mesh, given, origins))
        if first_step >= config.train.steps:
            logger.warning(
                "the run is at step %d, and train.steps is %d: nothing is left to train", first_step, config.train.steps
            )
        elif checkpoints.restored_config:
            said = jump(checkpoints.restored_config, config, first_step)
            if said:
                logger.warning("%s", said)
        checkpoints.evaluations.rewind(first_step)
        guard = Guard(config.guard, checkpoints.notes, advice=advice(config))

        with (
            RunLog(
                run_dir, start_step=first_step, steps=config.train.steps, enabled=jax.process_index() == 0, wandb=wandb
            ) as run_log,
            Batches(task, source, mesh) as batches,
        ):
            batches.open(first_step, guard.data_seed(config.train.seed))
            run_log.say(f"{task.describe(source)}; {_place(config, mesh, first_step)}")
            if config.optimizer.name == "muon":
                run_log.say(muon.describe(task.shapes))

            # --- hooks, in the order in which they are called
            evaluate = evaluation and hooks.Evaluate(evaluation, checkpoints, run_log, stop)
            save = hooks.Save(
                config.train.save_every, checkpoints, guard, evaluate, snapshot_every=config.train.snapshot_every
            )
            picture = task.picture(mesh, source.class_names) if config.train.sample_every else None
            grids = picture and hooks.Grid(config.train.sample_every, picture, run_log)
            bounds = config.profile.bounds
            profile = bounds and hooks.Profile(*bounds, run_dir / "profile")
            called = [hook for hook in (profile, grids, save, evaluate) if hook]

            # --- loop
            meter = _meter(task)
            loop = Loop(
                train_step=make_step(task, mesh, frozen),
                target=target,
                frozen=frozen,
                batches=batches,
                guard=guard,
                batch_size=config.train.batch_size,
                seed=config.train.seed,
                checkpoints=checkpoints,
                stop=stop,
                meter=meter,
                run_log=run_log,
                save=save,
                hooks=called,
                log=hooks.Log(config.train.log_every, called, run_log, meter, guard),
            )
            loop(Run(step=first_step, steps=config.train.steps, state=state, saved=first_step))
    return run_dir


def _first_state(task: Task, mesh: Mesh, given: Given | None, origins: Sequence[start.Line] | None) -> TrainState:
    """State of a new run: of what it is given, whose origin is printed and kept, or fresh."""
    if given is None or origins is None:
        return create_state(task, mesh)
    state = create_state(task, mesh, start.begin(task, given, origins, mesh))
    start.keep(task.config.run_dir, start.table(given, task.shapes, origins))
    return state


def _checked_source(task: Task, target: TrainState, mesh: Mesh) -> Source:
    """What is trained on. Raises ConfigError for a state, a gradient and a batch that a device cannot hold together."""
    train = task.config.train
    trained = only.trained(train, task.shapes)
    images = train.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"] * train.accumulate)
    check_fits(
        bytes_a_device(target) + bytes_a_device(only.part(target.params, trained)) + images * task.image_bytes(),
        mesh,
        f"the state of training and {images:,} images",
        "a smaller train.batch_size or model, more train.accumulate or mesh.fsdp take less",
    )
    return task.source()


def _latents(source: Source) -> dict[str, float]:
    """Scale and shift of the latents that are trained on; {} for images."""
    metadata = getattr(source, "metadata", None)
    names = ("scaling_factor", "shift_factor")
    return {name: getattr(metadata, name) for name in names if hasattr(metadata, name)}


def _meter(task: Task) -> Throughput:
    """Counts images a second, and operations of the model against the peak of all devices."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return Throughput(task.forward_flops(), peak * jax.device_count() if peak else None)


def _place(config: RunConfig, mesh: Mesh, first_step: int) -> str:
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    start = f"going on from step {first_step}" if first_step else "starting"
    return f"{jax.device_count()} {jax.devices()[0].device_kind} ({shape}); {start} in {config.run_dir}"
