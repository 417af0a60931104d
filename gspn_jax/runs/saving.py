"""The checkpoints of a run that trains, by orbax: asynchronous, the latest, periodic and best ones kept.

A run that has checkpoints never starts anew by itself.
"""

import concurrent.futures
import contextlib
import logging
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import jax
import orbax.checkpoint as ocp

from gspn_jax.config import ConfigError, RunConfig, from_dict, to_dict
from gspn_jax.files import ClaimedError, claim
from gspn_jax.parallel.agreement import agree, on_first_host
from gspn_jax.runs import averages, checkpoints, manifest, readback, same_run, snapshots
from gspn_jax.runs.checkpoints import CheckpointError, folder, newest_whole, steps
from gspn_jax.runs.evaluations import Evaluations
from gspn_jax.small_files import DamagedFile, read_as

log = logging.getLogger(__name__)

_KEEPS = {"config": {"train": {"keep_every": int}}}
"""Part of the config, as it is saved with a checkpoint, that says of keeping it."""
LATEST = 2
"""Checkpoints that are kept beside the periodic ones."""


class State(Protocol):
    """State of a run as it is saved: trees of arrays by name, each of which can be read alone."""

    def items(self) -> dict[str, Any]: ...

    def of_items(self, step: int, items: dict[str, Any]) -> Self:
        """The state at `step` with `items` read in the shapes and shardings of this one's."""


S = TypeVar("S", bound=State)


