"""The loop of a run: owns the order of steps, verdicts and hooks, and nothing else."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax

from gspn_jax.parallel.agreement import on_every_host
from gspn_jax.parallel.memory import check_program
from gspn_jax.runs.checkpoints import CheckpointError
from gspn_jax.runs.saving import Checkpoints
from gspn_jax.training.batches import READ, Batches
from gspn_jax.training.guard import Guard, Verdict
from gspn_jax.training.hooks import Hook, Log, Run, Save
from gspn_jax.training.logs import RunLog
from gspn_jax.training.signals import Stop
from gspn_jax.training.state import TrainState
from gspn_jax.training.step import Step
from gspn_jax.training.task import Batch, Metrics
from gspn_jax.training.throughput import Throughput

logger = logging.getLogger(__name__)


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved; the same command goes on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """A step, and when a hook is due the guard's verdict, the log and the hooks in their order."""

    train_step: Step
    target: TrainState
    """The state's shapes and shardings, to restore it in."""
    frozen: tuple[Any, ...]
    """Values that a step reads beside state and batch (`Task.frozen`)."""
    batches: Batches
    batch_size: int
    seed: int
    guard: Guard
    checkpoints: Checkpoints
    stop: Stop
    meter: Throughput
    run_log: RunLog
    log: Log
    save: Save
    hooks: Sequence[Hook]
    """`save` among them."""

    def __call__(self, run: Run) -> None:
        """Moves `run` to its last step. Raises Interrupted after a signal, and what the guard or a save raises."""
        window: list[Metrics] = []
        first = run.step + 1
        with self.meter.pause():
            for hook in self.hooks:
                hook.begin(run)
        if run.asked:
            raise Interrupted(f"stopped by {run.asked} while evaluating step {run.step}; the same command goes on")
        while run.step < run.steps:
            try:
                with self.meter.waiting():
                    batch = next(self.batches)
            except Exception:  # of a thread or process that reads
                self._rescue(run, jax.device_get(window), run.step)
                raise
            if self.batches.failure:
                self.stop.ask()  # the other hosts learn of it when all have stopped
            with jax.profiler.StepTraceAnnotation("train", step_num=run.step + 1):
                window.append(self._step(run, batch, compiles=run.step + 1 == first))
            self.run_log.advance(run.step)
            run.asked = self.stop.asked()
            self.checkpoints.check()
            if not self.log.due(run):
                continue
            values, window = jax.device_get(window), []
            self._check_read(run, values)
            verdict = self.guard.judge(run.step, values, run.saved)
            if verdict.action == "stop":
                self._stop(run, verdict)
            if verdict.action == "roll back":
                with self.meter.pause():
                    self._roll_back(run, verdict)
                continue
            self.log(run, values)
            due = [hook for hook in self.hooks if hook.due(run)]
            with self.meter.pause():
                for hook in due:
                    hook(run)
            if run.asked and (run.step < run.steps or any(hook.left_out(run) for hook in self.hooks)):
                self.checkpoints.wait()
                raise Interrupted(f"stopped by {run.asked} and saved at step {run.step}; the same command goes on")

    def _step(self, run: Run, batch: Batch, *, compiles: bool) -> Metrics:
        run.step += 1
        if compiles:
            with self.meter.pause():
                self._check_memory(run.state, batch)
                run.state, metrics = jax.block_until_ready(self.train_step(run.state, batch, *self.frozen))
        else:
            with jax.transfer_guard("disallow"):
                run.state, metrics = self.train_step(run.state, batch, *self.frozen)
            self.meter.add(self.batch_size)
        return metrics

    def _check_memory(self, state: TrainState, batch: Batch) -> None:
        on_every_host(
            lambda: check_program(
                self.train_step,
                *(state, batch, *self.frozen),
                what=f"a step of {self.batch_size:,} images",
                advice="a smaller train.batch_size or model, more train.accumulate, or model.remat take less",
            )
        )

    def _check_read(self, run: Run, values: list[Metrics]) -> None:
        """Saves the step before one for which some host had no batch, and raises its error, on all hosts."""
        read = [bool(metrics.pop(READ, True)) for metrics in values]
        if all(read):
            return
        good = read.index(False)
        self._rescue(run, values[:good], run.step - len(values) + good)
        on_every_host(self._raise_failure)

    def _raise_failure(self) -> None:
        if self.batches.failure:
            raise self.batches.failure

    def _rescue(self, run: Run, values: list[Metrics], step: int) -> None:
        """Saves the last good step, `step` or one before it, when there is no batch to go on with. `values` are the
        metrics of the steps since the last log up to `step`."""
        if step == run.saved:
            return
        verdict = self.guard.judge(step, values, run.saved)
        good = verdict.good_step if verdict.action == "stop" else step
        if verdict.action == "roll back" or good is None or good <= run.saved:
            return
        try:
            self.save.save(run, good)
            self.checkpoints.wait()
        except CheckpointError as error:
            logger.error("%s", error)  # what ends the run is raised already
        else:
            logger.error("there is no batch for step %d: step %d is saved", step + 1, good)

    def _stop(self, run: Run, verdict: Verdict) -> None:
        """Raises the verdict's error, after saving a good step that is not saved yet."""
        if verdict.good_step is not None and verdict.good_step > run.saved:
            self.save.save(run, verdict.good_step)
        raise verdict.error

    def _roll_back(self, run: Run, verdict: Verdict) -> None:
        """To the newest checkpoint, and on with another order of the data."""
        spiked, run.state = run.step, None  # two states may not fit
        run.step, run.state = self.checkpoints.restore(self.target)
        run.saved = run.step
        self.guard.went_back(spiked, run.step, self.checkpoints.notes)
        self.batches.open(run.step, self.guard.data_seed(self.seed))
        self.run_log.rewind(run.step)
        self.checkpoints.evaluations.rewind(run.step)
        logger.warning(
            "the loss rose to %.4g before step %d: back to step %d, and on with another order of the data",
            verdict.loss,
            spiked,
            run.step,
        )
