"""Certificates of whole test sets lie on the safe side of what attacks find, for every option."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import ArgumentError, GaussianLatents, LinearProbe, ProbedEncoder, evaluation
from se_vae.certification import Method
from se_vae.evaluation import certificates, certifiers
from se_vae.evaluation.certificates import Certifier
from se_vae.models import vae
from se_vae.parallel import sharding
from tests.evaluation.small_model import SHAPE, model_and_params

DTYPE_PROMOTION = 'standard'  # optax relies on it
RADII = (0.3, 0.0, 0.1, 0.02)
COUNT = 10
X = np.random.default_rng(1).uniform(size=(COUNT, *SHAPE)).astype(np.float32)
RNG = np.random.default_rng(2)
PROBE = LinearProbe(*(RNG.normal(size=size).astype(np.float32) for size in ((2, 3), (3,))))
SMALL = Certifier(batch_size=4)


@pytest.fixture(scope='module')
def labels():
  model, params = model_and_params()
  return np.asarray(ProbedEncoder(model)(X, params, PROBE)).argmax(axis=1)


@pytest.fixture(scope='module')
def margins(labels):
  arguments = (*model_and_params(), PROBE, X, labels)
  return certificates.certified_margins(*arguments, radii=RADII, certifier=SMALL)


@pytest.mark.long
def test_what_is_certified_is_not_misled(labels, margins):
  model, params = model_and_params()
  attacked = evaluation.adversarial_accuracy(
    ProbedEncoder(model), X, labels, radii=RADII, num_steps=10, args=(params, PROBE)
  )
  certified = margins > 0.0
  assert (attacked.correct | ~certified).all()
  assert 0.3 < certified.mean() <= attacked.correct.mean() < 1.0


def test_margins_do_not_rise_with_the_radius(margins):
  order = np.argsort(RADII)
  assert (np.diff(margins[order], axis=0) <= 0.0).all()
  assert (margins[1] > 0.0).all(), 'labels are what the classifier says'


def test_accuracy_and_radii_follow_from_margins(labels, margins):
  arguments = (*model_and_params(), PROBE, X, labels)
  accuracy = certificates.certified_accuracy(*arguments, radii=RADII, certifier=SMALL)
  np.testing.assert_array_equal(accuracy.correct, margins > 0.0)
  np.testing.assert_array_equal(accuracy.radii, RADII)
  most = certificates.certified_radius(*arguments, most=0.3, certifier=SMALL)
  for radius, row in zip(RADII, margins, strict=True):
    # Bisection ends within 0.3 / 2^10 of where the margin is 0.
    assert (row[most > radius] > 0.0).all() and (row[most < radius - 3e-4] <= 0.0).all()
  np.testing.assert_array_equal(most == np.float32(0.3), margins[0] > 0.0)


def test_wrong_labels_are_not_certified(labels):
  wrong = (labels + 1) % 3
  arguments = (*model_and_params(), PROBE, X, wrong)
  assert not certificates.certified_accuracy(*arguments, radii=RADII, certifier=SMALL).correct.any()
  np.testing.assert_array_equal(
    certificates.certified_radius(*arguments, most=0.3, certifier=SMALL), -1.0
  )


def test_results_do_not_depend_on_batches_devices_and_order(labels, margins):
  order = np.random.default_rng(3).permutation(COUNT)
  one = dataclasses.replace(SMALL, batch_size=7, mesh=sharding.data_mesh(1))
  again = certificates.certified_margins(
    *model_and_params(), PROBE, X[order], labels[order], radii=RADII, certifier=one
  )
  np.testing.assert_allclose(again, margins[:, order], rtol=1e-5, atol=1e-6)


def test_a_box_certifies_every_probe_and_less_than_the_probe_itself(labels, margins):
  arguments = (*model_and_params(), PROBE, X, labels)
  every = dataclasses.replace(SMALL, every_probe=True)
  from_box = certificates.certified_margins(*arguments, radii=RADII, certifier=every)
  assert (from_box <= margins + 1e-6).all()
  # The formula, in float64.
  box = certificates.latent_box(*model_and_params(), X, radius=0.1, certifier=SMALL)
  lower, upper = (np.float64(ends) for ends in (box.mean.lower, box.mean.upper))
  weights, bias = np.float64(PROBE.weights), np.float64(PROBE.bias)
  for i, label in enumerate(labels):
    others = [j for j in range(3) if j != label]
    differences = weights[:, label, None] - weights[:, others]
    least = (lower[i] + upper[i]) / 2.0 @ differences - (upper[i] - lower[i]) / 2.0 @ np.abs(
      differences
    )
    least = (least + bias[label] - bias[others]).min()
    assert least - 1e-4 < from_box[2, i] <= least


@pytest.mark.long
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_the_latent_shift_is_at_least_what_attacks_find(norm):
  model, params = model_and_params()
  certifier = dataclasses.replace(SMALL, norm=norm)
  most = certificates.certified_latent_shift(model, params, X, radii=RADII, certifier=certifier)
  found = evaluation.max_latent_shift(
    GaussianLatents(model), X, radii=RADII, num_steps=10, args=(params,), norm=norm
  )
  assert (found <= most).all()
  assert (np.diff(most[np.argsort(RADII)], axis=0) >= 0.0).all()
  assert most[1].max() < 1e-6, 'at radius 0'
  # The two are close where the encoder is nearly linear.
  assert np.median(found[3] / most[3]) > 0.5


def test_slope_steps_make_margins_larger(labels, margins):
  arguments = (*model_and_params(), PROBE, X, labels)
  improved = dataclasses.replace(SMALL, method=Method('crown', slope_steps=5))
  steps = certificates.certified_margins(*arguments, radii=RADII, certifier=improved)
  assert (steps >= margins - 1e-6).all()


def test_arguments_are_named(labels):
  model, params = model_and_params()
  arguments = (model, params, PROBE)
  with pytest.raises(ArgumentError, match='radii'):
    certificates.certified_accuracy(*arguments, X, labels, radii=(-0.1,))
  with pytest.raises(ArgumentError, match='x: must lie'):
    certificates.latent_box(model, params, X + 1.0, radius=0.1)
  with pytest.raises(ArgumentError, match='x: must be float'):
    certificates.latent_box(model, params, np.zeros((2, *SHAPE), np.uint8), radius=0.1)
  with pytest.raises(ArgumentError, match='labels'):
    certificates.certified_accuracy(*arguments, X, labels[1:], radii=RADII)
  with pytest.raises(ArgumentError, match='labels'):
    certificates.certified_accuracy(*arguments, X, labels + 3, radii=RADII)
  with pytest.raises(ArgumentError, match=r"method: must be a certification\.Method, got 'ibp'"):
    Certifier(method='ibp')
  with pytest.raises(ValueError, match='slope_steps must be an integer >= 0'):
    Method('crown', 2.5)
  with pytest.raises(ArgumentError, match='num_steps'):
    certificates.certified_radius(*arguments, X, labels, most=0.1, num_steps=0)
  with pytest.raises(ArgumentError, match='most: must be finite'):
    certificates.certified_radius(*arguments, X, labels, most=-1.0)
  with pytest.raises(ArgumentError, match='radius: must be finite'):
    certificates.latent_box(model, params, X, radius=-0.1)
  with pytest.raises(ArgumentError, match='radii: must be finite'):
    certificates.certified_latent_shift(model, params, X, radii=['0.1'])
  with pytest.raises(ArgumentError, match="norm: must be one of linf, l2, got 'l1'"):
    Certifier(norm='l1')
  with pytest.raises(ArgumentError, match='probe: must take 2 latents as the encoder has, got 3'):
    other = LinearProbe(np.zeros((3, 3), np.float32), np.zeros(3, np.float32))
    certificates.certified_accuracy(model, params, other, X, labels, radii=RADII)


@pytest.mark.parametrize('shape', [(1, 3, 4), (12,), (3, 4, 1, 1), (4, 3, 1)])
def test_images_of_another_shape_are_refused(labels, shape):
  """An MLP flattens them all, in another order."""
  x = X.reshape(COUNT, *shape)
  with pytest.raises(ArgumentError, match=r'x: must be float images \[N, 3, 4, 1\], got float32'):
    certificates.certified_accuracy(*model_and_params(), PROBE, x, labels, radii=RADII)


def test_models_and_probes_that_compute_more_are_refused(labels):
  class Normalised(vae.VAE):
    def encode(self, params, x):
      return super().encode(params, 4.0 * (x - 0.5))

  class Negated(LinearProbe):
    def logits(self, means):
      return -super().logits(means)

  model, params = model_and_params()
  other = Normalised(
    **{field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
  )
  for bound in (certificates.latent_box, certificates.certified_latent_shift):
    options = {'radius': 0.1} if bound is certificates.latent_box else {'radii': RADII}
    with pytest.raises(TypeError, match='cannot certify Normalised: its encode may be more'):
      bound(other, params, X, **options)
  with pytest.raises(ArgumentError, match='certify: cannot certify Normalised'):
    certifiers.certifier_for(ProbedEncoder(other), (params, PROBE), SHAPE)
  with pytest.raises(ArgumentError, match='probe: must be a LinearProbe, got Negated'):
    probe = Negated(PROBE.weights, PROBE.bias)
    certificates.certified_radius(model, params, probe, X, labels, most=0.1)


@pytest.mark.parametrize('method', ['ibp', 'crown'])
def test_half_precision_is_certified_in_float32(method):
  """Squares of its weights would underflow, and with them what an l2 ball can move."""
  model = vae.make_vae((1, 1, 4), latent_dim=1, hidden_units=1, num_layers=1)
  params = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, jnp.float16),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  layers = params['encoder']['params']
  layers['Dense_0']['kernel'] += jnp.float16(1e-4)
  layers['Dense_0']['bias'] += jnp.float16(1.0)
  layers['GaussianHead_0']['Dense_0']['kernel'] += jnp.float16(1.0)
  # The logits cross where the hidden unit falls by 4e-5: at an l2 distance of 0.2.
  x = np.full((1, 1, 1, 4), 0.5, np.float32)
  mean = np.asarray(model.encode(params, x).mean)
  probe = LinearProbe(np.float32([[1.0, 0.0]]), np.float32([0.0, mean.item() - 4e-5]))
  certifier = Certifier(norm='l2', method=Method(method))
  found = certificates.certified_radius(
    model, params, probe, x, np.array([0]), most=1.0, certifier=certifier
  )
  assert 0.1 < found < 0.201


def test_where_float32_overflows_no_bound_is_infinitely_loose(labels):
  model, params = model_and_params()
  params = jax.tree.map(lambda leaf: leaf * np.float32(1e25), params)
  shift = certificates.certified_latent_shift(model, params, X, radii=RADII)
  margins = certificates.certified_margins(model, params, PROBE, X, labels, radii=RADII)
  assert (shift == np.inf).all() and (margins == -np.inf).all()


def test_bounds_of_larger_radii_hold_at_smaller_ones():
  bounds = {0.1: np.array([3.0, np.nan]), 0.2: np.array([2.0, 1.0])}
  found = certificates._along_radii(np.fmin, bounds.__getitem__, (0.2, 0.1))
  np.testing.assert_array_equal(found, [[2.0, 1.0], [2.0, 1.0]])


def test_a_certifier_keeps_the_norm_and_the_bounds_that_are_given():
  model, params = model_and_params()
  certifier = certifiers.certifier_for(
    ProbedEncoder(model), (params, PROBE), SHAPE, norm='l2', bounds=(-1.0, 2.0)
  )
  assert (certifier.norm, certifier.bounds) == ('l2', (-1.0, 2.0))
  assert hash(Certifier(bounds=[-1.0, 2.0])) == hash(Certifier(bounds=(-1.0, 2.0)))
  certifier = Certifier(bounds=(-1.0, 2.0))
  box = certifier.region(np.full((1, 1), 1.95, np.float32), np.array([0.2], np.float32)).box
  np.testing.assert_allclose([box.lower.item(), box.upper.item()], [1.75, 2.0], rtol=1e-6)
