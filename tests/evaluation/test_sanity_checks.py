"""Each check passes on sound figures, and fails on a planted fault."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from se_vae.evaluation import sanity_checks

X = np.full((4, 2, 2, 1), 0.5, np.float32)
RADIUS = np.array([0.0, 0.1, 0.2, np.inf])
LINF = ('linf', (0.0, 1.0))


def moved():
  """Each image at the very edge of its ball; the last, which is robust, as it was."""
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
  misclassified = np.array([True, False, True, False])
  assert sanity_checks.rescoring(misclassified, misclassified, 0.75, 0.75).passed
  assert not sanity_checks.rescoring(misclassified, ~misclassified, 0.75, 0.75).passed
  assert not sanity_checks.rescoring(misclassified, misclassified, 0.75, 0.5).passed


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
  """Of four images, one is misclassified as it is, one within 0.1, one within 0.2 and one not."""
  radii, images = np.array([0.1, 0.2]), moved()
  wrong = np.array([True, True, True, False])
  accuracy = np.array([0.5, 0.25])
  interval = np.stack([accuracy - 0.1, accuracy + 0.1], axis=1)
  config = {'attacks': {}, 'norm': 'linf', 'bounds': [0, 1], 'seed': 0}

  def passed(images=images, wrong=wrong, accuracy=accuracy, interval=interval, count=4):
    figures = X, images, wrong, radii, accuracy, interval, count
    return sanity_checks.mean_of_minima(*figures, config).passed

  assert passed()
  # A minimum of means, in which attacks share the examples, is another number.
  assert not passed(accuracy=np.array([0.5, 0.5]))
  assert not passed(interval=interval + 0.2)
  assert not passed(count=5)
  assert not passed(wrong=~wrong)
  second = np.arange(4)[:, None, None, None] == 1
  assert passed(images=np.where(second, X + np.float32(0.05), images))
  assert not passed(images=np.where(second, X + np.float32(0.15), images))
  del config['seed']
  assert not passed()


def test_11_measures_l2():
  images = X + np.float32(0.05)  # a distance of 0.1 in l2
  accuracy = np.array([1.0, 0.0])
  interval = np.stack([accuracy, accuracy], axis=1)
  config = {'attacks': {}, 'norm': 'l2', 'bounds': [0, 1], 'seed': 0}
  figures = X, images, np.ones(4, bool), np.array([0.06, 0.1]), accuracy, interval, 4
  assert sanity_checks.mean_of_minima(*figures, config).passed
  assert not sanity_checks.mean_of_minima(*figures, config | {'norm': 'linf'}).passed


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
def test_12_informative(fault):
  sound = {
    'clean_accuracy': 0.9,
    'active_dimensions': 8.0,
    'latent_scale': 2.0,
    'squared_error': 10.0,
    'variance': 50.0,
  }
  assert sanity_checks.informative(sound, 0.12).passed
  assert sanity_checks.informative({name: sound[name] for name in list(sound)[:3]}, 0.12).passed
  assert not sanity_checks.informative(sound | fault, 0.12).passed


# ---------------------------------------------------------------------------------------------
# JSON values and summary
# ---------------------------------------------------------------------------------------------


def checks():
  return (
    sanity_checks.gradient_free(2, 1000),
    sanity_checks.gradient_free(30, 1000),
    sanity_checks.skipped(6, 'nothing to attack'),
  )


def test_json_round_trip():
  for check, passed in zip(checks(), (True, False, None), strict=True):
    content = json.loads(json.dumps(check.to_json()))
    assert list(content) == ['number', 'name', 'verdict', 'passed', 'figure', 'values']
    assert content['passed'] is passed is check.passed
    assert sanity_checks.SanityCheck.from_json(content) == check


def test_checks_of_older_files_have_passed_alone():
  old = {'number': 6, 'name': 'attack has converged', 'passed': False, 'figure': '5 of 200'}
  assert sanity_checks.SanityCheck.from_json(old).verdict == 'fail'
  assert sanity_checks.SanityCheck.from_json(old | {'passed': True}).verdict == 'pass'
  assert sanity_checks.summary([old]) == (
    'checks: 0 passed, 1 failed (6: attack has converged), 0 skipped'
  )
  with pytest.raises(ValueError, match='verdict must be'):
    sanity_checks.SanityCheck.from_json(old | {'verdict': 'perhaps'})


def test_the_summary_counts_verdicts_and_names_what_did_not_pass():
  expected = (
    'checks: 1 passed, 1 failed (7: Square does not beat gradients), '
    '1 skipped (6: attack has converged)'
  )
  assert sanity_checks.summary(checks()) == expected
  assert sanity_checks.summary([check.to_json() for check in checks()]) == expected
  assert sanity_checks.summary([]) == 'checks: not run'


def test_reading_checks_does_not_load_jax():
  code = (
    'import sys\nfrom se_vae.evaluation import sanity_checks\n'
    'sanity_checks.summary([])\nsys.exit("jax" in sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
