"""Deterministic batches: which training examples belong to which step."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from se_vae import seeds

# Folded into the key, so that batches are unrelated to colours and to whatever else a caller
# derives from `jax.random.key(seed)`.
_BATCH_DOMAIN = 0x62617463


def batch_indices(
  seed: int, step: int, num_steps: int, batch_size: int, num_examples: int
) -> np.ndarray:
  """Returns the training examples of `num_steps` consecutive steps.

  The examples form one endless stream, in which every epoch is a fresh permutation: position
  p = step * batch_size + i holds permutation(seed, p // N)[p % N]. Each example is therefore used
  exactly once an epoch, batches may straddle epochs, and a resumed run needs only its step.

  Args:
    seed: in [0, 2**31).
    step: the first step, at least 0.
    num_steps: number of steps, at least 0.
    batch_size: examples a step, at least 1 and at most `num_examples`.
    num_examples: N, the size of the training split.

  Returns:
    int32 [num_steps, batch_size], values in [0, N); row k belongs to step `step + k`.

  Raises:
    ValueError: if an argument is out of range.
  """
  return _rows(_permutation, seed, step, num_steps, batch_size, num_examples)


def batch_stream(seed: int, batch_size: int, num_examples: int) -> Callable[[int, int], np.ndarray]:
  """Returns `batch_indices` as a function of the first step and the number of steps.

  It keeps its own last permutations, so that many streams can be read in turns.

  Args:
    seed: in [0, 2**31).
    batch_size: examples a step, at least 1 and at most `num_examples`.
    num_examples: N, the size of the training split.
  """
  own = functools.lru_cache(maxsize=2)(_fresh_permutation)

  def stream(step: int, num_steps: int) -> np.ndarray:
    return _rows(own, seed, step, num_steps, batch_size, num_examples)

  return stream


def _rows(
  permutation: Callable[[int, int, int], np.ndarray],
  seed: int,
  step: int,
  num_steps: int,
  batch_size: int,
  num_examples: int,
) -> np.ndarray:
  if step < 0 or num_steps < 0:
    raise ValueError(f'step and num_steps must not be negative, got {step} and {num_steps}')
  if not 1 <= batch_size <= num_examples:
    raise ValueError(f'batch_size must be in [1, {num_examples}], got {batch_size}')
  stream = np.arange(step * batch_size, (step + num_steps) * batch_size, dtype=np.int64)
  epochs, offsets = np.divmod(stream, num_examples)
  indices = np.empty(stream.shape, np.int32)
  for epoch in np.unique(epochs):
    in_epoch = epochs == epoch
    indices[in_epoch] = permutation(seed, int(epoch), num_examples)[offsets[in_epoch]]
  return indices.reshape(num_steps, batch_size)


def _fresh_permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  # JAX's generator rather than NumPy's, since NumPy does not promise the same stream in all
  # versions. It is named, so that JAX's configured default cannot change the batches.
  key = jax.random.fold_in(seeds.key_of(seed), _BATCH_DOMAIN)
  permutation = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
  return np.asarray(permutation, np.int32)


_permutation = functools.lru_cache(maxsize=4)(_fresh_permutation)
