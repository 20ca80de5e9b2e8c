"""Randomised smoothing: radii of a linear classifier, coverage of the interval, abstentions."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from se_vae import ArgumentError
from se_vae.evaluation import randomized_smoothing
from se_vae.evaluation.randomized_smoothing import smoothed_accuracy
from se_vae.parallel import sharding

COUNT, SIGMA = 60, 0.3
WEIGHTS = np.random.default_rng(0).normal(size=16).astype(np.float32)
X = np.random.default_rng(1).uniform(size=(COUNT, 4, 4, 1)).astype(np.float32)
RADII = (0.3, 0.0, 0.1, 1.0)


def linear(x, weights):
  """Two classes on either side of a plane through the middle of the pixel box."""
  margin = (x.reshape(len(x), -1) - 0.5) @ weights
  return jnp.stack([jnp.zeros_like(margin), margin], axis=1)


@functools.cache
def distances():
  """Signed l2 distance of each image from the plane, in float64."""
  weights = np.float64(WEIGHTS)
  return (np.float64(X).reshape(COUNT, -1) - 0.5) @ weights / np.linalg.norm(weights)


LABELS = (distances() > 0.0).astype(int)


def smoothed(**options):
  defaults = {'radii': RADII, 'sigma': SIGMA, 'num_estimation': 2000, 'args': (WEIGHTS,)}
  options = {**defaults, 'mesh': sharding.data_mesh(1), **options}
  return smoothed_accuracy(options.pop('logits_fn', linear), X, LABELS, **options)


@functools.cache
def honest():
  return smoothed()


def test_the_radius_of_a_linear_classifier_is_at_most_its_distance_and_close_to_it():
  """Smoothing does not move a plane, and Theorem 1 is exact for it."""
  result, exact = honest(), np.abs(distances())
  certain = result.predicted >= 0
  np.testing.assert_array_equal(result.predicted[certain], LABELS[certain])
  assert certain.mean() > 0.8 and not certain.all()
  # In expectation 0.06 of 60 radii are too large; with this seed none is.
  assert (result.radius <= exact).all()
  # The bound of 2,000 samples lies 3 to 4 standard errors of the share below it.
  share = stats.norm.cdf(exact / SIGMA)
  lowest = share - 6.5 * np.sqrt(share * (1.0 - share) / 2000.0) - 12.0 / 2000.0
  expected = SIGMA * stats.norm.ppf(np.maximum(lowest, 0.5))
  assert (result.radius >= expected - 1e-9).all()


def test_the_bound_is_from_other_samples_than_the_class():
  x, index = jnp.full((40, 4, 4, 1), 0.5, jnp.float32), jnp.arange(40, dtype=jnp.int32)
  chosen, counted = randomized_smoothing._counts(
    linear, (1, 1, 2), jax.random.key(0), x, index, jnp.float32(SIGMA), (WEIGHTS,)
  )
  # On the plane each class has half of the noise, so one sample agrees with another at random.
  differ = np.any(np.asarray(chosen) != np.asarray(counted), axis=1).sum()
  assert abs(differ - 20) < 4.0 * np.sqrt(40 * 0.25)


def test_every_sample_is_counted_once():
  x, index = jnp.asarray(X), jnp.arange(COUNT, dtype=jnp.int32)
  chosen, counted = randomized_smoothing._counts(
    linear, (7, 31, 2), jax.random.key(0), x, index, jnp.float32(SIGMA), (WEIGHTS,)
  )
  np.testing.assert_array_equal(np.sum(chosen, axis=1), 7)
  np.testing.assert_array_equal(np.sum(counted, axis=1), 31)


def test_what_always_has_one_class_has_the_largest_radius_of_1000_samples():
  """The documented 2.46 sigma, with the numbers that are not named."""
  always = lambda x: jnp.broadcast_to(jnp.float32([0.0, 1.0, 0.5]), (len(x), 3))  # noqa: E731
  result = smoothed_accuracy(always, X, LABELS, radii=(0.0, 2.46 * 0.5, 2.47 * 0.5), sigma=0.5)
  np.testing.assert_array_equal(result.predicted, 1)
  np.testing.assert_allclose(result.radius, 0.5 * stats.norm.ppf(0.001 ** (1.0 / 1000.0)))
  np.testing.assert_array_equal(result.curve.accuracy, [LABELS.mean(), LABELS.mean(), 0.0])
  # The radius itself is certified too.
  again = smoothed_accuracy(always, X, LABELS, radii=(result.radius[0],), sigma=0.5)
  assert again.curve.accuracy[0] == LABELS.mean()
  with pytest.raises(dataclasses.FrozenInstanceError):
    result.radius = None


def test_the_curve_counts_what_is_right_and_far_enough():
  result = honest()
  right = result.predicted == LABELS
  for radius, row in zip(RADII, result.curve.correct, strict=True):
    np.testing.assert_array_equal(row, right & (result.radius >= radius))
  assert 0.0 < result.curve.accuracy[0] < result.curve.accuracy[1]
  # All 2,000 samples of one class give the largest radius there is.
  most = SIGMA * stats.norm.ppf(0.001 ** (1.0 / 2000.0))
  assert result.radius.max() <= most + 1e-12 and result.curve.accuracy[3] == 0.0


def test_abstentions_are_counted_and_are_errors():
  result = honest()
  abstained = result.predicted == -1
  assert result.abstentions == abstained.sum() > 0
  assert not result.curve.correct[:, abstained].any() and not result.radius[abstained].any()
  assert np.abs(distances())[abstained].max() < np.median(np.abs(distances()))
  assert repr(result).endswith(f'{result.abstentions} abstentions)')


@pytest.mark.long
@pytest.mark.parametrize(('batch_size', 'devices'), [(7, 1), (60, 4)])
def test_batches_and_devices_do_not_matter(batch_size, devices):
  result = smoothed(batch_size=batch_size, mesh=sharding.data_mesh(devices))
  np.testing.assert_array_equal(result.predicted, honest().predicted)
  np.testing.assert_array_equal(result.radius, honest().radius)


def test_examples_seeds_and_samples_have_noise_of_their_own():
  same = smoothed_accuracy(
    linear,
    np.repeat(X[:1], 20, axis=0),
    np.repeat(LABELS[:1], 20),
    radii=(0.0,),
    sigma=2.0,
    num_selection=1,
    num_estimation=500,
    alpha=0.4,
    args=(WEIGHTS,),
  )
  assert len(np.unique(same.radius)) > 5
  assert (smoothed(seed=1).radius != honest().radius).any()


@pytest.mark.parametrize('alpha', [0.001, 0.05])
@pytest.mark.parametrize('num_samples', [1, 30, 500])
def test_the_bound_exceeds_the_probability_with_probability_alpha_at_most(alpha, num_samples):
  """Exactly: by the sum over all outcomes of the experiment."""
  outcomes = np.arange(num_samples + 1)
  bound = randomized_smoothing.lower_confidence_bound(outcomes, num_samples, alpha)
  assert bound[0] == 0.0 and (np.diff(bound) > 0.0).all()
  np.testing.assert_allclose(bound[-1], alpha ** (1.0 / num_samples))
  worst = 0.0
  for probability in (0.01, 0.3, 0.5, 0.77, 0.99, *(bound[1:] - 1e-9)):
    wrong = stats.binom.pmf(outcomes, num_samples, probability)[bound > probability].sum()
    worst = max(worst, wrong)
  assert 0.9 * alpha < worst <= alpha * (1.0 + 1e-6)


def test_an_image_whose_logits_are_not_finite_counts_nothing_and_others_do():
  def broken(x):
    logits = linear(x, WEIGHTS)
    bright = x.mean(axis=(1, 2, 3)) > 5.0
    return jnp.where(bright[:, None] & (logits == 0.0), jnp.nan, logits)

  x = jnp.concatenate([jnp.asarray(X[:20]), jnp.asarray(X[:20]) + 10.0])
  for counts in randomized_smoothing._counts(
    broken, (9, 9, 2), jax.random.key(0), x, jnp.arange(40), jnp.float32(0.1), ()
  ):
    np.testing.assert_array_equal(np.sum(counts, axis=1), [9] * 20 + [0] * 20)
    assert np.min(counts) == 0


def test_logits_that_are_not_finite_are_of_no_class():
  def broken(x, weights):
    logits = linear(x, weights)
    return jnp.where(jnp.abs(logits[:, 1:]) > 2.0, jnp.nan, logits)

  near = np.abs(distances()) * np.linalg.norm(WEIGHTS) < 1.9
  options = dict(sigma=10.0, radii=(0.0,), args=(WEIGHTS,), num_estimation=100)
  result = smoothed_accuracy(broken, X[near], LABELS[near], **options)
  assert near.any() and result.abstentions == near.sum()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'sigma': 0.0}, 'sigma: must be finite and > 0'),
    ({'sigma': np.inf}, 'sigma: must be finite and > 0'),
    ({'sigma': -0.1}, 'sigma: must be finite and > 0'),
    ({'sigma': np.nan}, 'sigma: must be finite and > 0'),
    ({'alpha': -0.1}, r'alpha: must be in \(0, 1\)'),
    ({'alpha': 1.1}, r'alpha: must be in \(0, 1\)'),
    ({'alpha': 0.0}, r'alpha: must be in \(0, 1\)'),
    ({'alpha': 1.0}, r'alpha: must be in \(0, 1\)'),
    ({'num_selection': 0}, 'num_selection: must be >= 1'),
    ({'num_estimation': 0}, 'num_estimation: must be >= 1'),
    ({'radii': (-1.0,)}, 'radii: must be finite'),
  ],
)
def test_wrong_arguments_are_named(change, message):
  with pytest.raises(ArgumentError, match=message):
    smoothed(**change)


@pytest.mark.parametrize('shift', [-0.5, 0.5])
def test_pixels_are_within_0_and_1_if_no_bounds_are_given(shift):
  with pytest.raises(ArgumentError, match='x: '):
    smoothed_accuracy(linear, X + np.float32(shift), LABELS, radii=(0.0,), sigma=0.1)


def test_bounds_of_the_pixels_and_batches_are_those_that_are_given():
  calls = []
  smoothed_accuracy(
    lambda x: jnp.stack([x[:, 0], 1.0 - x[:, 0]], axis=1),
    np.full((3, 1), 1.5, np.float32),
    np.zeros(3, int),
    radii=(0.0,),
    sigma=0.1,
    num_selection=2,
    num_estimation=2,
    bounds=(0.0, 2.0),
    batch_size=1,
    mesh=sharding.data_mesh(1),
    on_batch=lambda: calls.append(1),
  )
  assert len(calls) == 3
