"""Losses that go bad: steps that are left out are counted, and a loss that jumps sends the run back."""

import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np

from gspn_jax.config import GuardConfig

NORMAL_MAD = 0.6745
"""The median absolute deviation of a normal distribution of standard deviation 1."""


class DivergedError(RuntimeError):
    """Numbers went bad more often than the config allows; the message says where and what to try."""


class Guard:
    """What a run has seen of its losses. `notes` is saved with a checkpoint: a run that goes on, or back, judges the
    losses that follow as if it had never stopped."""

    def __init__(self, config: GuardConfig, notes: dict[str, Any]):
        self._config = config
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

    def see(self, losses: Iterable[float]) -> float | None:
        """The mean of the first `spike_steps` losses in a row that is a spike, None for none; others are remembered.

        A spike lies more than `spike_factor` standard deviations above the median of the `spike_window` losses before,
        both robust: sigma is the median absolute deviation / 0.6745. Half a window must have been seen.
        """
        if not self._config.spike_factor:
            return None
        window, count = self._config.spike_window, self._config.spike_steps
        for loss in losses:
            self._losses = [*self._losses, float(loss)][-(window + count):]
            before, last = self._losses[:-count], self._losses[-count:]
            if len(before) < window // 2:
                continue
            median = statistics.median(before)
            sigma = statistics.median(abs(value - median) for value in before) / NORMAL_MAD
            if np.mean(last) > median + self._config.spike_factor * sigma:
                return float(np.mean(last))
        return None

    def left_out(self, step: int, count: int) -> None:
        """Counts steps up to `step` that were not finite. Raises DivergedError beyond the limit."""
        self.skipped += count
        if self.skipped > self._config.nonfinite_limit:
            raise DivergedError(f"{self.skipped} steps up to step {step} were not finite and left out, more than "
                                f"guard.nonfinite_limit ({self._config.nonfinite_limit}) allows: try a lower "
                                "optimizer.learning_rate or train.precision 'params=float32,compute=float32'")

    def go_back(self, step: int, loss: float, to: int) -> None:
        """Notes that the spike found at `step` sends the run back to `to`. Raises DivergedError beyond the limit."""
        if len(self.rollbacks) >= self._config.max_rollbacks:
            raise DivergedError(f"the loss rose to {loss:.4g} before step {step} again after {len(self.rollbacks)} "
                                f"rollbacks, all that guard.max_rollbacks allows (the checkpoint of step {to} is "
                                "kept): try a lower optimizer.learning_rate, or a larger guard.spike_factor if the "
                                "loss is only noisy")
        self.rollbacks.append((step, to))
