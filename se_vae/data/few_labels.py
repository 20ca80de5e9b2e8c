"""Few labels: which training examples count as labelled, the same ones for every encoder."""

from __future__ import annotations

import jax
import numpy as np

from se_vae import seeds
from se_vae.config import ArgumentError, check_counts

# Folded into the key, so that the draw is unrelated to batches, colours and whatever else a caller
# derives from `jax.random.key(seed)`.
_LABEL_DOMAIN = 0x6C61626C


def few_labels(
  labels: np.ndarray, num_classes: int, labels_per_class: int | None, *, seed: int
) -> np.ndarray:
  """Returns as many random training examples of each class as are asked for.

  They are the first of each class in one random permutation of all examples. So they depend on the
  seed and the labels alone, and those of a smaller `labels_per_class` are among them.

  Example:
    >>> labels = np.array([0, 1, 0, 1, 0, 1, 1])
    >>> rows = few_labels(labels, 2, 2, seed=0)
    >>> print(np.bincount(labels[rows]))
    [2 2]

  Args:
    labels: `[N]` integers in [0, num_classes).
    num_classes: the number K of classes.
    labels_per_class: M, at least 1; None for all examples.
    seed: in [0, 2**31).

  Returns:
    int64 `[K * M]`, or `[N]` for all: ascending rows of the training split.

  Raises:
    ArgumentError: if a class has fewer examples, or a number is out of range.
  """
  key = jax.random.fold_in(seeds.key_of(seed), _LABEL_DOMAIN)
  if labels_per_class is None:
    return np.arange(len(labels), dtype=np.int64)
  check_counts(labels_per_class=labels_per_class)
  counts = np.bincount(labels, minlength=num_classes)
  if labels_per_class > counts.min():
    raise ArgumentError(
      'labels_per_class',
      f'must be in [1, {counts.min()}], as class {counts.argmin()} has {counts.min()} training '
      f'examples; got {labels_per_class}',
    )
  order = np.asarray(jax.random.permutation(key, len(labels)), np.int64)
  classes = labels[order]
  drawn = [order[classes == k][:labels_per_class] for k in range(num_classes)]
  return np.sort(np.concatenate(drawn))
