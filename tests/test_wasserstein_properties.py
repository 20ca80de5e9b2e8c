"""Properties of transport costs, and their derivatives against finite differences."""

import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from se_vae import wasserstein
from se_vae.gaussians import FullGaussian
from tests import oracles
from tests.oracles import Moments, in_float64
from tests.transport import (
  FAMILIES,
  entropic_squared_w2,
  entropic_transport_cost,
  moment_arguments,
  pair,
  squared_w2,
)

# ---------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------

DIM = 3
PROPERTY = hypothesis.settings(derandomize=True, deadline=None, max_examples=40, database=None)
vectors = hypothesis.extra.numpy.arrays(np.float64, (DIM,), elements=st.floats(-4.0, 4.0))
matrices = hypothesis.extra.numpy.arrays(np.float64, (DIM, DIM), elements=st.floats(-1.0, 1.0))
gammas = st.floats(-4.0, 4.0).map(lambda exponent: 10.0**exponent)


@st.composite
def gaussian(draw, family):
  """Means to 4, standard deviations from exp(-2) to exp(2), any correlation of moderate size."""
  mean, log_var = draw(vectors), draw(vectors)
  if family == 'diagonal':
    return Moments(mean, np.diag(np.exp(log_var)))
  tril = np.tril(draw(matrices), -1) + np.diag(np.exp(0.5 * log_var))
  return Moments(mean, tril @ tril.T)


def both(family):
  return st.tuples(gaussian(family), gaussian(family))


def scale_of(p_a, p_b, gamma=0.0):
  """The size of the terms that are added up, to which rounding is relative."""
  total = np.sum((p_a.mean - p_b.mean) ** 2) + np.trace(p_a.cov) + np.trace(p_b.cov)
  return 30.0 + (1.0 + gamma) * total


any_pair = st.sampled_from(FAMILIES).flatmap(lambda name: st.tuples(st.just(name), both(name)))


@hypothesis.given(any_pair, gammas)
@PROPERTY
@in_float64
def test_costs_are_symmetric(case, gamma):
  family, (p_a, p_b) = case
  q_a, q_b = (getattr(oracles, family)(p) for p in (p_a, p_b))
  tolerance = 1e-12 * scale_of(p_a, p_b, gamma)
  for function in (
    squared_w2,
    functools.partial(entropic_squared_w2, gamma=gamma),
    functools.partial(entropic_transport_cost, gamma=gamma),
  ):
    np.testing.assert_allclose(function(q_a, q_b), function(q_b, q_a), rtol=0, atol=tolerance)


@hypothesis.given(any_pair, gammas, gammas)
@PROPERTY
@in_float64
def test_cost_rises_and_distance_falls_with_gamma(case, gamma, other_gamma):
  family, (p_a, p_b) = case
  q_a, q_b = (getattr(oracles, family)(p) for p in (p_a, p_b))
  low, high = sorted((gamma, other_gamma))
  tolerance = 1e-12 * scale_of(p_a, p_b)
  far, near = (float(entropic_squared_w2(q_a, q_b, g)) for g in (low, high))
  assert float(squared_w2(q_a, q_b)) - tolerance <= near <= far + tolerance
  costs = [float(entropic_transport_cost(q_a, q_b, g)) for g in (low, high)]
  # The cost is concave with slope W^2_{2,gamma} / 2, which bounds the rise on both sides.
  tolerance = 1e-12 * scale_of(p_a, p_b, high)
  rise = costs[1] - costs[0]
  assert 0.5 * (high - low) * near - tolerance <= rise <= 0.5 * (high - low) * far + tolerance


@hypothesis.given(any_pair, gammas)
@PROPERTY
@in_float64
def test_cost_has_half_the_entropic_distance_as_its_slope_in_gamma(case, gamma):
  family, (p_a, p_b) = case
  q_a, q_b = (getattr(oracles, family)(p) for p in (p_a, p_b))
  slope = COST_SLOPE(q_a, q_b, gamma)
  np.testing.assert_allclose(
    slope,
    0.5 * entropic_squared_w2(q_a, q_b, gamma),
    rtol=0,
    atol=1e-12 * scale_of(p_a, p_b),
  )


