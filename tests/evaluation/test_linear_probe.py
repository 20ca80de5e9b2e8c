"""Probes against a general-purpose optimiser on the written objective, and what must raise."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from se_vae import make_vae, wasserstein
from se_vae.evaluation import linear_probe
from se_vae.parallel import sharding
from tests.evaluation.small_model import SHAPE, model_and_params


def clusters(num_classes: int, count: int = 150, scales=(1.0, 30.0, 0.02)):
  """Overlapping clusters of encodings `[N, 3]`, float32, on unlike scales, and labels."""
  rng = np.random.default_rng(0)
  labels = np.arange(count) % num_classes
  centers = rng.normal(size=(num_classes, 3))
  means = centers[labels] + rng.normal(size=(count, 3))
  return ((means + np.array([0.0, 3.0, -25.0])) * scales).astype(np.float32), labels


def logits_of(probe, means) -> np.ndarray:
  """In float64, with the mean over classes taken out: adding a constant changes nothing."""
  logits = np.float64(means) @ np.float64(probe.weights) + np.float64(probe.bias)
  return logits - logits.mean(axis=1, keepdims=True)


def optimal_logits(means, labels, num_classes: int, l2: float) -> np.ndarray:
  """At the minimum of the sum of cross-entropies and l2 / 2 ||W||^2."""
  one_hot = np.eye(num_classes)[labels]
  dim = means.shape[1]

  def logits_at(flat):
    weights, bias = flat[: dim * num_classes].reshape(dim, num_classes), flat[-num_classes:]
    return weights, means @ weights + bias

  def objective(flat):
    weights, logits = logits_at(flat)
    log_prob = scipy.special.log_softmax(logits, axis=1)
    error = np.exp(log_prob) - one_hot
    value = -np.sum(one_hot * log_prob) + 0.5 * l2 * np.sum(weights**2)
    return value, np.concatenate([(means.T @ error + l2 * weights).ravel(), error.sum(axis=0)])

  start = np.zeros((dim + 1) * num_classes)
  found = scipy.optimize.minimize(
    objective, start, jac=True, method='BFGS', options={'gtol': 1e-7, 'maxiter': 2000}
  )
  assert np.abs(objective(found.x)[1]).max() < 1e-5
  logits = logits_at(found.x)[1]
  return logits - logits.mean(axis=1, keepdims=True)


@pytest.mark.parametrize('standardize', [False, True])
@pytest.mark.parametrize('l2', [0.1, 20.0])
@pytest.mark.parametrize('num_classes', [2, 3, 5])
def test_probe_minimises_the_penalised_cross_entropy(num_classes, l2, standardize):
  scales = (1.0, 30.0, 0.02) if standardize else (1.0, 3.0, 0.2)
  means, labels = clusters(num_classes, scales=scales)
  probe = linear_probe.fit_probe(means, labels, num_classes, l2=l2, standardize=standardize)
  assert probe.weights.shape == (3, num_classes) and probe.bias.shape == (num_classes,)
  inputs = np.float64(means) - np.float64(means).mean(axis=0)  # the bias is free: no change
  if standardize:
    inputs = inputs / inputs.std(axis=0)
  expected = optimal_logits(inputs, labels, num_classes, l2)
  assert np.abs(expected).max() > 0.5
  # L-BFGS stops at a gradient of 1e-6 an example: an error of 6e-5 in the worst case here.
  np.testing.assert_allclose(logits_of(probe, means), expected, atol=1e-4)
  # What the probe computes in float32 is what it was fitted to be.
  actual = np.asarray(probe.logits(jnp.asarray(means)))
  actual = actual - actual.mean(axis=1, keepdims=True)
  np.testing.assert_allclose(actual, expected, atol=1e-4)


def logits_after(means, labels, change, standardize: bool):
  """The logits of a probe that was fitted to changed means, at them."""
  changed = change(np.float64(means)).astype(np.float32)
  probe = linear_probe.fit_probe(changed, labels, 4, standardize=standardize)
  return logits_of(probe, changed)


def test_standardised_probe_does_not_see_the_scale():
  means, labels = clusters(4)
  change = lambda m: m * [-4.0, 0.01, 300.0] + [2.0, 0.0, -50.0]  # noqa: E731
  before, after = (logits_after(means, labels, f, True) for f in (np.copy, change))
  # Rounding of the rescaled means to float32, and two stops of L-BFGS.
  np.testing.assert_allclose(after, before, atol=2e-3)


def test_plain_probe_sees_the_scale_but_not_the_origin():
  """The penalty is on weights in the prior's units: a faint latent stays faint."""
  means, labels = clusters(4, scales=(1.0, 1.0, 1.0))
  move, shrink = (lambda m: m + np.array([2.0, -1.0, 5.0])), (lambda m: m * 0.01)
  before, moved, shrunk = (logits_after(means, labels, f, False) for f in (np.copy, move, shrink))
  np.testing.assert_allclose(moved, before, atol=1e-3)
  assert np.abs(shrunk).max() < 0.1 * np.abs(before).max()


