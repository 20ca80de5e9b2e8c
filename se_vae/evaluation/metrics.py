"""Accuracy against radius, with its interval."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class AdversarialAccuracy:
  """Which examples survive at which radius.

  Attributes:
    radii: `[R]`.
    correct: bool `[R, N]`: example n is classified correctly by every attempt at radius r.
  """

  radii: np.ndarray
  correct: np.ndarray

  @property
  def accuracy(self) -> np.ndarray:
    """Adversarial accuracy at each radius, `[R]`."""
    return self.correct.mean(axis=1)

  def interval(self, confidence: float = 0.95) -> np.ndarray:
    """Wilson score interval of each accuracy, `[R, 2]`."""
    from scipy.stats import binomtest

    count = self.correct.shape[1]
    intervals = [
      binomtest(int(row.sum()), count).proportion_ci(confidence, method='wilson')
      for row in self.correct
    ]
    return np.array([(interval.low, interval.high) for interval in intervals])
