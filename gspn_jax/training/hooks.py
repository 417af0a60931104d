"""Hooks of a run beside its steps, every so many of them: logging, grids, saving, evaluation, profiling."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from PIL import Image

from gspn_jax.runs.saving import Checkpoints
from gspn_jax.training.guard import Guard
from gspn_jax.training.logs import RunLog
from gspn_jax.training.signals import Stop
from gspn_jax.training.state import TrainState
from gspn_jax.training.task import Evaluation
from gspn_jax.training.throughput import Throughput


@dataclasses.dataclass
class Run:
    """Position of a run: the loop moves it, hooks read it. `saved` is the step of its newest checkpoint, 0 for none."""

    step: int
    steps: int
    state: TrainState
    saved: int
    asked: str | None = None
    """The signal that asked it to stop."""

    @property
    def ending(self) -> bool:
        return self.step == self.steps or self.asked is not None


class Hook:
    """Called every `every` steps (0 is never) and, with `at_end`, after the last one of this process."""

    at_end = True

    def __init__(self, every: int):
        self.every = every

    def begin(self, run: Run) -> None:
        """Called before the first step."""

    def due(self, run: Run) -> bool:
        return bool(self.every) and (run.step % self.every == 0 or (self.at_end and run.ending))

    def __call__(self, run: Run) -> None:
        raise NotImplementedError

    def left_out(self, run: Run) -> bool:
        """Tells whether something of this step is still to be done by the command that goes on."""
        return False


class Log:
    """Logs the mean metrics of each window of steps: every `every` steps, and whenever a hook is due."""

    def __init__(self, every: int, hooks: Sequence[Hook], run_log: RunLog, meter: Throughput, guard: Guard):
        self.every = every
        self._hooks, self._run_log, self._meter, self._guard = hooks, run_log, meter, guard

    def due(self, run: Run) -> bool:
        return run.step % self.every == 0 or any(hook.due(run) for hook in self._hooks)

    def __call__(self, run: Run, window: Sequence[Mapping[str, np.ndarray]]) -> None:
        """`window`: the metrics of each step since the last call; those that are not finite are left out."""
        finite = [metrics for metrics in window if metrics["finite"]]
        means = {
            name: float(np.mean([metrics[name] for metrics in finite]))
            for name in window[0]
            if name != "finite" and finite
        }
        skipped = {"skipped": self._guard.skipped} if self._guard.skipped else {}
        self._run_log.metrics(run.step, means | self._meter.read() | skipped)


class Grid(Hook):
    """Logs the picture that a task draws of a state."""

    def __init__(self, every: int, draw: Callable[[TrainState], Image.Image], run_log: RunLog):
        super().__init__(every)
        self._draw, self._run_log = draw, run_log

    def __call__(self, run: Run) -> None:
        self._run_log.image(run.step, "samples", self._draw(run.state))


class Save(Hook):
    """Saves a checkpoint, also before an evaluation and for a snapshot, which are of a step that is saved."""

    def __init__(
        self, every: int, checkpoints: Checkpoints, guard: Guard, evaluate: Hook | None = None, snapshot_every: int = 0
    ):
        super().__init__(every)
        self._checkpoints, self._guard, self._evaluate = checkpoints, guard, evaluate
        self._snapshot_every = snapshot_every

    def due(self, run: Run) -> bool:
        snapshot = bool(self._snapshot_every) and run.step % self._snapshot_every == 0
        return super().due(run) or snapshot or (self._evaluate is not None and self._evaluate.due(run))

    def __call__(self, run: Run) -> None:
        self.save(run, run.step)

    def save(self, run: Run, step: int) -> None:
        """Saves the state as that of `step`, which may be one before those that changed nothing."""
        self._checkpoints.notes = self._guard.notes
        self._checkpoints.save(step, run.state)
        run.saved = step


class Evaluate(Hook):
    """Logs what a task's evaluation finds and notes the best step, whose checkpoint is kept.

    A signal stops an evaluation; the command that goes on begins with it.
    """

    def __init__(self, evaluation: Evaluation, checkpoints: Checkpoints, run_log: RunLog, stop: Stop):
        super().__init__(evaluation.every)
        self._evaluation, self._record = evaluation, checkpoints.evaluations
        self._run_log, self._stop = run_log, stop

    def begin(self, run: Run) -> None:
        if self.left_out(run):
            self(run)

    def due(self, run: Run) -> bool:
        return run.asked is None and super().due(run)

    def left_out(self, run: Run) -> bool:
        wanted = run.step % self.every == 0 or run.step == run.steps
        return run.step > 0 and wanted and self._record.record.step < run.step

    def __call__(self, run: Run) -> None:
        scores = self._evaluation(run.step, run.state, self._stop.asked)
        if scores is None:
            run.asked = self._evaluation.stopped_by
            return
        best = self._evaluation.best
        self._record.add(run.step, scores.get(best.score), higher=best.higher)
        self._run_log.metrics(run.step, {f"eval/{name}": value for name, value in scores.items()})
        shown = ", ".join(f"{name} {value:.5g}" for name, value in scores.items() if name != "seconds")
        kept = f" ({best.said}: kept)" if self._record.best_step == run.step else ""
        self._run_log.say(f"step {run.step}: {shown}{kept}")


class Profile(Hook):
    """Traces steps `first` to `last`, both included, into `folder`, for xprof and TensorBoard."""

    def __init__(self, first: int, last: int, folder: pathlib.Path):
        super().__init__(1)
        self._first, self._last, self._folder = first, last, folder
        self._tracing = False

    def begin(self, run: Run) -> None:
        self._start(run)

    def due(self, run: Run) -> bool:
        return run.step == self._first - 1 or (self._tracing and (run.step == self._last or run.ending))

    def __call__(self, run: Run) -> None:
        if self._tracing:
            jax.block_until_ready(run.state)
            jax.profiler.stop_trace()
            self._tracing = False
        self._start(run)

    def _start(self, run: Run) -> None:
        if run.step == self._first - 1 and not run.ending:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