@pytest.mark.parametrize('value', [0.0, 0.1, -3e7])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_constant_latents_change_nothing(value, dtype):
  """0.1 has no exact mean in float64: what is left over must not be blown up to variance one."""
  means, labels = clusters(3)
  extended = np.concatenate([means.astype(dtype), np.full((len(means), 1), value, dtype)], axis=1)
  if dtype == np.float64 and value == 0.1:
    assert 0.0 < extended.std(axis=0)[3] < 1e-12
  probe = linear_probe.fit_probe(extended, labels, 3, standardize=True)
  plain = linear_probe.fit_probe(means, labels, 3, standardize=True)
  np.testing.assert_allclose(probe.weights[:3], plain.weights, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(probe.weights[3], 0.0, atol=1e-12)
  np.testing.assert_allclose(logits_of(probe, extended), logits_of(plain, means), atol=1e-3)


def test_accuracy_is_the_share_of_largest_logits():
  means, labels = clusters(3)
  probe = linear_probe.fit_probe(means, labels, 3, standardize=True)
  expected = np.mean(logits_of(probe, means).argmax(axis=1) == labels)
  assert linear_probe.accuracy(probe, means, labels) == expected
  assert 0.5 < expected < 1.0
  # One example, put on the side of class 1 by hand.
  probe = linear_probe.LinearProbe(np.float32([[0.0, 1.0]]), np.float32([0.5, 0.0]))
  assert (
    linear_probe.accuracy(probe, np.float32([[2.0], [0.2], [0.6]]), np.array([1, 1, 1])) == 2 / 3
  )


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_means_that_are_not_finite_raise(bad):
  means, labels = clusters(3)
  means[7, 1] = bad
  with pytest.raises(ValueError, match='means: must be finite'):
    linear_probe.fit_probe(means, labels, 3)


@pytest.mark.parametrize('num_classes', [2, 4])
def test_class_without_examples_raises(num_classes):
  means, labels = clusters(num_classes)
  kept = labels != 1
  with pytest.raises(ValueError, match=r'labels: no training example of class 1$'):
    linear_probe.fit_probe(means[kept], labels[kept], num_classes)


@pytest.mark.parametrize('bad', [-1, 3])
def test_labels_out_of_range_raise(bad):
  means, labels = clusters(3)
  labels = labels.copy()
  labels[0] = bad
  with pytest.raises(ValueError, match=rf'labels: must lie in \[0, 3\), got \[{bad}\]'):
    linear_probe.fit_probe(means, labels, 3)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'means': np.zeros(6)}, r'means, labels: must be floats \[N, D\] and integers \[N\]'),
    ({'means': np.zeros((6, 0))}, 'means, labels: must be floats'),
    ({'means': np.zeros((6, 3, 1))}, 'means, labels: must be floats'),
    ({'means': np.zeros((6, 3), int)}, 'means, labels: must be floats'),
    ({'labels': np.zeros(5, int)}, 'means, labels: must be floats'),
    ({'labels': np.zeros(7, int)}, 'means, labels: must be floats'),
    ({'labels': np.zeros(6)}, 'means, labels: must be floats'),
    ({'num_classes': 1}, 'num_classes: must be >= 2'),
    ({'l2': 0.0}, 'l2: must be finite and > 0'),
    ({'l2': -1.0}, 'l2: must be finite and > 0'),
    ({'l2': np.nan}, 'l2: must be finite and > 0'),
    ({'l2': np.inf}, 'l2: must be finite and > 0'),
    ({'l2': None}, 'l2: must be finite and > 0, got None'),
    ({'num_classes': None}, 'num_classes: must be an integer, got None'),
    ({'max_iter': 2.5}, 'max_iter: must be an integer, got 2.5'),
  ],
)
def test_wrong_arguments_raise(change, message):
  good = {'means': np.zeros((6, 3)), 'labels': np.arange(6) % 2, 'num_classes': 2}
  with pytest.raises(ValueError, match=message):
    linear_probe.fit_probe(**{**good, **change})


def test_the_penalty_is_1_and_nothing_is_standardised_unless_said():
  means, labels = clusters(3)
  default = linear_probe.fit_probe(means, labels, 3)
  named = linear_probe.fit_probe(means, labels, 3, l2=1.0, standardize=False)
  np.testing.assert_array_equal(default.weights, named.weights)
  np.testing.assert_array_equal(default.bias, named.bias)


@pytest.mark.parametrize('shape', [(3,), (5, 2), (5, 4), (5, 3, 1)])
def test_means_of_another_shape_have_no_logits(shape):
  probe = linear_probe.LinearProbe(jnp.eye(3), jnp.zeros(3))
  with pytest.raises(AssertionError, match=r'mean must be \[B, 3\]'):
    probe.logits(jnp.zeros(shape))


