"""The worst encoding in a box, against every corner and many points of the box."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import objectives
from se_vae.gaussians import DiagonalGaussian
from tests import oracles
from tests.oracles import in_float64

COUPLINGS = ('paper', 'balanced')


def box_around(rng, values):
  """Ends below and above, some of width 0."""
  widths = rng.exponential(size=(2, *values.shape)) * rng.integers(0, 2, size=(2, *values.shape))
  return jnp.asarray(values - widths[0]), jnp.asarray(values + widths[1])


def problem(seed, batch=6, dim=2):
  """Encodings of x, and boxes that need not contain them."""
  rng = np.random.default_rng(seed)
  q_a = DiagonalGaussian(*jnp.asarray(rng.normal(size=(2, batch, dim)) * [[[1.0]], [[2.0]]]))
  mean = box_around(rng, np.asarray(q_a.mean) + rng.normal(size=(batch, dim)))
  log_var = box_around(rng, np.asarray(q_a.log_var) + rng.normal(size=(batch, dim)))
  return rng, q_a, mean, log_var


def bound(q_a, q_b, gamma, coupling):
  x = jnp.zeros((len(q_a.mean), 3), q_a.mean.dtype)
  return objectives.se_elbo(x, x, q_a, q_b, gamma=gamma, obs_var=0.1, coupling=coupling).elbo


worst_encoding = oracles.quick_jit(objectives.worst_encoding, static_argnames='coupling')


@functools.partial(oracles.quick_jit, static_argnames='coupling')
def bounds(q_a, many, gamma, coupling):
  """The bound with each of many encodings q_b in its place, `[N, B]`."""
  return jax.vmap(lambda q_b: bound(q_a, q_b, gamma, coupling))(many)


@pytest.mark.parametrize('coupling', COUPLINGS)
@pytest.mark.parametrize('gamma', (0.0, 1e-3, 0.7, 20.0, 1e4))
@in_float64
def test_no_encoding_in_the_box_has_a_smaller_bound(gamma, coupling):
  rng, q_a, mean, log_var = problem(0)
  worst = worst_encoding(q_a, mean, log_var, gamma=gamma, coupling=coupling)
  corners = []
  for pick in itertools.product((0, 1), repeat=4):
    ends = (
      np.stack([values[i][:, d] for d, i in enumerate(part)], axis=1)
      for values, part in ((np.asarray(mean), pick[:2]), (np.asarray(log_var), pick[2:]))
    )
    corners.append(DiagonalGaussian(*ends))
  inside = []
  for share in rng.uniform(size=(200, 2, *q_a.mean.shape)):
    parts = zip(share, map(np.asarray, (mean, log_var)), strict=True)
    inside.append(DiagonalGaussian(*(low + t * (high - low) for t, (low, high) in parts)))

  many = jax.tree.map(lambda *leaves: np.stack(leaves), worst, *corners, *inside)
  lowest, of_corners, of_points = np.split(bounds(q_a, many, gamma, coupling), (1, 17))
  np.testing.assert_allclose(lowest[0], np.min(of_corners, axis=0), rtol=1e-12)
  assert len(of_points) == 200
  assert (lowest <= of_points + 1e-12 * np.abs(lowest)).all()


@pytest.mark.parametrize('coupling', COUPLINGS)
def test_the_gradient_flows_to_the_ends_that_were_chosen(coupling):
  _, q_a, mean, log_var = problem(1)
  q_a, mean, log_var = jax.tree.map(lambda v: v.astype(jnp.float32), (q_a, mean, log_var))

  def total(mean, log_var):
    q_b = objectives.worst_encoding(q_a, mean, log_var, gamma=3.0, coupling=coupling)
    return jnp.sum(bound(q_a, q_b, 3.0, coupling))

  @oracles.quick_jit
  def worst_and_gradients(mean, log_var):
    worst = objectives.worst_encoding(q_a, mean, log_var, gamma=3.0, coupling=coupling)
    expected = jax.grad(lambda q_b: jnp.sum(bound(q_a, q_b, 3.0, coupling)))(worst)
    return worst, expected, jax.grad(total, argnums=(0, 1))(mean, log_var)

  worst, expected, gradients = worst_and_gradients(mean, log_var)
  chosen_and_wanted = ((worst.mean, expected.mean), (worst.log_var, expected.log_var))
  for (low, high), got, (chosen, wanted) in zip(
    (mean, log_var), gradients, chosen_and_wanted, strict=True
  ):
    np.testing.assert_allclose(got[0] + got[1], wanted, rtol=1e-5)
    for end, gradient in ((low, got[0]), (high, got[1])):
      np.testing.assert_array_equal(np.where(end != chosen, gradient, 0.0), 0.0)


def test_a_box_that_is_a_point_is_its_encoding():
  _, q_a, _, _ = problem(2)
  ends = ((values, values) for values in (q_a.mean, q_a.log_var))
  worst = worst_encoding(q_a, *ends, gamma=5.0)
  np.testing.assert_array_equal(worst.mean, q_a.mean)
  np.testing.assert_array_equal(worst.log_var, q_a.log_var)


def test_wrong_arguments_are_refused():
  q_a = DiagonalGaussian(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
  ends, wide = (q_a.mean, q_a.mean), (q_a.mean, jnp.zeros((2, 4)))
  narrow = (jnp.zeros((2, 1)), q_a.mean)

  def refused(error, message, log_var, **options):
    with pytest.raises(error, match=message):
      jax.eval_shape(lambda: objectives.worst_encoding(q_a, ends, log_var, **options))

  two_ends = r'log_var must have two ends \(2, 3\), got '
  refused(AssertionError, two_ends + r'\(2, 3\) and \(2, 4\)', wide, gamma=1.0)
  refused(AssertionError, two_ends + r'\(2, 1\) and \(2, 3\)', narrow, gamma=1.0)
  refused(ValueError, 'coupling must be one of', ends, gamma=1.0, coupling='other')
  refused(ValueError, 'gamma must be finite and >= 0', ends, gamma=-1.0)