class Checkpoints:
    """The checkpoints of a run that trains; use it in a `with` statement, whose end waits for the last save.

    `latents` has the "scaling_factor" and "shift_factor" of what is trained on, without which it cannot be decoded.
    `notes` is a dict of JSON values that is saved with each checkpoint and comes back with `restore`. The best step of
    `evaluations` is kept beside the latest and the periodic ones; what was saved by a run with `train.keep_every` is
    kept whatever a later one says. The first save of a run is read back. Raises CheckpointError when another process
    trains in the same run directory.
    """

    def __init__(
        self,
        config: RunConfig,
        fingerprint: str,
        class_names: Sequence[str],
        latents: Mapping[str, float] | None = None,
    ):
        self._config, self._fingerprint = config, fingerprint
        self._meta = {"config": to_dict(config), "fingerprint": fingerprint, "class_names": list(class_names)}
        if latents:
            self._meta["latents"] = dict(latents)
        self.notes: dict[str, Any] = {}
        self.restored_config: RunConfig | None = None
        """The config of the checkpoint that `restore` gave."""
        self._folder = folder(config.run_dir)
        readback.check_path(config.run_dir, "run_dir")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._first_host = jax.process_index() == 0
        self._claim = contextlib.ExitStack()
        on_first_host(self._claim_run, CheckpointError, OSError)
        self._read_back = bool(agree(len(steps(config.run_dir))))
        self._promised: dict[int, bool] = {}
        self.evaluations = Evaluations(config.run_dir)
        self._saving = pathlib.Path()  # that of the step being saved
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._commit: concurrent.futures.Future | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            return  # another host may be gone, and without it no save ends
        try:
            self.wait()
        except CheckpointError as error:
            if kind is None:
                raise
            log.error("%s", error)  # what ended the run is raised already
        finally:
            self._pool.shutdown()
            self._writer.close()
            self._claim.close()

    def _claim_run(self) -> None:
        run = self._folder.parent
        try:
            self._claim.enter_context(claim(run, lock=run / "lock"))
        except ClaimedError as error:
            raise CheckpointError(
                f"another process is training in {self._config.run_dir}, {error.holder}: wait for it, or choose "
                "another run_dir"
            ) from error
        self._sweep()

    def save(self, step: int, state: State) -> None:
        """Copies the state to the host and writes it in the background; a step that is saved already is left alone.

        The first one of a run is waited for and read back. Raises CheckpointError when the save before this one failed,
        the disk has no room for this one, or the first one cannot be read.
        """
        self.wait()
        if step in steps(self._config.run_dir):
            return
        items = state.items()
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(items))
        free = shutil.disk_usage(self._folder).free
        if self._first_host and free < needed:
            raise CheckpointError(
                f"the checkpoint of step {step} needs {needed / 1e9:.2f} GB in {self._folder}, found "
                f"{free / 1e9:.2f} GB free; {self._last_whole()}"
            )
        self._saving = self._folder / str(step)
        failure = None
        try:
            if self._first_host:
                with tempfile.TemporaryFile(dir=self._folder):
                    pass  # a folder that cannot be written is found before orbax's threads find it, one by one
            self._writer.save(
                self._saving,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                    meta=ocp.args.JsonSave(self._meta | {"notes": self.notes}),
                ),
            )
        except (OSError, ValueError, RuntimeError) as error:
            failure = self._failure(error)
        if failure:
            raise failure
        self._commit = self._pool.submit(self._finish)
        if not self._read_back:
            self.wait()
            wrong = readback.difference(self._saving, items)
            if wrong:
                raise CheckpointError(f"the first checkpoint of the run, {self._saving}, cannot be read back: {wrong}")
            self._read_back = True

    def wait(self) -> None:
        """Until the last save is committed. Raises CheckpointError when it failed."""
        if self._commit is None:
            return
        error = self._commit.exception()
        self._commit = None
        if isinstance(error, (OSError, ValueError, RuntimeError)):
            raise self._failure(error)
        if error:
            raise error

    def check(self) -> None:
        """Raises CheckpointError when the last save has failed already; does not wait."""
        if self._commit is not None and self._commit.done():
            self.wait()

    def restore(self, target: S) -> tuple[int, S] | None:
        """The newest whole checkpoint in the shapes and shardings of `target`; None when the run has none yet.

        Newer ones that are not whole are moved to checkpoints/damaged. Raises CheckpointError when none is whole, and
        when the checkpoint belongs to another model, data set or stream of batches.
        """
        self.wait()
        start = time.perf_counter()
        step = self._agree_on_step()
        if step is None:
            readback.try_folder(self._folder)
            return None
        _, meta = checkpoints.read_meta(self._config.run_dir, step)
        self.notes = dict(meta.get("notes", {}))
        same_run.check_same_run(meta, self._config, self._fingerprint)
        self.restored_config = from_dict(meta["config"], type(self._config))
        verified = time.perf_counter()
        where, items = self._folder / str(step), target.items()
        stored = {name: checkpoints.stored_name(where, name) for name in items}
        missing = [name for name in items if not (where / stored[name]).is_dir()]
        widths = [f"{width:g}" for width in map(averages.width_of_item, missing) if width is not None]
        if widths and len(widths) == len(missing):
            raise CheckpointError(
                f"train.snapshot_every and train.ema_widths must be those that a run began with, found the widths "
                f"{' '.join(widths)}, which the checkpoint of step {step} in {self._folder} has no average of"
            )
        if missing:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._folder} must have {', '.join(items)} to "
                f"train on from it, and has no {', '.join(missing)}: weights that were imported can "
                "be sampled, evaluated and exported, and another run begins with them by --init-from"
            )
        read = checkpoints.read_items(where, {stored[name]: item for name, item in items.items()})
        state = jax.block_until_ready(target.of_items(step, {name: read[stored[name]] for name in items}))
        log.info(
            "restored step %d: %.2f GB verified in %.1f s and read in %.1f s",
            step,
            manifest.size(where) / 1e9,
            verified - start,
            time.perf_counter() - verified,
        )
        return step, state

    def _agree_on_step(self) -> int | None:
        """The newest step that the first host finds on its disk, on every host; None if it finds none."""
        none, failed = -1, -2
        step, failure = none, None
        if self._first_host:
            try:
                step = self._newest()
                snapshots.begin(self._config.run_dir, max(step, 0), self._config.train.snapshot_every)
            except (CheckpointError, ConfigError, OSError) as error:
                step, failure = failed, error
        step = agree(step)
        if failure:
            raise failure
        if step == failed:
            raise CheckpointError(f"the first host found no whole checkpoint in {self._folder}")
        return None if step == none else step

    def _newest(self) -> int:
        """The newest whole step, -1 for a run without checkpoints; moves newer ones aside."""
        found = newest_whole(self._config.run_dir)
        if found is None:
            return -1
        step, wrong = found
        for number in wrong:
            aside = self._folder / "damaged" / f"{number}-{time.time_ns()}"
            aside.parent.mkdir(exist_ok=True)
            os.replace(self._folder / str(number), aside)
            log.error("going back to step %d: the checkpoint of step %d is now in %s", step, number, aside)
        return step

    def _write_manifest(self) -> None:
        """Called by orbax on the first host when all hosts have written and nothing is committed yet."""
        (written,) = self._folder.glob(f"{self._saving.name}.orbax-checkpoint-tmp*")
        manifest.write(written, int(self._saving.name))

    def _finish(self) -> None:
        """In the background: after the commit its snapshot is made, and what is no longer kept is deleted."""
        self._writer.wait_until_finished()
        if self._first_host:
            every = self._config.train.snapshot_every
            if every and int(self._saving.name) % every == 0:
                snapshots.keep(self._config.run_dir, int(self._saving.name))
            for step in set(steps(self._config.run_dir)) - self._kept():
                going = self._folder / f"deleting-{step}"
                os.replace(self._folder / str(step), going)  # a kill leaves no half of a checkpoint under its name
                shutil.rmtree(going)

    def _kept(self) -> set[int]:
        found = steps(self._config.run_dir)
        return set(found[-LATEST:]) | self.evaluations.kept | {step for step in found if self._is_kept(step)}

    def _is_kept(self, step: int) -> bool:
        """Tells whether a checkpoint is kept for good: as this run says, or as the run said that saved it."""
        every = self._config.train.keep_every
        if step not in self._promised:
            self._promised[step] = _promised(self._folder / str(step), step)
        return bool(every and step % every == 0) or self._promised[step]

    def _sweep(self) -> None:
        """Removes what a killed save or deletion left: orbax does not."""
        for pattern in ("*orbax-checkpoint-tmp*", "deleting-*", readback.TRIAL):
            for left in self._folder.glob(pattern):
                log.warning("removing the unfinished checkpoint %s", left)
                shutil.rmtree(left, ignore_errors=True)  # a failed save may be writing still: swept at the next start

    def _failure(self, error: Exception) -> Exception:
        """The error to raise: JaxRuntimeError when hosts lost one another, CheckpointError for the disk's fault."""
        code = getattr(error, "errno", None) or next(iter(re.findall(r"os_error_code='(\d+)'", str(error))), None)
        said = os.strerror(int(code)) if code else f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        if not code and jax.process_count() > 1:
            return jax.errors.JaxRuntimeError(said)
        if self._first_host:
            self._sweep()
        return CheckpointError(
            f"the checkpoint of step {self._saving.name} could not be written ({said}); {self._last_whole()}"
        )

    def _last_whole(self) -> str:
        found = steps(self._config.run_dir)
        return (
            f"the last one is of step {found[-1]}, from which the same command goes on"
            if found
            else "the run has none yet"
        )


def _promised(where: pathlib.Path, step: int) -> bool:
    """Whether the config that was saved with a checkpoint keeps it for good; also when it cannot be read."""
    try:
        every = read_as(where / "meta" / "metadata", _KEEPS)["config"]["train"]["keep_every"]
    except (OSError, DamagedFile):
        return True
    return bool(every and step % every == 0)
