"""The Inception score as the ADM evaluator computes it, from logits that stream by."""

import numpy as np
import scipy.special
from jaxtyping import Float

SPLIT = 5000
"""Consecutive images a split; the last one may be smaller and counts the same."""


class InceptionScore:
    """Mean over the splits of exp(mean KL(p(y|x) || p(y))), in float64 (Salimans et al. 2016; ADM's splits).

    Images are taken in the order in which they come: samples sorted by class give a wrong score.
    """

    def __init__(self, split: int = SPLIT):
        self._split = split
        self._scores: list[float] = []
        self._start(0)

    def _start(self, classes: int) -> None:
        self._rows, self._negative_entropy, self._sum = 0, 0.0, np.zeros(classes)

    def add(self, logits: Float[np.ndarray, "N K"]) -> None:
        while len(logits):
            if not self._rows:
                self._start(logits.shape[1])
            part, logits = np.split(logits, [self._split - self._rows])
            log_p = scipy.special.log_softmax(part.astype(np.float64), axis=1)
            p = np.exp(log_p)
            self._negative_entropy += (p * log_p).sum()
            self._sum += p.sum(0)
            self._rows += len(part)
            if self._rows == self._split:
                self._scores.append(self._score())
                self._rows = 0

    def _score(self) -> float:
        # mean over x of sum_y p log p - sum_y p log q, with q the mean of p
        q = self._sum / self._rows
        return float(np.exp(self._negative_entropy / self._rows - scipy.special.xlogy(q, q).sum()))

    def score(self) -> float:
        """Raises ValueError before the first image."""
        if not self._rows and not self._scores:
            raise ValueError("the Inception score needs at least 1 image, found 0")
        return float(np.mean(self._scores + ([self._score()] if self._rows else [])))
