"""Every prefix of a test set is a fair sample of it, of its digits, colours and pairs of both."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from se_vae import data
from se_vae.data import examples

_PREFIXES = (*range(30, 1000, 10), 2000, 5000)
# The chance that a fair order is called unfair, over all comparisons of this file: at most six
# test sets with three labellings each. All data are fixed, so the answer never changes.
_P_VALUE = 0.01 / (6 * 3 * len(_PREFIXES))


def smallest_p_value(labels: np.ndarray) -> float:
  """Returns the smallest p-value over prefixes of Pearson's chi-squared test of the label counts.

  The counts of a fair prefix of n of N are hypergeometric, for which the statistic times
  (N - 1) / (N - n) is chi-squared. Prefixes with less than 5 expected examples a class are left
  out, as the approximation does not hold there.
  """
  labels = np.unique(labels, return_inverse=True)[1]
  totals, total = np.bincount(labels), len(labels)
  p_values = []
  for n in (n for n in _PREFIXES if 5 * len(totals) <= n < total):
    expected = n * totals / total
    counts = np.bincount(labels[:n], minlength=len(totals))
    statistic = ((counts - expected) ** 2 / expected).sum() * (total - 1) / (total - n)
    p_values.append(stats.chi2.sf(statistic, len(totals) - 1))
  return min(p_values)


def assert_fair(split: data.Split) -> None:
  labellings = dict(split.labels)
  if 'color' in labellings:
    labellings['pair'] = labellings['digit'] * len(data.COLORS) + labellings['color']
  for task, labels in labellings.items():
    assert smallest_p_value(labels) > _P_VALUE, task


@pytest.mark.parametrize('validation', [False, True])
@pytest.mark.parametrize('name', ['mnist_5k', 'color_mnist_5k'])
def test_every_prefix_of_an_embedded_test_set_is_fair(name, validation):
  assert_fair(data.load(name, validation=validation).test)


@pytest.mark.long
@pytest.mark.parametrize('name', ['mnist', 'color_mnist'])
def test_every_prefix_of_mnist_is_fair(name, mnist_dir):
  assert_fair(data.load(name, data_dir=str(mnist_dir)).test)


def test_the_order_that_splits_is_not_fair(digits):
  order = examples.canonical_order(digits.test.images, digits.test.labels['digit'])
  assert smallest_p_value(digits.test.labels['digit'][order]) < _P_VALUE / 10


def test_the_order_does_not_depend_on_that_of_the_file():
  images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
  shuffled = images[np.random.default_rng(1).permutation(50)]
  np.testing.assert_array_equal(
    images[examples.sampling_order(images)], shuffled[examples.sampling_order(shuffled)]
  )