COST_SLOPE = oracles.quick_jit(jax.grad(wasserstein.entropic_transport_cost, argnums=2))


@hypothesis.given(both('full'), vectors, matrices, gammas)
@PROPERTY
@in_float64
def test_costs_do_not_change_under_a_joint_translation_and_rotation(pair, shift, matrix, gamma):
  p_a, p_b = pair
  rotation = scipy.linalg.expm(matrix - matrix.T)
  moved = [Moments(rotation @ p.mean + shift, rotation @ p.cov @ rotation.T) for p in pair]
  before, after = ([oracles.full(p) for p in ps] for ps in (pair, moved))
  # The rotated covariance is rounded before its Cholesky factor is taken, and the cost holds
  # log-determinants of matrices with condition numbers of up to 1e4 or so.
  tolerance = 1e-10 * scale_of(p_a, p_b, gamma)
  for function in (entropic_squared_w2, entropic_transport_cost):
    np.testing.assert_allclose(
      function(*after, gamma), function(*before, gamma), rtol=0, atol=tolerance
    )
  np.testing.assert_allclose(squared_w2(*after), squared_w2(*before), rtol=0, atol=tolerance)


@hypothesis.given(both('diagonal'), vectors, gammas)
@PROPERTY
@in_float64
def test_families_agree_on_diagonal_covariances_and_translation_changes_nothing(pair, shift, gamma):
  tolerance = 1e-12 * scale_of(*pair, gamma)
  flat, dense = ([make(p) for p in pair] for make in (oracles.diagonal, oracles.full))
  moved = [oracles.diagonal(Moments(p.mean + shift, p.cov)) for p in pair]
  for others in (dense, moved):
    for function in (entropic_squared_w2, entropic_transport_cost):
      np.testing.assert_allclose(
        function(*others, gamma), function(*flat, gamma), rtol=0, atol=tolerance
      )
    np.testing.assert_allclose(squared_w2(*others), squared_w2(*flat), rtol=0, atol=tolerance)


@hypothesis.given(any_pair, matrices, gammas)
@PROPERTY
@in_float64
def test_no_other_coupling_costs_less(case, free, gamma):
  family, (p_a, p_b) = case
  q_a, q_b = (getattr(oracles, family)(p) for p in (p_a, p_b))
  cross = oracles.feasible_cross_covariance(p_a, p_b, 10.0 * free)
  other = oracles.coupling_cost(p_a, p_b, cross, gamma)
  # 1e-10: the entropy of a joint distribution whose condition number may be 1e6.
  tolerance = 1e-10 * scale_of(p_a, p_b, gamma)
  assert float(entropic_transport_cost(q_a, q_b, gamma)) <= other.cost + tolerance


# ---------------------------------------------------------------------------------------------
# Batches and gradients
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_batches_of_several_axes_are_loops(family):
  rng = np.random.default_rng(70)
  q_a, q_b = (
    oracles.batch_of([oracles.family(family, rng, 4)[1] for _ in range(6)]) for _ in range(2)
  )
  gamma = 0.7

  def every_function(q_a, q_b):
    def cost(q):
      return wasserstein.entropic_transport_cost(q, q_b, gamma)

    values = {
      'derivative_of_cost': jax.jvp(cost, (q_a,), (q_b,))[1],
      'squared_w2': wasserstein.squared_w2(q_a, q_b),
      'entropic_squared_w2': wasserstein.entropic_squared_w2(q_a, q_b, gamma),
      'entropic_transport_cost': wasserstein.entropic_transport_cost(q_a, q_b, gamma),
      'optimal_map': wasserstein.optimal_map(q_a, q_b, 2.0 * q_b.mean),
    }
    if family == 'diagonal':
      values['optimal_coupling'] = wasserstein.optimal_coupling(q_a.var, q_b.var)
      values['entropic_coupling'] = wasserstein.entropic_coupling(q_a.var, q_b.var, gamma)
      return values
    moments = (q_a.mean, q_a.cov, q_b.mean, q_b.cov)
    values['optimal_coupling'] = wasserstein.optimal_coupling_full(q_a.cov, q_b.cov)
    values['entropic_coupling'] = wasserstein.entropic_coupling_full(q_a.cov, q_b.cov, gamma)
    values['optimal_map_full'] = wasserstein.optimal_map_full(*moments, 2.0 * q_b.mean)
    values['squared_w2_full'] = wasserstein.squared_w2_full(*moments)
    values['entropic_squared_w2_full'] = wasserstein.entropic_squared_w2_full(*moments, gamma)
    values['cost_full'] = wasserstein.entropic_transport_cost_full(*moments, gamma)
    return values

  oracles.assert_batches_are_loops(every_function, q_a, q_b)


