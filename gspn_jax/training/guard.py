"""The guard of a run: judges the metrics of a window of steps and answers continue, roll back or stop."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gspn_jax.config import GuardConfig, RunConfig
from gspn_jax.parallel.agreement import agree

NORMAL_MAD = 0.6745
"""The median absolute deviation of a normal distribution of standard deviation 1."""


class DivergedError(RuntimeError):
    """Numbers went bad more often than the config allows; the message says where and what to try."""


class NonFiniteError(DivergedError):
    """The loss or the gradient is not finite; the message says at which step and what to try."""


class Verdict(NamedTuple):
    """Answer to a window. "stop" has the `error` to raise and, where the state is that of a good step, the step
    to save it as; "roll back" has the mean `loss` of the spike."""

    action: Literal["continue", "roll back", "stop"]
    error: DivergedError | None = None
    good_step: int | None = None
    loss: float | None = None


class Guard:
    """Judge of a run's losses. `notes` is saved with a checkpoint: a run that goes on, or back, judges the
    losses that follow as if it had never stopped."""

    def __init__(self, config: GuardConfig, notes: dict[str, Any], *, advice: str = ""):
        """`advice` ends the sentence about a step that is not finite."""
        self._config, self._advice = config, advice
        self.recall(notes)

    def recall(self, notes: dict[str, Any]) -> None:
        """The notes of a checkpoint; what this process knows of going back is never forgotten."""
        back = [tuple(pair) for pair in notes.get("rollbacks", [])]
        self.rollbacks: list[tuple[int, int]] = max(back, getattr(self, "rollbacks", []), key=len)
        self.skipped: int = notes.get("skipped", 0)
        self._losses: list[float] = list(notes.get("losses", []))

    @property
    def notes(self) -> dict[str, Any]:
        return {"rollbacks": [list(pair) for pair in self.rollbacks], "skipped": self.skipped, "losses": self._losses}

    def data_seed(self, seed: int) -> int:
        """Another order of the data after each rollback."""
        return (seed + 1_000_003 * len(self.rollbacks)) % 2**32 if self.rollbacks else seed

    def judge(self, step: int, window: Sequence[Mapping[str, np.ndarray]], saved: int) -> Verdict:
        """The verdict on the metrics of each step up to `step`; `saved` is the newest checkpoint's step, 0 for none.

        The same on all hosts, each of which must ask: a spike is one if the first host sees it.
        """
        finite = [metrics for metrics in window if metrics["finite"]]
        if len(finite) < len(window) and self._config.nonfinite == "stop":
            bad = next(i for i, metrics in enumerate(window) if not metrics["finite"])
            good_step = step - len(window) + bad
            return Verdict("stop", self._not_finite(good_step + 1, window[bad]), good_step)
        self.skipped += len(window) - len(finite)
        if self.skipped > self._config.nonfinite_limit:
            return Verdict(
                "stop",
                DivergedError(
                    f"{self.skipped} steps up to step {step} were not finite and left out, more than "
                    f"guard.nonfinite_limit ({self._config.nonfinite_limit}) allows: "
                    "try a lower optimizer.learning_rate or train.precision "
                    "'params=float32,compute=float32'"
                ),
            )
        if not self._config.spike_factor:
            return Verdict("continue")
        seen = self.see(metrics["loss"] for metrics in finite)
        loss = agree(float("nan") if seen is None else seen)
        if np.isnan(loss) or not saved:
            return Verdict("continue")
        if len(self.rollbacks) >= self._config.max_rollbacks:
            return Verdict(
                "stop",
                DivergedError(
                    f"the loss rose to {loss:.4g} before step {step} again after {len(self.rollbacks)} rollbacks, "
                    f"all that guard.max_rollbacks allows (the checkpoint of step {saved} is kept): try a lower "
                    "optimizer.learning_rate, or a larger guard.spike_factor if the loss is only noisy"
                ),
            )
        return Verdict("roll back", loss=loss)

    def see(self, losses: Iterable[float]) -> float | None:
        """The mean of the first `spike_steps` losses in a row that is a spike, None for none; others are remembered.

        A spike lies more than `spike_factor` standard deviations above the median of the `spike_window` losses before,
        both robust: sigma is the median absolute deviation / 0.6745. Half a window must have been seen.
        """
        if not self._config.spike_factor:
            return None
        window, count = self._config.spike_window, self._config.spike_steps
        for loss in losses:
            self._losses = [*self._losses, float(loss)][-(window + count) :]
            before, last = self._losses[:-count], self._losses[-count:]
            if len(before) < window // 2:
                continue
            median = statistics.median(before)
            sigma = statistics.median(abs(value - median) for value in before) / NORMAL_MAD
            if np.mean(last) > median + self._config.spike_factor * sigma:
                return float(np.mean(last))
        return None

    def went_back(self, step: int, to: int, notes: dict[str, Any]) -> None:
        """Notes that the run is back from `step` at `to`, whose checkpoint has these notes."""
        self.rollbacks.append((step, to))
        self.recall(notes)

    def _not_finite(self, step: int, metrics: Mapping[str, np.ndarray]) -> NonFiniteError:
        return NonFiniteError(
            f"step {step} gave a loss of {metrics['loss']} and a gradient norm of {metrics['grad_norm']}; it was not "
            f"applied and the state of step {step - 1} is saved: try {self._advice}"
        )


def advice(config: RunConfig) -> str:
    """Advice for a step that is not finite."""
    optimizer = config.optimizer
    return (
        f"a lower optimizer.learning_rate (now {optimizer.learning_rate:g}), a smaller optimizer.clip_norm (now "
        f"{optimizer.clip_norm:g}), more optimizer.warmup_steps, or train.precision "
        "'params=float32,compute=float32'"
    )
