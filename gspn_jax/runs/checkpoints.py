"""Checkpoints of a run, found, verified and read; without training, and on any mesh.

Each carries a manifest (`runs.manifest`) that is verified before it is restored. What is not whole is passed over with
a line that says what is wrong with it.
"""

import logging
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from gspn_jax import models
from gspn_jax.config import C, Config, from_dict
from gspn_jax.parallel import sharding
from gspn_jax.runs import averages, manifest
from gspn_jax.small_files import DamagedFile, read_as

log = logging.getLogger(__name__)

_STEP = re.compile("0|[1-9][0-9]{0,17}")
"""The name of a checkpoint's folder."""


META = {"config": dict, "fingerprint": str, "class_names": list[str], "notes": dict | None, "latents": dict | None}
"""Notes that are saved beside the arrays, as JSON."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence for the user."""


def folder(run_dir: str | pathlib.Path) -> pathlib.Path:
    """The folder of the checkpoints, one folder a step."""
    return pathlib.Path(run_dir).absolute() / "checkpoints"


def steps(run_dir: str | pathlib.Path) -> list[int]:
    """The steps of the checkpoints of a run, ascending, whole or not."""
    return steps_in(folder(run_dir))


def steps_in(where: pathlib.Path) -> list[int]:
    """The steps that the folders in `where` are named by, ascending."""
    return sorted(int(p.name) for p in where.iterdir() if _STEP.fullmatch(p.name)) if where.is_dir() else []


def newest_whole(
    run_dir: str | pathlib.Path, wanted: Callable[[str], bool] = lambda item: True
) -> tuple[int, dict[int, str]] | None:
    """(the newest step whose files are those of its manifest, {newer step: what is wrong with it}).

    None for a run without checkpoints. Only the items that are `wanted` are verified. Logs a line for each step that
    is passed over; raises CheckpointError when none is whole.
    """
    found, wrong = steps(run_dir), {}
    for step in reversed(found):
        problem = manifest.problem(folder(run_dir) / str(step), wanted)
        if problem is None:
            return step, wrong
        log.error("the checkpoint of step %d in %s is not whole and is passed over: %s", step, folder(run_dir), problem)
        wrong[step] = problem
    if found:
        said = "; ".join(f"step {step}: {problem}" for step, problem in wrong.items())
        raise CheckpointError(
            f"{folder(run_dir)} must hold a whole checkpoint, found none ({said}): put back a copy, "
            "or choose another run_dir to start anew"
        )
    return None


def read_meta(run_dir: str | pathlib.Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """(step, values as `META` has them) of the checkpoint asked for, or of the newest one that can be sampled from (the
    state of the optimizer is not verified).

    Raises CheckpointError when there is none.
    """
    if step is None:
        newest = newest_whole(run_dir, lambda item: item != "opt_state")
        if newest is None:
            raise CheckpointError(
                f"no checkpoint in {folder(run_dir)}: expected a run directory written by train_dit.py"
            )
        step = newest[0]
    elif step not in steps(run_dir):
        raise CheckpointError(f"no checkpoint of step {step} in {folder(run_dir)}, found steps {steps(run_dir)}")
    else:
        _verify(run_dir, step, "meta")
    path = folder(run_dir) / str(step) / "meta" / "metadata"
    try:
        return step, read_as(path, META)
    except (OSError, DamagedFile) as error:
        raise CheckpointError(f"{path} must be what was saved with the checkpoint, but {error}") from error


def read_config(run_dir: str | pathlib.Path, step: int | None = None, cls: type[C] = Config) -> tuple[int, C]:
    """(step, config) of the checkpoint asked for, or of the newest whole one; `cls` is the config of the task wanted.

    Raises CheckpointError, and ConfigError as `config.from_dict`, also for the run of another task.
    """
    step, meta = read_meta(run_dir, step)
    return step, from_dict(meta["config"], cls)


def restore_params(
    run_dir: str | pathlib.Path, step: int, config: Config, mesh: Mesh, *, ema_decay: float | None = None
) -> Any:
    """The averaged parameters of a denoiser's checkpoint, as `restore_average` gives them."""
    shapes = models.abstract(config)[1]
    return restore_average(run_dir, step, config.train.ema_decays, shapes, mesh, ema_decay=ema_decay)


def restore_average(
    run_dir: str | pathlib.Path,
    step: int,
    decays: Sequence[float],
    shapes: Any,
    mesh: Mesh,
    *,
    ema_decay: float | None = None,
) -> Any:
    """One of the averages of `decays` that a run of any task kept, as `sharding.stored` on `mesh`; None is the first.

    `shapes` are those of the task's parameters. A decay of 0 gives the parameters themselves. Raises CheckpointError
    for a decay that was not kept, and for files that are not those that were saved.
    """
    check_decay(ema_decay, decays)
    decay = decays[0] if ema_decay is None else ema_decay
    where = folder(run_dir) / str(step)
    item = "params" if decay == 0.0 and 0.0 not in decays else stored_name(where, averages.item(decay))
    _verify(run_dir, step, item)
    return read_items(where, {item: sharding.stored(shapes, mesh)})[item]


def check_decay(found: float | None, decays: Sequence[float]) -> None:
    """Raises CheckpointError unless a decay is one of those that a run kept, 0 or None."""
    if found is not None and found not in (0.0, *decays):
        raise CheckpointError(
            f"the EMA decay must be one that the run kept ({', '.join(map(str, decays))}), or 0 for "
            f"the parameters themselves, found {found}"
        )


def stored_name(where: pathlib.Path, item: str) -> str:
    """The name under which a checkpoint has an item: averages had another one (`averages.old_item`)."""
    if (where / item).is_dir() or not averages.is_item(item):
        return item
    old = averages.old_item(item)
    return old if (where / old).is_dir() else item


def _verify(run_dir: str | pathlib.Path, step: int, item: str) -> None:
    """Raises CheckpointError unless the item's files are as they were saved; the first host looks for all."""
    if jax.process_index():
        return
    problem = manifest.problem(folder(run_dir) / str(step), lambda name: name == item)
    if problem:
        raise CheckpointError(
            f"the checkpoint of step {step} in {folder(run_dir)} must be as it was saved, but {problem}"
        )


def read_items(where: pathlib.Path, targets: dict[str, Any]) -> dict[str, Any]:
    """The items of a checkpoint in the shapes and shardings of `targets`; each device reads its own part.

    Not strict: meshes pad weights differently (`sharding.stored`), and orbax drops or adds zeros at the end of an axis.
    """
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            read = reader.restore(
                where,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(target, strict=False) for name, target in targets.items()}
                ),
            )
    except ValueError as error:  # in other words than ours, such as for a path that tensorstore cannot read
        raise CheckpointError(f"{where} cannot be read: {str(error).strip().splitlines()[0][:300]}") from error
    return {name: read[name] for name in targets}