def test_a_probe_is_a_pytree():
  probe = linear_probe.LinearProbe(jnp.ones((3, 2)), jnp.zeros(2))
  doubled = jax.tree.map(lambda leaf: 2.0 * leaf + 1.0, probe)
  np.testing.assert_array_equal(doubled.weights, np.full((3, 2), 3.0))
  np.testing.assert_array_equal(doubled.bias, np.ones(2))


def test_fit_that_does_not_converge_raises():
  means, labels = clusters(3)
  with pytest.raises(ValueError, match=r'l2, max_iter: .* not converge in 2 iterations'):
    linear_probe.fit_probe(means, labels, 3, standardize=True, max_iter=2)


# ---------------------------------------------------------------------------------------------
# Encoder means
# ---------------------------------------------------------------------------------------------


IMAGES = np.random.default_rng(1).integers(0, 256, (10, *SHAPE), np.uint8)


@pytest.mark.parametrize(('num_devices', 'batch_size'), [(1, 10), (1, 3), (4, 4), (4, 3), (4, 512)])
def test_encoder_means_do_not_depend_on_batches_and_devices(num_devices, batch_size):
  model, params = model_and_params()
  mesh = sharding.data_mesh(num_devices)
  means = linear_probe.encoder_means(model, params, IMAGES, mesh=mesh, batch_size=batch_size)
  assert means.shape == (10, 2) and means.dtype == np.float32
  expected = model.encode(params, IMAGES / np.float32(255.0)).mean
  np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)  # float32, other products
  everywhere = linear_probe.encoder_means(model, params, IMAGES)
  np.testing.assert_allclose(everywhere, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'images',
  [
    IMAGES[0],
    IMAGES[None],
    IMAGES[:0],
    *(IMAGES.astype(dtype) for dtype in (bool, np.int8, np.uint16, np.float32)),
  ],
  ids=lambda images: f'{images.dtype}{images.shape}',
)
def test_images_of_another_kind_have_no_means(images):
  model, params = model_and_params()
  with pytest.raises(ValueError, match=r'images: must be uint8 \[N, H, W, C\], at least one, got'):
    linear_probe.encoder_means(model, params, images)


def test_probed_encoder_is_the_probe_on_the_mean():
  model, params = model_and_params()
  probe = linear_probe.LinearProbe(
    jnp.float32([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]]), jnp.float32([0.1, 0.2, 0.3])
  )
  x = jnp.asarray(IMAGES / np.float32(255.0))
  mean = np.asarray(model.encode(params, x).mean)
  classifier = linear_probe.ProbedEncoder(model)
  first, second = mean[:, 0], mean[:, 1]
  expected = np.stack([first + 0.1, 2.0 * first - second + 0.2, 3.0 * second + 0.3], axis=1)
  np.testing.assert_allclose(classifier(x, params, probe), expected, rtol=1e-5, atol=1e-6)


def test_probes_and_functions_of_a_model_cannot_be_changed():
  """The functions are keys of compiled programs."""
  model, _ = model_and_params()
  for kind in (
    linear_probe.ProbedEncoder,
    linear_probe.GaussianLatents,
    linear_probe.Reconstruction,
  ):
    assert hash(kind(model)) == hash(kind(model)) and kind(model) == kind(model)
  with pytest.raises(dataclasses.FrozenInstanceError):
    linear_probe.LinearProbe(jnp.eye(2), jnp.zeros(2)).bias = jnp.ones(2)


@pytest.mark.parametrize('covariance', ['diagonal', 'full'])
def test_distances_of_gaussian_latents_are_squared_w2(covariance):
  model = make_vae(SHAPE, latent_dim=2, num_layers=1, hidden_units=4, covariance=covariance)
  params = model.init(jax.random.key(0))
  x = jnp.asarray(np.random.default_rng(0).uniform(size=(6, *SHAPE)), jnp.float32)
  z, q = linear_probe.GaussianLatents(model)(x, params), model.encode(params, x)
  if covariance == 'diagonal':
    expected = wasserstein.squared_w2(q, jax.tree.map(lambda leaf: leaf[::-1], q))
    np.testing.assert_allclose(jnp.sum((z - z[::-1]) ** 2, axis=1), expected, rtol=1e-4)
  else:  # there are no such coordinates
    np.testing.assert_array_equal(z, q.mean)
  reconstructed = linear_probe.Reconstruction(model)(x, params)
  np.testing.assert_allclose(reconstructed, model.decode(params, q.mean), rtol=1e-6)


def test_logits_that_are_not_numbers_are_wrong():
  broken = linear_probe.LinearProbe(np.full((3, 2), np.nan, np.float32), np.zeros(2, np.float32))
  assert linear_probe.accuracy(broken, np.ones((4, 3), np.float32), np.zeros(4, int)) == 0.0
