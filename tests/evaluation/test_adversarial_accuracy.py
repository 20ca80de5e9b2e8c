"""Adversarial accuracy against its closed form, its invariances, and what must raise."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from se_vae.evaluation import robustness
from se_vae.parallel import sharding

SHAPE = (2, 3, 1)
SEED = 4


def linear(x, weights, bias):
  return x.reshape(x.shape[0], -1) @ weights + bias[None]


def wavy(x, weights):
  """A classifier whose loss has many local maxima: no attack finds the best of them."""
  return jnp.sin(6.0 * x.reshape(x.shape[0], -1) @ weights)


def measure(logits_fn, x, labels, args, *, num_devices: int = 1, **options):
  mesh = sharding.data_mesh(num_devices)
  return robustness.adversarial_accuracy(
    logits_fn, x, labels, args=args, mesh=mesh, seed=SEED, **options
  )


@functools.cache
def linear_problem():
  """60 images at least 0.3 from the bounds, noisy labels, and two classes of weights."""
  rng = np.random.default_rng(0)
  x = rng.uniform(0.3, 0.7, size=(60, *SHAPE)).astype(np.float32)
  weights = rng.normal(size=(6, 2)).astype(np.float32)
  bias = -0.5 * weights.sum(axis=0)  # the boundary goes through the middle
  logits = x.reshape(60, 6) @ weights + bias
  labels = np.argmax(logits, axis=1) ^ (rng.uniform(size=60) < 0.1)
  return x, labels, (weights, bias)


# One step of a third of the radius: the random start decides, and so the keys do.
WEAK = dict(radii=(0.0, 0.02, 0.05, 0.1), num_steps=1, relative_step_size=0.3)


@functools.cache
def wavy_problem():
  """20 images, the classes that a wavy classifier gives them, and its weights."""
  rng = np.random.default_rng(3)
  x = rng.uniform(size=(20, *SHAPE)).astype(np.float32)
  weights = rng.normal(size=(6, 3)).astype(np.float32)
  return x, np.argmax(np.asarray(wavy(x, weights)), axis=1), (weights,)


@pytest.mark.parametrize(('norm', 'dual'), [('linf', 1), ('l2', 2)])
def test_two_linear_classes_are_robust_as_far_as_the_closed_form_says(norm, dual):
  """An example is misclassified where radius times dual norm of w_a - w_b exceeds its margin."""
  x, labels, (weights, bias) = linear_problem()
  radii = (0.0, 0.02, 0.05, 0.1, 0.2)
  logits = np.float64(x).reshape(60, 6) @ np.float64(weights) + np.float64(bias)
  margin = logits[np.arange(60), labels] - logits[np.arange(60), 1 - labels]
  reach = np.outer(radii, [np.linalg.norm(np.float64(weights[:, 0] - weights[:, 1]), dual)])
  distance = margin - reach
  assert np.abs(distance).min() > 1e-4  # no example is decided by float32's rounding
  # A step of one radius: in l2 each halves what the random start has across the gradient.
  actual = measure(
    linear,
    x,
    labels,
    (weights, bias),
    radii=radii,
    num_steps=20,
    relative_step_size=1.0,
    norm=norm,
  )
  np.testing.assert_array_equal(actual.correct, distance > 0.0)
  np.testing.assert_array_equal(actual.radii, radii)
  np.testing.assert_array_equal(actual.accuracy, (distance > 0.0).mean(axis=1))
  counts = actual.correct.sum(axis=1)
  assert np.all(np.diff(counts) < 0) and counts[0] < 60 and counts[-1] < 10


def test_radius_zero_is_the_clean_accuracy():
  x, labels, args = wavy_problem()
  labels = np.where(np.arange(20) < 6, (labels + 1) % 3, labels)
  actual = measure(wavy, x, labels, args, **WEAK)
  np.testing.assert_array_equal(actual.correct[0], np.arange(20) >= 6)
  assert actual.accuracy[0] == 0.7


def test_bounds_limit_the_attack():
  """On the upper bound, and with all to gain above it, no radius does anything."""
  x, labels = np.ones((4, *SHAPE), np.float32), np.zeros(4, np.int64)
  weights = np.stack([np.zeros(6), np.ones(6)], axis=1).astype(np.float32)
  args = (weights, np.float32([6.5, 0.0]))
  options = dict(radii=(0.0, 0.3), num_steps=5)
  assert measure(linear, x, labels, args, **options).correct.all()
  free = measure(linear, x, labels, args, bounds=(0.0, 2.0), **options)
  np.testing.assert_array_equal(free.accuracy, [1.0, 0.0])


def test_restarts_only_take_away():
  x, labels, args = wavy_problem()
  once = measure(wavy, x, labels, args, **WEAK).correct
  often = measure(wavy, x, labels, args, restarts=6, **WEAK).correct
  assert np.all(often <= once)
  assert np.all(often[1:].sum(axis=1) < once[1:].sum(axis=1))
  np.testing.assert_array_equal(once, measure(wavy, x, labels, args, **WEAK).correct)


@pytest.mark.long
@pytest.mark.parametrize(
  ('num_devices', 'batch_size'),
  [
    (1, 7),
    (4, 200),
    (None, 5),
    pytest.param(1, 3, marks=pytest.mark.slow),
    pytest.param(3, 4, marks=pytest.mark.slow),
  ],
)
def test_batches_and_devices_do_not_matter(num_devices, batch_size):
  """None stands for the default, all four devices."""
  x, labels, args = wavy_problem()
  whole = measure(wavy, x, labels, args, restarts=2, **WEAK)
  assert 0.2 < whole.accuracy[2] < 0.8
  actual = robustness.adversarial_accuracy(
    wavy,
    x,
    labels,
    args=args,
    seed=SEED,
    mesh=None if num_devices is None else sharding.data_mesh(num_devices),
    batch_size=batch_size,
    restarts=2,
    **WEAK,
  )
  np.testing.assert_array_equal(actual.correct, whole.correct)


def test_one_compilation_serves_all_radii_batches_and_restarts():
  traces = []

  def counting(x, *args):
    if x.shape[0] == 4:  # not the check of the shape of one image's logits
      traces.append(x.shape)
    return linear(x, *args)

  x, labels, args = linear_problem()
  options = dict(num_steps=2, batch_size=4)
  measure(counting, x[:4], labels[:4], args, radii=(0.1,), **options)
  first = len(traces)
  measure(counting, x, labels, args, radii=(0.0, 0.01, 0.2, 0.3), restarts=2, **options)
  assert len(traces) == first > 0


def test_progress_counts_radii_batch_by_batch():
  x, labels, args = wavy_problem()
  seen = []
  measure(wavy, x, labels, args, batch_size=7, progress=lambda *pair: seen.append(pair), **WEAK)
  assert seen == [*((done, 4) for done in range(4) for _ in range(3)), (4, 4)]


# ---------------------------------------------------------------------------------------------
# What must raise
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'x': np.zeros((0, *SHAPE), np.float32), 'labels': np.zeros(0, int)}, 'N >= 1'),
    ({'labels': np.zeros(3, int)}, r'x, labels: must be.*\(3,\)'),
    ({'labels': np.zeros((2, 1), int)}, 'x, labels: must be'),
    ({'radii': ()}, 'radii: must be finite and >= 0'),
    ({'radii': (0.1, -0.1)}, 'radii: must be finite and >= 0'),
    ({'radii': (0.1, np.nan)}, 'radii: must be finite and >= 0'),
    ({'radii': (np.inf,)}, 'radii: must be finite and >= 0'),
    ({'restarts': 0}, 'restarts: must be >= 1'),
    ({'restarts': 1.5}, 'restarts: must be an integer, got 1.5'),
    ({'x': np.full((2, *SHAPE), 1.01, np.float32)}, r'x: must lie in \(0.0, 1.0\)'),
    ({'x': np.full((2, *SHAPE), -0.01, np.float32)}, 'x: must lie in'),
    ({'x': np.full((2, *SHAPE), np.nan, np.float32)}, 'x: must lie in'),
    ({'labels': np.array([0, 2])}, r'labels: must lie in \[0, 2\), got \[0, 2\]'),
    ({'labels': np.array([-1, 1])}, r'labels: must lie in \[0, 2\), got \[-1, 1\]'),
    (
      {'logits_fn': lambda x, *_: np.ones((len(x), 1), np.float32)},
      r'K >= 2, got float32 \(2, 1\)',
    ),
    ({'logits_fn': lambda x, *_: np.ones(len(x), np.float32)}, r'\[B, K\].*got float32 \(2,\)'),
    ({'logits_fn': lambda x, *_: np.ones((1, len(x), 2), np.float32)}, r'\[B, K\].*\(1, 2, 2\)'),
    ({'logits_fn': lambda x, *_: np.ones((7, 2), np.float32)}, r'\[B, K\].*got float32 \(7, 2\)'),
    ({'num_steps': 0}, 'num_steps: must be >= 1'),
    ({'batch_size': 0}, 'batch_size: must be >= 1'),
    ({'norm': 'l1'}, 'norm: must be one of'),
    ({'x': np.zeros((2, *SHAPE), np.uint8)}, 'got uint8 and int64; se_vae.pixels makes floats of'),
  ],
)
def test_wrong_arguments_raise(change, message):
  x, labels, args = linear_problem()
  options = dict(logits_fn=linear, x=x[:2], labels=labels[:2], radii=(0.1,), num_steps=2)
  with pytest.raises(ValueError, match=message):
    measure(args=args, **options | change)


def broken_when_bright(x, bad, bright):
  """Logits of class 0, but not finite ones for images that are brighter than `bright`."""
  above = jnp.max(x, axis=(1, 2, 3)) > bright
  return jnp.where(above[:, None], bad, jnp.float32([1.0, 0.0])[None])


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_logits_that_are_not_finite_raise_for_clean_images_and_are_wrong_elsewhere(bad):
  x = np.stack([np.full(SHAPE, 0.2), np.full(SHAPE, 0.8)]).astype(np.float32)
  labels, options = np.zeros(2, int), dict(radii=(0.05,), num_steps=2)
  with pytest.raises(ValueError, match='logits_fn: must be finite'):
    measure(broken_when_bright, x, labels, (np.float32(bad), np.float32(0.7)), **options)
  # argmax of a row of NaN is class 0, which must not count as a correct answer.
  args = (np.float32(bad), np.float32(0.81))
  actual = measure(broken_when_bright, x, labels, args, **options)
  np.testing.assert_array_equal(actual.correct, [[True, False]])
