"""Each check passes on sound figures, and fails on a planted fault."""

from __future__ import annotations

import numpy as np
import pytest

from se_vae.evaluation import sanity_checks

X = np.full((4, 2, 2, 1), 0.5, np.float32)
RADIUS = np.array([0.0, 0.1, 0.2, np.inf])
LINF = ('linf', (0.0, 1.0))


def moved():
  """Each image at the very edge of its ball; the last, which nothing broke, as it was."""
  offset = np.where(np.isfinite(RADIUS), RADIUS, 0.0).astype(np.float32)
  return X + offset[:, None, None, None]


def test_1_legality():
  assert sanity_checks.legality(X, moved(), RADIUS, *LINF).passed
  for row, pixel in ((1, 0.60001), (2, -0.01), (3, 0.51), (0, 0.500001)):
    images = moved()
    images[row, 0, 0, 0] = pixel
    assert not sanity_checks.legality(X, images, RADIUS, *LINF).passed
  l2 = sanity_checks.legality(X, X + 0.05, np.full(4, 0.1), 'l2', (0.0, 1.0))
  assert l2.passed
  assert not sanity_checks.legality(X, X + 0.051, np.full(4, 0.1), 'l2', (0.0, 1.0)).passed


def test_1_legality_of_what_is_not_a_number():
  images = moved()
  images[1, 0, 0, 0] = np.nan
  assert not sanity_checks.legality(X, images, RADIUS, *LINF).passed


def test_2_rescoring():
  broken = np.array([True, False, True, False])
  assert sanity_checks.rescoring(broken, broken, 0.75, 0.75).passed
  assert not sanity_checks.rescoring(broken, ~broken, 0.75, 0.75).passed
  assert not sanity_checks.rescoring(broken, broken, 0.75, 0.5).passed


def test_3_monotone():
  radii = np.array([0.0, 0.1, 0.2])
  interval = np.array([[0.8, 1.0], [0.4, 0.6], [0.4, 0.6]])
  assert sanity_checks.monotone(radii, np.array([0.9, 0.5, 0.55]), interval).passed
  assert not sanity_checks.monotone(radii, np.array([0.9, 0.5, 0.7]), interval).passed
  # Small rises add up.
  interval = np.array([[0.4, 0.6]] * 3)
  assert not sanity_checks.monotone(radii, np.array([0.5, 0.58, 0.65]), interval).passed


def test_4_large_radius():
  assert sanity_checks.large_radius([0.5, 0.75], [0.1, 0.0], 0.12).passed
  assert not sanity_checks.large_radius([0.5, 0.75], [0.2, 0.0], 0.12).passed
  assert not sanity_checks.large_radius([0.5, 1.0], [0.1, 0.1], 0.12).passed


def test_5_iterative():
  assert sanity_checks.iterative(np.array([0.9, 0.4]), np.array([0.9, 0.6]), 1000).passed
  assert not sanity_checks.iterative(np.array([0.9, 0.6]), np.array([0.9, 0.4]), 1000).passed


@pytest.mark.parametrize('more', [(5, 0), (0, 5)])
def test_6_converged(more):
  assert sanity_checks.converged(4, 4, 1000).passed
  assert not sanity_checks.converged(*more, 1000).passed
  assert sanity_checks.converged(1, 1, 20).passed  # one example is always allowed
  assert not sanity_checks.converged(2, 0, 20).passed


def test_7_gradient_free():
  assert sanity_checks.gradient_free(2, 1000).passed
  assert not sanity_checks.gradient_free(3, 1000).passed
  assert not sanity_checks.gradient_free(2, 100).passed


def test_8_weaker():
  accuracy, weak = np.array([0.9, 0.3]), np.array([0.9, 0.8])
  assert sanity_checks.weaker(accuracy, {'noise': weak}, 1000).passed
  result = sanity_checks.weaker(accuracy, {'noise': weak, 'transfer': np.array([0.9, 0.2])}, 1000)
  assert not result.passed and result.figure.startswith('transfer')


@pytest.mark.parametrize('kind', ['zero', 'NaN or Inf', 'tied', 'saturated'])
def test_9_gradients(kind):
  assert sanity_checks.healthy_gradients({'pgd': {kind: 0.005}, 'apgd': {kind: 0.0}}).passed
  assert not sanity_checks.healthy_gradients({'pgd': {kind: 0.005}, 'apgd': {kind: 0.02}}).passed


def test_10_deterministic():
  logits = np.random.default_rng(0).normal(size=(8, 3))
  assert sanity_checks.deterministic(logits, logits, logits * (1.0 + 1e-7)).passed
  assert not sanity_checks.deterministic(logits, logits + 1e-12, logits).passed
  assert not sanity_checks.deterministic(logits, logits, logits[::-1]).passed


def test_11_mean_of_minima():
  worst = np.array([[True, False, False, False], [True, True, True, False]])
  accuracy = np.array([0.75, 0.25])
  interval = np.stack([accuracy - 0.1, accuracy + 0.1], axis=1)
  config = {'attacks': {}, 'norm': 'linf', 'bounds': [0, 1], 'seed': 0}
  assert sanity_checks.mean_of_minima(accuracy, interval, worst, 4, config).passed
  # A minimum of means, which another attack may share out, is another number.
  means = np.array([0.75, 0.5])
  assert not sanity_checks.mean_of_minima(means, interval, worst, 4, config).passed
  assert not sanity_checks.mean_of_minima(accuracy, interval + 0.2, worst, 4, config).passed
  assert not sanity_checks.mean_of_minima(accuracy, interval, worst, 5, config).passed
  assert not sanity_checks.mean_of_minima(accuracy, interval, worst, 4, {'norm': 'linf'}).passed


@pytest.mark.parametrize(
  'fault',
  [
    {'clean_accuracy': 0.1},
    {'active_dimensions': 0.0},
    {'latent_scale': 1e-6},
    {'latent_scale': 1e6},
    {'squared_error': 60.0},
    {'squared_error': np.nan},
  ],
)
def test_12_alive(fault):
  sound = {
    'clean_accuracy': 0.9,
    'active_dimensions': 8.0,
    'latent_scale': 2.0,
    'squared_error': 10.0,
    'variance': 50.0,
  }
  assert sanity_checks.alive(sound, 0.12).passed
  assert sanity_checks.alive({name: sound[name] for name in list(sound)[:3]}, 0.12).passed
  assert not sanity_checks.alive(sound | fault, 0.12).passed
