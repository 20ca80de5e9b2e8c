"""Few labels: as many of each class, at random, nested, and the same for every encoder."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from se_vae import data
from se_vae.config import ArgumentError

LABELS = np.repeat(np.arange(3, dtype=np.int32), [20, 35, 500])
np.random.default_rng(0).shuffle(LABELS)


def test_each_class_has_as_many_as_asked_for_once_each():
  rows = data.few_labels(LABELS, 3, 7, seed=1)
  np.testing.assert_array_equal(np.bincount(LABELS[rows]), [7, 7, 7])
  assert len(np.unique(rows)) == 21 and np.all(np.diff(rows) > 0)


def test_fewer_are_among_more():
  drawn = [set(data.few_labels(LABELS, 3, count, seed=2)) for count in (1, 2, 10, 20)]
  assert all(few < more for few, more in itertools.pairwise(drawn))


def test_the_seed_alone_says_which():
  rows = data.few_labels(LABELS, 3, 10, seed=3)
  with jax.enable_x64(True):
    np.testing.assert_array_equal(data.few_labels(LABELS.astype(int), 3, 10, seed=3), rows)
  assert len(set(rows) & set(data.few_labels(LABELS, 3, 10, seed=4))) < 20


def test_each_example_is_as_likely_as_any_other():
  drawn = [data.few_labels(LABELS[:60], 3, 1, seed=seed) for seed in range(400)]
  counts = np.bincount(np.concatenate(drawn), minlength=60)
  for label in range(3):
    own = counts[LABELS[:60] == label]
    expected = 400 / len(own)
    # The statistic has about as many degrees of freedom as examples; five deviations above that.
    assert ((own - expected) ** 2 / expected).sum() < len(own) + 5 * np.sqrt(2 * len(own))


def test_all_examples_without_a_number():
  np.testing.assert_array_equal(data.few_labels(LABELS, 3, None, seed=0), np.arange(555))


def test_a_class_with_fewer_is_named():
  with pytest.raises(ArgumentError, match=r'labels_per_class: .*\[1, 20\], as class 0 has 20'):
    data.few_labels(LABELS, 3, 21, seed=0)
  with pytest.raises(ArgumentError, match='class 3 has 0'):
    data.few_labels(LABELS, 4, 1, seed=0)
  for count in (0, 1.5):
    with pytest.raises(ArgumentError, match='labels_per_class: must be'):
      data.few_labels(LABELS, 3, count, seed=0)
  with pytest.raises(ArgumentError, match=r'seed: must be an integer in .*, got -1'):
    data.few_labels(LABELS, 3, 1, seed=-1)
