"""Batches: every example once an epoch, from any step on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from se_vae import data
from se_vae.data import batches


@pytest.fixture
def no_cached_permutations() -> Iterator[None]:
  batches._permutation.cache_clear()
  yield
  batches._permutation.cache_clear()


@pytest.mark.parametrize(('num_examples', 'batch_size'), [(12, 4), (10, 3), (7, 7), (5, 1)])
def test_every_example_is_used_exactly_once_an_epoch(num_examples, batch_size):
  num_steps = 3 * num_examples  # so that `batch_size` times three whole epochs come out
  rows = data.batch_indices(3, 0, num_steps, batch_size, num_examples)
  assert rows.shape == (num_steps, batch_size)
  assert rows.dtype == np.int32
  epochs = rows.reshape(-1, num_examples)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num_examples), (len(epochs), 1)))


def test_epochs_differ():
  first, second = data.batch_indices(0, 0, 2, 1000, 1000)
  assert (first == second).mean() < 0.01  # one fixed point is expected


def test_any_step_can_be_resumed(no_cached_permutations):
  rows = data.batch_indices(1, 0, 40, 7, 30)
  for step in (39, 0, 17, 4):  # also backwards
    np.testing.assert_array_equal(data.batch_indices(1, step, 40 - step, 7, 30), rows[step:])
    batches._permutation.cache_clear()


def test_steps_a_call_do_not_matter():
  rows = data.batch_indices(1, 5, 24, 7, 30)
  for steps in (1, 2, 6, 24):
    calls = [data.batch_indices(1, 5 + k, steps, 7, 30) for k in range(0, 24, steps)]
    np.testing.assert_array_equal(np.concatenate(calls), rows)
  assert data.batch_indices(1, 5, 0, 7, 30).shape == (0, 7)


def test_streams_are_the_batches_of_their_seeds():
  streams = [data.batch_stream(seed, 7, 30) for seed in (1, 2)]
  for step in (0, 3, 40):
    for seed, stream in zip((1, 2), streams, strict=True):
      np.testing.assert_array_equal(stream(step, 5), data.batch_indices(seed, step, 5, 7, 30))


def test_streams_read_in_turns_draw_each_permutation_once(monkeypatch):
  """However many there are, also where each reads the end of an epoch and the next one."""
  drawn, draw = [], batches._fresh_permutation
  monkeypatch.setattr(
    batches, '_fresh_permutation', lambda *args: drawn.append(args) or draw(*args)
  )
  streams = [data.batch_stream(seed, 7, 30) for seed in range(6)]
  for step in range(0, 8, 2):
    for stream in streams:
      stream(step, 2)
  assert sorted(drawn) == [(seed, epoch, 30) for seed in range(6) for epoch in (0, 1)]


def test_seeds_differ():
  rows = [data.batch_indices(seed, 0, 1, 1000, 1000)[0] for seed in (0, 1, 2, 2**31 - 1)]
  for a, b in itertools.combinations(rows, 2):
    assert (a == b).mean() < 0.01


def test_batches_are_pinned():
  # A change here changes what every resumed run would see.
  np.testing.assert_array_equal(
    data.batch_indices(0, 100, 2, 4, 60_000),
    [[29353, 25355, 43507, 16839], [49151, 35855, 44046, 26340]],
  )


def test_callers_cannot_change_each_others_batches():
  rows = data.batch_indices(0, 0, 1, 10, 10)
  expected = rows.copy()
  rows[:] = 0
  np.testing.assert_array_equal(data.batch_indices(0, 0, 1, 10, 10), expected)


@pytest.mark.parametrize(
  'arguments',
  [
    {'batch_size': 11},
    {'batch_size': 0},
    {'step': -1},
    {'num_steps': -1},
    {'seed': -1},
    {'seed': 2**31},
    {'num_examples': 0},
  ],
)
def test_batch_arguments_must_be_in_range(arguments):
  valid = {'seed': 0, 'step': 0, 'num_steps': 1, 'batch_size': 5, 'num_examples': 10}
  with pytest.raises(ValueError, match='must'):
    data.batch_indices(**(valid | arguments))