@pytest.mark.long
@in_float64
def test_factorised_derivatives_match_finite_differences():
  (_, q_a), (_, q_b) = pair('diagonal', 80, 2)
  standard = oracles.diagonal(oracles.standard_normal(2))

  def every_function(q_a, q_b, gamma):
    return (
      wasserstein.squared_w2(q_a, q_b),
      wasserstein.entropic_squared_w2(q_a, q_b, gamma),
      wasserstein.entropic_transport_cost(q_a, q_b, gamma),
      wasserstein.optimal_coupling(q_a.var, q_b.var),
      wasserstein.entropic_coupling(q_a.var, q_b.var, gamma),
      wasserstein.optimal_map(q_a, q_b, 2.0 * q_b.mean + 1.0),
    )

  check = oracles.DerivativeCheck(every_function, (q_a, q_b, 1.0))
  for gamma in (0.0, 0.7, 20.0):  # the formulas continue smoothly to the stencil's gamma < 0
    check(q_a, q_b, gamma)
    check(q_a, q_a, gamma)
    check(standard, standard, gamma)


def full_cases():
  """Pairs of moments: generic, equal, diagonal, and with equal eigenvalues."""
  rng = np.random.default_rng(81)
  generic = [oracles.random_moments(rng, 2) for _ in range(2)]
  standard = oracles.standard_normal(2)
  return {
    'generic': generic,
    'equal': [generic[0]] * 2,
    'diagonal': [oracles.random_diagonal_moments(rng, 2) for _ in range(2)],
    'equal eigenvalues': [standard, Moments(generic[0].mean, 2.0 * standard.cov)],
    'generic and standard normal': [generic[0], standard],
    'both standard normal': [standard, standard],
  }


@pytest.mark.long
@in_float64
def test_full_covariance_derivatives_match_finite_differences():
  def every_function(mean_a, cov_a, mean_b, cov_b, gamma):
    moments = (mean_a, cov_a, mean_b, cov_b)
    return (
      wasserstein.squared_w2_full(*moments),
      wasserstein.entropic_squared_w2_full(*moments, gamma),
      wasserstein.entropic_transport_cost_full(*moments, gamma),
      wasserstein.optimal_coupling_full(cov_a, cov_b),
      wasserstein.entropic_coupling_full(cov_a, cov_b, gamma),
      wasserstein.optimal_map_full(*moments, 2.0 * mean_b + 1.0),
    )

  cases = full_cases()
  check = oracles.DerivativeCheck(every_function, (*moment_arguments(*cases['generic']), 1.0))
  for case in cases.values():
    for gamma in (0.0, 0.7):
      check(*moment_arguments(*case), gamma)
  check(*moment_arguments(*cases['generic']), 20.0)


@pytest.mark.long
@in_float64
def test_derivatives_in_the_scale_match_finite_differences():
  def every_function(q_a, q_b, gamma):
    # Above the diagonal there is no parameter; the mean stands in so that no entry is unused.
    q_a, q_b = (FullGaussian(q.mean, jnp.tril(q.scale_tril)) for q in (q_a, q_b))
    return (
      wasserstein.squared_w2(q_a, q_b),
      wasserstein.entropic_squared_w2(q_a, q_b, gamma),
      wasserstein.entropic_transport_cost(q_a, q_b, gamma),
      wasserstein.optimal_map(q_a, q_b, 2.0 * q_b.mean + 1.0),
    )

  cases = [[oracles.full(p) for p in case] for case in full_cases().values()]
  check = oracles.DerivativeCheck(every_function, (*cases[0], 1.0))
  for case in cases:
    for gamma in (0.0, 0.7):
      check(*case, gamma)
