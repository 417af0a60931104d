"""Checkpoints by orbax: asynchronous, the latest and periodic ones kept, with the config and the data's fingerprint."""

import fcntl
import json
import logging
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from gspn_jax import models
from gspn_jax.config import Config, from_dict, to_dict
from gspn_jax.training import ema, sharding
from gspn_jax.training.state import TrainState

log = logging.getLogger(__name__)

FIXED = ("model", "data", "diffusion", "train.batch_size", "train.accumulate", "train.seed", "train.ema_decays")
FREE = ("model.remat", "model.backend", "data.path", "data.workers", "data.bad_images")
"""What a run cannot change when it goes on, and what of that it can all the same: its parameters and its stream of
batches must stay the same run's. The content of the data is compared by its fingerprint."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence for the user."""


def folder(run_dir: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(run_dir).absolute() / "checkpoints"


def steps(run_dir: str | pathlib.Path) -> list[int]:
    """The steps of the committed checkpoints of a run, ascending."""
    where = folder(run_dir)
    return sorted(int(p.name) for p in where.iterdir() if p.name.isdigit()) if where.is_dir() else []


def read_meta(run_dir: str | pathlib.Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """(step, {"config", "fingerprint", "class_names"}) of the latest checkpoint, or of the one asked for.

    Raises CheckpointError when there is none.
    """
    found = steps(run_dir)
    if not found:
        raise CheckpointError(f"no checkpoint in {folder(run_dir)}: expected a run directory written by train_dit.py")
    step = found[-1] if step is None else step
    if step not in found:
        raise CheckpointError(f"no checkpoint of step {step} in {folder(run_dir)}, found steps {found}")
    path = folder(run_dir) / str(step) / "meta" / "metadata"
    try:
        return step, json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} must be the JSON that was saved with the checkpoint, found {error}") from error


def read_config(run_dir: str | pathlib.Path, step: int | None = None) -> tuple[int, Config]:
    """(step, config) of the latest checkpoint, or of the one asked for. Raises CheckpointError, ConfigError."""
    step, meta = read_meta(run_dir, step)
    return step, from_dict(meta["config"])


def restore_params(run_dir: str | pathlib.Path, step: int, config: Config, mesh: Mesh, *,
                   ema_decay: float | None = None) -> Any:
    """The averaged parameters of a checkpoint, sharded over `mesh`; `ema_decay` None is the first of the config.

    A decay of 0 gives the parameters themselves. Raises CheckpointError for a decay that was not kept.
    """
    decays = config.train.ema_decays
    if ema_decay is not None and ema_decay not in (0.0, *decays):
        raise CheckpointError(f"the EMA decay must be one that the run kept ({', '.join(map(str, decays))}), or 0 for "
                              f"the parameters themselves, found {ema_decay}")
    decay = decays[0] if ema_decay is None else ema_decay
    item = "params" if decay == 0.0 and 0.0 not in decays else f"ema_{ema.name(decay)}"
    _, shapes = models.abstract(config)
    target = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
                          shapes, sharding.param_shardings(shapes, mesh))
    with ocp.CheckpointManager(folder(run_dir), item_names=(item,)) as manager:
        return manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(target)}))[item]


class Checkpoints:
    """The checkpoints of a run that trains; use it in a `with` statement, whose end waits for the last save.

    Raises CheckpointError when another process trains in the same run directory.
    """

    def __init__(self, config: Config, fingerprint: str, class_names: Sequence[str]):
        self._config, self._fingerprint = config, fingerprint
        self._meta = {"config": to_dict(config), "fingerprint": fingerprint, "class_names": list(class_names)}
        self._folder = folder(config.run_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder.parent / "lock").open("w")  # held until closed, however the process ends
        if jax.process_index() == 0:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._lock.close()
                raise CheckpointError(f"another process is training in {config.run_dir}: wait for it, or choose "
                                      "another run_dir") from error
            for left in self._folder.glob("*orbax-checkpoint-tmp*"):  # a save that was killed; orbax leaves it
                log.warning("removing the unfinished checkpoint %s", left)
                shutil.rmtree(left)
        policies = [checkpoint_managers.LatestN(2)]
        if config.train.keep_every:
            policies.append(checkpoint_managers.EveryNSteps(config.train.keep_every))
        averages = (f"ema_{ema.name(decay)}" for decay in config.train.ema_decays)
        self._manager = ocp.CheckpointManager(
            self._folder, item_names=("params", "opt_state", *averages, "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies)))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()
        self._lock.close()

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background; a step that is saved already is left alone."""
        if step in self._manager.all_steps():
            return
        items = _items(state)
        self._manager.save(step, args=ocp.args.Composite(
            **{name: ocp.args.StandardSave(item) for name, item in items.items()},
            meta=ocp.args.JsonSave(self._meta)), force=True)

    def restore(self, target: TrainState) -> tuple[int, TrainState] | None:
        """The latest checkpoint in the shapes and shardings of `target`; None when the run has none yet.

        Raises CheckpointError when the checkpoint belongs to another model, data set or stream of batches.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        self._check_same_run(step)
        items = _items(target)
        read = self._manager.restore(step, args=ocp.args.Composite(
            **{name: ocp.args.StandardRestore(item) for name, item in items.items()}))
        scalars = jax.jit(lambda: (jnp.asarray(step, jnp.int32), jnp.zeros((), jnp.bool_)),
                          out_shardings=(target.step.sharding, target.halted.sharding))()
        state = TrainState(step=scalars[0], params=read["params"], opt_state=read["opt_state"],
                           ema={name: read[f"ema_{name}"] for name in target.ema}, halted=scalars[1])
        return step, state

    def _check_same_run(self, step: int) -> None:
        _, meta = read_meta(self._config.run_dir, step)
        # through JSON, so that both sides are lists where one was a tuple
        saved, now = _flat(meta["config"]), _flat(json.loads(json.dumps(to_dict(self._config))))
        changes = {name: f"{name} {saved.get(name)!r}, found {now.get(name)!r}"
                   for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)}
        for name, change in changes.items():
            if name.startswith(FIXED) and name not in FREE:
                raise CheckpointError(f"the run in {self._config.run_dir} was started with {change}; "
                                      "choose another run_dir to start a new run")
        if changes:
            log.info("going on with other settings than before: was %s", "; was ".join(changes.values()))
        if meta["fingerprint"] != self._fingerprint:
            raise CheckpointError(f"the run in {self._config.run_dir} was started on data with fingerprint "
                                  f"{meta['fingerprint']}, found {self._fingerprint}: the data set has changed")


def _items(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state, by name: each average apart, so that sampling reads only one."""
    return {"params": state.params, "opt_state": state.opt_state} | {
        f"ema_{name}": average for name, average in state.ema.items()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 3}} -> {"train.steps": 3}."""
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
