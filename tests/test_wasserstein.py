"""Transport costs against Sinkhorn, a numerical minimiser, linear programming and the paper."""

import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from se_vae import gaussians, wasserstein
from se_vae.gaussians import DiagonalGaussian, FullGaussian
from tests import oracles
from tests.oracles import LONG, Moments, in_float64

FAMILIES = ('diagonal', 'full')
# Closed forms in float64 on well-conditioned inputs: rounding only.
EXACT = {'rtol': 1e-11, 'atol': 1e-11}

squared_w2 = oracles.quick_jit(wasserstein.squared_w2)
entropic_squared_w2 = oracles.quick_jit(wasserstein.entropic_squared_w2)
entropic_transport_cost = oracles.quick_jit(wasserstein.entropic_transport_cost)
optimal_coupling = oracles.quick_jit(wasserstein.optimal_coupling)
optimal_coupling_full = oracles.quick_jit(wasserstein.optimal_coupling_full)
entropic_coupling = oracles.quick_jit(wasserstein.entropic_coupling)
entropic_coupling_full = oracles.quick_jit(wasserstein.entropic_coupling_full)


def pair(family, seed, dim):
  """Two pairs of (moments, Gaussian)."""
  rng = np.random.default_rng(seed)
  return oracles.family(family, rng, dim), oracles.family(family, rng, dim)


def coupling_of(family, p_a, p_b, gamma):
  """The library's entropic cross-covariance `[D, D]`; the optimal one for gamma = None."""
  if family == 'full':
    if gamma is None:
      return np.asarray(optimal_coupling_full(p_a.cov, p_b.cov))
    return np.asarray(entropic_coupling_full(p_a.cov, p_b.cov, gamma))
  var_a, var_b = np.diag(p_a.cov), np.diag(p_b.cov)
  if gamma is None:
    return np.diag(optimal_coupling(var_a, var_b))
  return np.diag(entropic_coupling(var_a, var_b, gamma))


def moment_arguments(p_a, p_b):
  return tuple(jnp.asarray(x) for x in (*p_a, *p_b))


# ---------------------------------------------------------------------------------------------
# Entropic transport: values
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('dim, gamma', ((1, 0.1), (1, 1.0), (1, 5.0), (2, 0.3), (2, 1.0)))
@in_float64
def test_entropic_transport_is_what_sinkhorn_finds_on_a_grid(family, dim, gamma):
  rng = np.random.default_rng(dim)
  make = oracles.random_diagonal_moments if family == 'diagonal' else oracles.random_moments
  p_a, p_b = make(rng, dim), make(rng, dim)
  if family == 'full' and dim == 2:
    p_a, p_b = (Moments(p.mean, oracles.random_covariance(rng, 2, 3.0)) for p in (p_a, p_b))
  q_a, q_b = (getattr(oracles, family)(p) for p in (p_a, p_b))
  # The spacing is 0.9 of the smallest deviation of z_a given z_b (or the reverse) under the plan.
  # The error of the rectangle rule is exp(-24) there. The tails beyond 7 deviations, and Sinkhorn's
  # stopping rule, add about 1e-10 of the cost.
  precision = np.linalg.inv(
    oracles.joint_covariance(p_a, p_b, oracles.riccati_solution(p_a.cov, p_b.cov, gamma))
  )
  plan = oracles.sinkhorn(p_a, p_b, gamma, spacing=0.9 / np.sqrt(np.diag(precision).max()))
  tolerance = {'rtol': 1e-8, 'atol': 1e-8}
  np.testing.assert_allclose(entropic_transport_cost(q_a, q_b, gamma), plan.cost, **tolerance)
  np.testing.assert_allclose(
    entropic_squared_w2(q_a, q_b, gamma), plan.squared_distance, **tolerance
  )
  psi = coupling_of(family, p_a, p_b, gamma)
  np.testing.assert_allclose(psi, plan.cross_covariance, **tolerance)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('gamma', (0.1, 1.0, 10.0))
@in_float64
def test_entropic_transport_is_the_minimum_of_eq_13_in_three_dimensions(family, gamma):
  (p_a, q_a), (p_b, q_b) = pair(family, 3, 3)
  found = oracles.minimise_coupling(p_a, p_b, gamma)
  # The minimiser's gradient is a finite difference good to 1e-8, so its value (of second order in
  # the error of Psi) is good to 1e-10 and its Psi to 1e-6.
  value = {'rtol': 1e-9, 'atol': 1e-9}
  place = {'rtol': 1e-5, 'atol': 1e-6}
  np.testing.assert_allclose(entropic_transport_cost(q_a, q_b, gamma), found.cost, **value)
  np.testing.assert_allclose(entropic_squared_w2(q_a, q_b, gamma), found.squared_distance, **place)
  psi = coupling_of(family, p_a, p_b, gamma)
  np.testing.assert_allclose(psi, found.cross_covariance, **place)
  # And no rounding at all when Eq. 13 is evaluated at the library's own coupling.
  here = oracles.coupling_cost(p_a, p_b, psi, gamma)
  np.testing.assert_allclose(entropic_transport_cost(q_a, q_b, gamma), here.cost, **EXACT)
  np.testing.assert_allclose(entropic_squared_w2(q_a, q_b, gamma), here.squared_distance, **EXACT)


@pytest.mark.parametrize('gamma', (1e-3, 0.1, 1.0, 30.0))
@pytest.mark.parametrize('dim', (1, 2, 5))
@in_float64
def test_full_coupling_solves_the_riccati_equation(dim, gamma):
  rng = np.random.default_rng(dim)
  cov_a, cov_b = (oracles.random_covariance(rng, dim) for _ in range(2))
  psi = np.asarray(entropic_coupling_full(jnp.asarray(cov_a), jnp.asarray(cov_b), gamma))
  np.testing.assert_allclose(
    psi, oracles.riccati_solution(cov_a, cov_b, gamma), rtol=1e-9, atol=1e-10
  )
  back = np.linalg.inv(cov_b) @ psi.T
  residual = -psi @ back - back / gamma + cov_a  # Eq. 18
  np.testing.assert_allclose(residual, 0.0, atol=1e-11 * (1.0 + 1.0 / gamma))
  # Feasible: what z_b leaves of z_a's covariance is positive definite.
  assert np.linalg.eigvalsh(cov_a - psi @ np.linalg.inv(cov_b) @ psi.T).min() > 0.0
  if dim > 1:  # not symmetric, so a transposed Psi cannot pass
    assert np.abs(psi - psi.T).max() > 1e-2 * np.abs(psi).max()


@in_float64
def test_factorised_coupling_is_eq_24_and_solves_eq_22():
  rng = np.random.default_rng(7)
  var_a, var_b = np.exp(rng.normal(size=(2, 50)))
  for gamma in (1e-6, 1e-3, 1.0, 1e3, 1e6):
    psi = np.asarray(entropic_coupling(var_a, var_b, gamma))
    # Eq. 24 in extended precision cancels to eps / (gamma^2 var var): 1e-7 at gamma = 1e-6.
    expected = oracles.paper_scalar_coupling(var_a, var_b, gamma)
    np.testing.assert_allclose(psi, expected.astype(float), rtol=1e-14 + 1e-18 / gamma**2)
    product = var_a * var_b
    np.testing.assert_allclose(psi**2 + psi / gamma, product, rtol=1e-14)
    assert np.all(psi > 0) and np.all(psi**2 < product)


@in_float64
def test_factorised_cost_is_the_papers_expression():
  rng = np.random.default_rng(8)
  mean_a, mean_b, log_var_a, log_var_b = rng.normal(size=(4, 20, 3))
  q_a = DiagonalGaussian(jnp.asarray(mean_a), jnp.asarray(log_var_a))
  q_b = DiagonalGaussian(jnp.asarray(mean_b), jnp.asarray(log_var_b))
  for gamma in np.logspace(-6, 6, 13):
    expected = oracles.paper_scalar_cost(mean_a, log_var_a, mean_b, log_var_b, gamma).sum(-1)
    # The printed expression subtracts terms of order gamma: extended precision leaves 1e-13 at 1e6.
    np.testing.assert_allclose(
      entropic_transport_cost(q_a, q_b, gamma), expected.astype(float), rtol=1e-13, atol=1e-12
    )


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_without_coupling_the_plan_is_independent(family):
  (p_a, q_a), (p_b, q_b) = pair(family, 9, 2)
  independent = np.sum((p_a.mean - p_b.mean) ** 2) + np.trace(p_a.cov) + np.trace(p_b.cov)
  np.testing.assert_allclose(
    entropic_transport_cost(q_a, q_b, 0.0), -oracles.entropy(p_a) - oracles.entropy(p_b), **EXACT
  )
  np.testing.assert_allclose(entropic_squared_w2(q_a, q_b, 0.0), independent, **EXACT)
  np.testing.assert_array_equal(coupling_of(family, p_a, p_b, 0.0), np.zeros((2, 2)))


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_strong_coupling_tends_to_optimal_transport(family):
  (p_a, q_a), (p_b, q_b) = pair(family, 10, 3)
  for gamma in (1e4, 1e7):
    # psi falls short of its limit by 1 / (2 gamma) a dimension: twice 3 / (2 gamma) in the trace.
    excess = entropic_squared_w2(q_a, q_b, gamma) - oracles.squared_w2(p_a, p_b)
    np.testing.assert_allclose(excess * gamma, 3.0, rtol=1e-2)
    difference = coupling_of(family, p_a, p_b, None) - coupling_of(family, p_a, p_b, gamma)
    np.testing.assert_allclose(np.trace(difference) * gamma, 1.5, rtol=1e-2)


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_cost_of_equal_gaussians_holds_the_entropy(family):
  (p, q), _ = pair(family, 11, 2)
  # A tight coupling makes z_b a copy of z_a with a blur that is free to minimise
  # gamma/2 E||blur||^2 - H[blur], and so is N(0, I / gamma); D = 2 here.
  gamma = 1e8
  expected = 1.0 - oracles.entropy(p) - np.log(2.0 * np.pi * np.e / gamma)
  np.testing.assert_allclose(entropic_transport_cost(q, q, gamma), expected, rtol=1e-6)


@in_float64
def test_moment_functions_are_those_of_the_classes():
  (p_a, _), (p_b, _) = pair('full', 12, 3)
  moments = moment_arguments(p_a, p_b)
  functions = oracles.quick_jit(
    lambda *arguments: (
      wasserstein.entropic_transport_cost_full(*arguments),
      wasserstein.entropic_squared_w2_full(*arguments),
      wasserstein.squared_w2_full(*arguments[:-1]),
    )
  )
  for gamma in (0.0, 0.7, 100.0):
    plan = oracles.coupling_cost(p_a, p_b, coupling_of('full', p_a, p_b, gamma), gamma)
    cost, squared_distance, squared_w2 = functions(*moments, gamma)
    np.testing.assert_allclose(cost, plan.cost, **EXACT)
    np.testing.assert_allclose(squared_distance, plan.squared_distance, **EXACT)
    np.testing.assert_allclose(squared_w2, oracles.squared_w2(p_a, p_b), **EXACT)


# ---------------------------------------------------------------------------------------------
# Optimal transport: values
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('dim', (1, 2, 5))
@in_float64
def test_squared_w2_is_pots(family, dim):
  (p_a, q_a), (p_b, q_b) = pair(family, 20 + dim, dim)
  np.testing.assert_allclose(squared_w2(q_a, q_b), oracles.squared_w2(p_a, p_b), **EXACT)
  if dim == 1:  # ppf(cdf(z)) keeps ten digits or so
    np.testing.assert_allclose(
      squared_w2(q_a, q_b), oracles.squared_w2_by_quantiles(p_a, p_b), rtol=1e-8
    )


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_squared_w2_is_near_the_transport_between_samples(family):
  (p_a, q_a), (p_b, q_b) = pair(family, 31, 2)
  rng = np.random.default_rng(32)
  a, a_too, b, b_too = (
    rng.multivariate_normal(p.mean, p.cov, size=500) for p in (p_a, p_a, p_b, p_b)
  )
  # By the triangle inequality the error is at most the distances of the clouds from their
  # Gaussians, and the distance between two independent clouds exceeds those on average.
  bound = oracles.discrete_w2(a, a_too) + oracles.discrete_w2(b, b_too)
  distance = np.sqrt(float(squared_w2(q_a, q_b)))
  assert bound < 0.5 * distance  # the bound means something
  assert abs(distance - oracles.discrete_w2(a, b)) < bound


@in_float64
def test_optimal_coupling_is_eq_11():
  for dim in (1, 2, 4):
    (p_a, _), (p_b, _) = pair('full', 40 + dim, dim)
    expected = oracles.paper_optimal_cross_covariance(p_a.cov, p_b.cov)
    np.testing.assert_allclose(coupling_of('full', p_a, p_b, None), expected, rtol=1e-9, atol=1e-10)
    (p_a, _), (p_b, _) = pair('diagonal', 40 + dim, dim)
    expected = oracles.paper_optimal_cross_covariance(p_a.cov, p_b.cov)
    np.testing.assert_allclose(coupling_of('diagonal', p_a, p_b, None), expected, rtol=1e-9)


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_optimal_map_carries_one_gaussian_onto_the_other_at_the_least_cost(family):
  (p_a, q_a), (p_b, q_b) = pair(family, 50, 3)

  optimal_map = oracles.quick_jit(wasserstein.optimal_map)

  def send(z_b):
    return np.asarray(optimal_map(q_a, q_b, jnp.asarray(z_b)))

  np.testing.assert_allclose(send(p_b.mean), p_a.mean, **EXACT)
  linear = np.stack([send(p_b.mean + e) - p_a.mean for e in np.eye(3)], axis=1)
  # Affine, onto q_a's covariance, and the gradient of a convex function: optimal, by Brenier.
  z = np.random.default_rng(51).normal(size=3)
  np.testing.assert_allclose(send(z), p_a.mean + linear @ (z - p_b.mean), **EXACT)
  if family == 'full':
    same = wasserstein.optimal_map_full(*moment_arguments(p_a, p_b), jnp.asarray(z))
    np.testing.assert_allclose(same, send(z), **EXACT)
  np.testing.assert_allclose(linear @ p_b.cov @ linear.T, p_a.cov, **EXACT)
  np.testing.assert_allclose(linear, linear.T, **EXACT)
  assert np.linalg.eigvalsh(linear).min() > 0.0
  cost = oracles.expectation(
    p_b, lambda z: np.sum((p_a.mean + (z - p_b.mean) @ linear.T - z) ** 2, -1), 3
  )
  np.testing.assert_allclose(squared_w2(q_a, q_b), cost, **EXACT)


@pytest.mark.parametrize('dtype, tolerance', ((jnp.float64, 1e-7), (jnp.float32, 1e-3)))
@in_float64
def test_squared_w2_of_singular_covariances_is_right_and_its_gradient_finite(dtype, tolerance):
  # The square root of an eigenvalue that is zero up to rounding is off by the root of rounding.
  rng = np.random.default_rng(60)
  v, cov_b = np.array([1.0, -2.0, 2.0]), oracles.random_covariance(rng, 3)
  line, mean = np.outer(v, v), np.array([1.0, 0.0, 0.0])
  # (A S_b A)^(1/2) has rank one, and so its trace is a norm.
  expected_line = 1.0 + 9.0 + np.trace(cov_b) - 2.0 * np.sqrt(v @ cov_b @ v)
  nothing = np.zeros((3, 3))
  cases = {
    'line and generic': (line, cov_b, expected_line),
    'generic and line': (cov_b, line, expected_line),
    'point and generic': (nothing, cov_b, 1.0 + np.trace(cov_b)),
    'generic and point': (cov_b, nothing, 1.0 + np.trace(cov_b)),
    'the same line': (line, line, 1.0),
    'orthogonal lines': (np.diag([4.0, 0.0, 0.0]), np.diag([0.0, 1.0, 0.0]), 6.0),
    'two points': (nothing, nothing, 1.0),
  }
  function = oracles.quick_jit(jax.value_and_grad(wasserstein.squared_w2_full, (0, 1, 2, 3)))
  for name, (cov_a, cov_b, expected) in cases.items():
    arguments = [jnp.asarray(x, dtype) for x in (mean, cov_a, np.zeros(3), cov_b)]
    value, gradient = function(*arguments)
    assert value.dtype == dtype
    np.testing.assert_allclose(value, expected, atol=10.0 * tolerance, err_msg=name)
    assert all(np.all(np.isfinite(leaf)) for leaf in gradient), name
    np.testing.assert_allclose(gradient[0], 2.0 * mean, atol=1e-6, err_msg=name)
  # Along the covariance itself the derivative exists: stretching S_a by s gives
  # s Tr S_a - 2 sqrt(s) Tr (A S_b A)^(1/2).
  cov_b = cases['line and generic'][1]
  arguments = [jnp.asarray(x, dtype) for x in (mean, line, np.zeros(3), cov_b)]
  gradient = function(*arguments)[1]
  np.testing.assert_allclose(
    np.sum(np.asarray(gradient[1]) * line), 9.0 - np.sqrt(v @ cov_b @ v), atol=100.0 * tolerance
  )


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_squared_w2_and_its_gradient_vanish_at_equal_gaussians(family):
  _, q = oracles.family(family, np.random.default_rng(61), 3)
  value, gradient = oracles.quick_jit(jax.value_and_grad(wasserstein.squared_w2))(q, q)
  # Exactly when factorised, as documented; to rounding (of a root of 1, squared) otherwise.
  tolerance = 0.0 if family == 'diagonal' else 1e-13
  np.testing.assert_allclose(value, 0.0, atol=tolerance**2)
  for leaf in jax.tree.leaves(gradient):
    np.testing.assert_allclose(leaf, 0.0, atol=tolerance)


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
    values = {
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


# ---------------------------------------------------------------------------------------------
# float32: limits and accuracy
# ---------------------------------------------------------------------------------------------

EXTREME_GAMMAS = np.array([0.0, 1e-6, 1.0, 1e4, 1e6], np.float32)
EXTREME_VARIANCES = np.array([1e-12, 1e-8, 1.0, 1e4, 1e6])


def with_every_gamma(*batches):
  """Batches `[25, ...]` repeated for each extreme gamma, with those gammas: `[125, ...]`."""
  repeated = [
    jax.tree.map(lambda leaf: np.tile(leaf, (5, *[1] * (leaf.ndim - 1))), batch)
    for batch in batches
  ]
  return *repeated, np.repeat(EXTREME_GAMMAS, 25)


@pytest.mark.parametrize('family', FAMILIES)
def test_values_and_gradients_are_finite_in_float32_at_every_extreme(family):
  var_a, var_b = (v.ravel() for v in np.meshgrid(EXTREME_VARIANCES, EXTREME_VARIANCES))

  def make(first, second):
    """Standard deviations along two axes; when dense, turned by an angle."""
    variances = np.stack([first, second], -1)
    if family == 'diagonal':
      return DiagonalGaussian(jnp.ones((25, 2)), jnp.asarray(np.log(variances).astype(np.float32)))
    scale = np.sqrt(variances)[..., None] * [[1.0, 0.0], [0.5, 1.0]]
    return FullGaussian(jnp.ones((25, 2)), jnp.asarray(scale.astype(np.float32)))

  def values(q_a, q_b, gamma):
    return {
      'squared_w2': wasserstein.squared_w2(q_a, q_b),
      'entropic_squared_w2': wasserstein.entropic_squared_w2(q_a, q_b, gamma),
      'entropic_transport_cost': wasserstein.entropic_transport_cost(q_a, q_b, gamma),
    }

  def values_and_gradients(*arguments):
    # What is not finite in any part is not finite in the gradient of the sum.
    results, pullback = jax.vjp(values, *arguments)
    return results, pullback(jax.tree.map(jnp.ones_like, results))

  # One Gaussian against one, for every pair of variances and every gamma.
  function = oracles.quick_jit(jax.vmap(values_and_gradients))
  isotropic = make(var_a, 2.0 * var_a), make(var_b, 2.0 * var_b)
  stretched = make(var_a, var_b), make(var_b, var_a)

  for pair in (isotropic, stretched):
    results = function(*with_every_gamma(*pair))
    for path, leaf in jax.tree_util.tree_leaves_with_path(results):
      assert leaf.dtype == jnp.float32
      assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)


def test_couplings_and_maps_are_finite_in_float32_at_every_extreme():
  var_a, var_b = (v.ravel().astype(np.float32) for v in np.meshgrid(*[EXTREME_VARIANCES] * 2))
  identity = np.eye(2, dtype=np.float32)
  cov_a, cov_b = (v[:, None, None] * identity for v in (var_a, var_b))

  def values(var_a, var_b, cov_a, cov_b, gamma):
    mean = jnp.ones(2)
    q_a, q_b = (DiagonalGaussian(mean, jnp.log(jnp.diagonal(cov))) for cov in (cov_a, cov_b))
    moments = (mean, cov_a, mean, cov_b)
    return (
      wasserstein.optimal_coupling(var_a, var_b),
      wasserstein.entropic_coupling(var_a, var_b, gamma),
      wasserstein.optimal_map(q_a, q_b, 2.0 * mean),
      wasserstein.optimal_coupling_full(cov_a, cov_b),
      wasserstein.entropic_coupling_full(cov_a, cov_b, gamma),
      wasserstein.optimal_map_full(*moments, 2.0 * mean),
      wasserstein.squared_w2_full(*moments),
      wasserstein.entropic_squared_w2_full(*moments, gamma),
      wasserstein.entropic_transport_cost_full(*moments, gamma),
    )

  def values_and_gradients(*arguments):
    # What is not finite in any part is not finite in the gradient of the sum.
    results, pullback = jax.vjp(values, *arguments)
    return results, pullback(jax.tree.map(jnp.ones_like, results))

  function = oracles.quick_jit(jax.vmap(values_and_gradients))
  results = function(*with_every_gamma(var_a, var_b, cov_a, cov_b))
  for path, leaf in jax.tree_util.tree_leaves_with_path(results):
    assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
  # And right: on multiples of the identity both families give sd_a sd_b.
  optimal = np.sqrt(var_a.astype(float) * var_b)
  np.testing.assert_allclose(results[0][0][:25], optimal, rtol=1e-6)
  np.testing.assert_allclose(results[0][3][:25, 0, 0], optimal, rtol=1e-5)


LOG_GAMMAS = np.linspace(-6.0, 6.0, 61)
LOG_VARS = np.log(np.logspace(-8.0, 4.0, 121)).astype(np.float32)


def factorised_on_a_grid(function):
  """`function(q_a, q_b, gamma)` in float32, `[61, 121, 121]`, and the grid in long double."""
  log_var_a, log_var_b = np.meshgrid(LOG_VARS, LOG_VARS, indexing='ij')
  q_a, q_b = (
    DiagonalGaussian(jnp.zeros((121, 121, 1)), jnp.asarray(v)[..., None])
    for v in (log_var_a, log_var_b)
  )
  gammas = (10.0**LOG_GAMMAS).astype(np.float32)
  values = jax.jit(lambda q_a, q_b, g: jax.lax.map(lambda g: function(q_a, q_b, g), g))(
    q_a, q_b, gammas
  )
  gammas = gammas[:, None, None]
  return tuple(np.asarray(x, LONG) for x in (values, log_var_a, log_var_b, gammas))


def test_factorised_cost_is_accurate_in_float32():
  values, log_var_a, log_var_b, gammas = factorised_on_a_grid(wasserstein.entropic_transport_cost)
  expected = oracles.paper_scalar_cost(0.0, log_var_a, 0.0, log_var_b, gammas)
  error = np.abs(values - expected)
  # The cost is a sum: gamma/2 W2^2 >= 0, what the coupling adds to it >= 0, minus the two entropies
  # 1/2 log var + 1/2 log(2 pi e). Each is good to a few units in the last place.
  transport = gammas / 2 * (np.exp(log_var_a / 2) - np.exp(log_var_b / 2)) ** 2
  excess = expected - transport + (log_var_a + log_var_b) / 2 + np.log(2 * LONG(np.pi)) + 1
  assert excess.min() > -1e-9
  terms = transport + excess + (np.abs(log_var_a) + np.abs(log_var_b)) / 2 + 2.84
  assert np.max(error / terms) < 4.0 * np.finfo(np.float32).eps
  # Where terms of order 10 cancel, 1e-6 is their last place. How many points of this grid miss it
  # depends on how a JAX version rounds. Each misses it by less than half a unit in the last place
  # of the log-variances is worth, which is what rounding the arguments alone may cost.
  missed = error > np.maximum(1e-6, 1e-5 * np.abs(expected))
  assert np.all(error < 2e-6 + 1e-5 * np.abs(expected))
  at = [np.broadcast_to(x, values.shape)[missed] for x in (log_var_a, log_var_b, gammas)]
  moved = oracles.cost_of_half_a_unit(*(x.astype(np.float32) for x in at))
  assert np.all(error[missed] < moved)


def test_factorised_distances_and_couplings_keep_their_relative_accuracy_in_float32():
  # All are sums and products of positive numbers: nothing cancels, whatever gamma. The tolerance
  # is for the rounding of a difference of log-variances (half an exponent's 2e-6), and for expm1.
  values, log_var_a, log_var_b, gammas = factorised_on_a_grid(wasserstein.entropic_squared_w2)
  sd_a, sd_b = np.exp(log_var_a / 2), np.exp(log_var_b / 2)
  product = sd_a * sd_b
  # Eq. 24 times (u + 1) / (u + 1), and what it falls short of sd_a sd_b by.
  t = 2 * gammas * product
  psi = product * t / (np.sqrt(1 + t**2) + 1)
  gap = product * (1 + 1 / (np.sqrt(1 + t**2) + t)) / (np.sqrt(1 + t**2) + 1)
  np.testing.assert_allclose(  # both against Eq. 24 as printed, where that keeps its digits
    *(np.where((t > 1e-3) & (t < 1e3), x, 1).astype(float) for x in (product - psi, gap)), rtol=1e-9
  )
  middle = t > 1e-3
  printed = oracles.paper_scalar_coupling(np.exp(log_var_a), np.exp(log_var_b), gammas)
  np.testing.assert_allclose(psi[middle].astype(float), printed[middle].astype(float), rtol=1e-9)
  expected = (sd_a - sd_b) ** 2 + 2 * gap
  assert np.max(np.abs(values / expected - 1)) < 3e-6
  values, *_ = factorised_on_a_grid(
    lambda a, b, g: wasserstein.entropic_coupling(a.var, b.var, g)[..., 0]
  )
  assert np.max(np.abs(values / psi - 1)) < 1e-6
  values, *_ = factorised_on_a_grid(lambda a, b, g: wasserstein.squared_w2(a, b))
  expected = np.broadcast_to((sd_a - sd_b) ** 2, values.shape)
  different = expected > 0
  assert np.max(np.abs(values[different] / expected[different] - 1)) < 3e-6
  assert np.all(values[~different] == 0.0)


def test_squared_w2_keeps_its_relative_accuracy_in_float32_near_equal_variances():
  # Subtracting the standard deviations would leave three digits where they differ by 1e-4.
  log_var_b = np.full(100, -2.5, np.float32)
  log_var_a = log_var_b + np.logspace(-4, -1, 100).astype(np.float32)
  zero = jnp.zeros((100, 1))
  q_a, q_b = (DiagonalGaussian(zero, jnp.asarray(v)[:, None]) for v in (log_var_a, log_var_b))
  sd_a, sd_b = (np.exp(v.astype(LONG) / 2) for v in (log_var_a, log_var_b))
  error = np.asarray(jax.jit(wasserstein.squared_w2)(q_a, q_b), LONG) / (sd_a - sd_b) ** 2 - 1
  assert np.max(np.abs(error)) < 3e-6


def test_factorised_cost_rises_with_gamma_in_float32():
  # Monotone up to the accuracy asserted above: steps of the grid are a factor of 1.6 in gamma, and
  # where gamma is too small to matter the cost is flat.
  values, *_ = factorised_on_a_grid(wasserstein.entropic_transport_cost)
  falls = np.maximum(values[:-1] - values[1:], 0.0)
  assert np.max(falls / np.maximum(1e-6, 1e-5 * np.abs(values[1:]))) < 2.4


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_gradients_in_float32_are_those_in_float64(family):
  rng = np.random.default_rng(92)
  (p_a, _), (p_b, _) = (oracles.family(family, rng, 3) for _ in range(2))
  standard = oracles.standard_normal(3)
  pairs = [(p_a, p_b), (p_a, p_a), (standard, standard), (p_a, standard)]

  def gradients(q_a, q_b, gamma):
    def total(q_a, q_b, gamma):
      if family == 'full':
        q_a, q_b = (FullGaussian(q.mean, jnp.tril(q.scale_tril)) for q in (q_a, q_b))
      distances = wasserstein.squared_w2(q_a, q_b) + wasserstein.entropic_squared_w2(
        q_a, q_b, gamma
      )
      return distances + wasserstein.entropic_transport_cost(q_a, q_b, gamma)

    return jax.grad(total, (0, 1, 2))(q_a, q_b, gamma)

  function = oracles.quick_jit(jax.vmap(gradients))
  batches = []
  for dtype in (jnp.float32, jnp.float64):
    make = functools.partial(getattr(oracles, family), dtype=dtype)
    cases = [(make(a), make(b), dtype(g)) for a, b in pairs for g in (0.0, 0.7, 100.0)]
    results = function(*oracles.batch_of(cases, (12,)))
    batches.append([np.asarray(leaf) for leaf in jax.tree.leaves(results)])
  for actual, expected in zip(*batches, strict=True):
    assert actual.dtype == jnp.float32
    # The three functions add terms of the size of the largest gradient, or of gamma's share of it.
    tolerance = 32.0 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=tolerance)


# With all of LLVM's optimisations, since what is tested is the rounding.
ALL_COSTS = jax.jit(
  lambda q_a, q_b, gamma: (
    wasserstein.squared_w2(q_a, q_b),
    wasserstein.entropic_transport_cost(q_a, q_b, gamma),
    wasserstein.entropic_squared_w2(q_a, q_b, gamma),
  )
)


@pytest.mark.parametrize('condition', (1.0, 1e2, 1e4))
@in_float64
def test_full_covariance_is_accurate_in_float32_relative_to_its_terms(condition):
  # The references are the same functions in float64, which the tests above hold to 1e-11.
  rng = np.random.default_rng(90)
  single = []
  for _ in range(2):
    moments = [oracles.random_moments(rng, 4, condition) for _ in range(20)]
    single.append(oracles.full(Moments(*map(np.stack, zip(*moments, strict=True))), jnp.float32))
  double = [jax.tree.map(lambda leaf: leaf.astype(jnp.float64), q) for q in single]
  shift = np.sum(np.asarray(double[0].mean - double[1].mean) ** 2, -1)
  squares = np.asarray(double[0].trace() + double[1].trace()) + shift
  entropies = sum(np.abs(np.asarray(gaussians.entropy(q))) for q in double)

  eps = np.finfo(np.float32).eps
  for gamma in 10.0 ** np.arange(-6, 7):
    values = [np.asarray(value) for value in ALL_COSTS(*single, np.float32(gamma))]
    assert {value.dtype for value in values} == {np.dtype(np.float32)}
    errors = [
      np.abs(value - np.asarray(expected))
      for value, expected in zip(values, ALL_COSTS(*double, float(np.float32(gamma))), strict=True)
    ]
    # For every condition number and every gamma. A square root of a matrix that has already been
    # squared would put the distance off by a factor at a condition number of 1e4.
    assert np.max(errors[0] / squares) < 4.0 * eps
    assert np.max(errors[1] / (gamma * squares + entropies + 10.0)) < 4.0 * eps
    assert np.max(errors[2] / squares) < 12.0 * eps


@pytest.mark.parametrize('condition', (1.0, 1e2, 1e4))
@in_float64
def test_full_coupling_is_accurate_in_float32_relative_to_the_covariances(condition):
  rng = np.random.default_rng(91)
  arguments = [
    np.stack([oracles.random_covariance(rng, 4, condition) for _ in range(20)]) for _ in range(2)
  ]
  single = [jnp.asarray(x, jnp.float32) for x in arguments]
  coupling = jax.jit(wasserstein.entropic_coupling_full)
  for gamma in 10.0 ** np.arange(-2, 7):  # below, the reference's 1 / (2 gamma) cancels
    expected = [
      oracles.riccati_solution(np.asarray(cov_a, float), np.asarray(cov_b, float), gamma)
      for cov_a, cov_b in zip(*single, strict=True)
    ]
    error = np.abs(np.asarray(coupling(*single, gamma)) - expected).max((-2, -1))
    # No entry of Psi exceeds the geometric mean of the largest variances.
    size = np.sqrt(np.prod([np.abs(x).max((-2, -1)) for x in arguments], axis=0))
    # The square root of a covariance is good to the root of rounding along its least axis.
    assert np.max(error / size) < (10.0 + condition**0.5) * np.finfo(np.float32).eps


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------

FLAT = DiagonalGaussian(np.zeros(3, np.float32), np.zeros(3, np.float32))
DENSE = FullGaussian(np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
MEAN, COV = DENSE.mean, DENSE.scale_tril
PAIR_FUNCTIONS = {
  'squared_w2': wasserstein.squared_w2,
  'entropic_squared_w2': lambda a, b: wasserstein.entropic_squared_w2(a, b, 1.0),
  'entropic_transport_cost': lambda a, b: wasserstein.entropic_transport_cost(a, b, 1.0),
  'optimal_map': lambda a, b: wasserstein.optimal_map(a, b, b.mean),
}
GAMMA_FUNCTIONS = {
  'entropic_squared_w2': lambda g: wasserstein.entropic_squared_w2(FLAT, FLAT, g),
  'entropic_transport_cost': lambda g: wasserstein.entropic_transport_cost(FLAT, FLAT, g),
  'entropic_coupling': lambda g: wasserstein.entropic_coupling(FLAT.var, FLAT.var, g),
  'entropic_coupling_full': lambda g: wasserstein.entropic_coupling_full(COV, COV, g),
  'entropic_squared_w2_full': lambda g: wasserstein.entropic_squared_w2_full(
    MEAN, COV, MEAN, COV, g
  ),
  'entropic_transport_cost_full': lambda g: wasserstein.entropic_transport_cost_full(
    MEAN, COV, MEAN, COV, g
  ),
}
COUPLINGS = {
  'optimal_coupling': wasserstein.optimal_coupling,
  'entropic_coupling': lambda a, b: wasserstein.entropic_coupling(a, b, 1.0),
  'optimal_coupling_full': wasserstein.optimal_coupling_full,
  'entropic_coupling_full': lambda a, b: wasserstein.entropic_coupling_full(a, b, 1.0),
}
MOMENT_FUNCTIONS = {
  'squared_w2_full': wasserstein.squared_w2_full,
  'entropic_squared_w2_full': lambda *m: wasserstein.entropic_squared_w2_full(*m, 1.0),
  'entropic_transport_cost_full': lambda *m: wasserstein.entropic_transport_cost_full(*m, 1.0),
  'optimal_map_full': lambda *m: wasserstein.optimal_map_full(*m, MEAN),
}


def wrap(function, jit):
  return jax.jit(lambda *arguments: function(*arguments)) if jit else function


@pytest.mark.parametrize('jit', (False, True))
@pytest.mark.parametrize('name', PAIR_FUNCTIONS)
def test_pairs_that_do_not_fit_are_refused(name, jit):
  function = wrap(PAIR_FUNCTIONS[name], jit)
  with pytest.raises(TypeError, match='must be of one family'):
    function(FLAT, DENSE)
  for other in (
    DiagonalGaussian(np.zeros(1, np.float32), np.zeros(1, np.float32)),
    DiagonalGaussian(np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32)),
  ):
    with pytest.raises(AssertionError, match='must have one shape'):
      function(FLAT, other)
  bad = FullGaussian(np.zeros(3, np.float32), np.zeros((3, 2), np.float32))
  with pytest.raises(AssertionError, match='FullGaussian needs'):
    function(bad, bad)


@pytest.mark.parametrize('name', GAMMA_FUNCTIONS)
def test_gamma_that_is_no_coupling_strength_is_refused(name):
  function = GAMMA_FUNCTIONS[name]
  for gamma in (-1.0, -1e-9, np.nan, np.inf, np.float32(-1.0), jnp.float32(jnp.nan)):
    with pytest.raises(ValueError, match='gamma must be finite and >= 0'):
      function(gamma)
  for jit in (False, True):
    with pytest.raises(AssertionError, match='gamma must be a scalar'):
      wrap(function, jit)(np.ones(3, np.float32))


@pytest.mark.parametrize('jit', (False, True))
@pytest.mark.parametrize('name', COUPLINGS)
def test_covariances_that_do_not_fit_are_refused(name, jit):
  function = wrap(COUPLINGS[name], jit)
  with pytest.raises(AssertionError, match='must have one shape'):
    function(COV, np.eye(2, dtype=np.float32))
  with pytest.raises(AssertionError, match='must have one shape'):
    function(COV, COV[None])
  if name.endswith('_full'):
    for bad in (np.zeros((3, 2), np.float32), np.zeros(3, np.float32)):
      with pytest.raises(AssertionError, match='must be square'):
        function(bad, bad)


@pytest.mark.parametrize('jit', (False, True))
@pytest.mark.parametrize('name', MOMENT_FUNCTIONS)
def test_moments_that_do_not_fit_are_refused(name, jit):
  function = wrap(MOMENT_FUNCTIONS[name], jit)
  oblong = np.zeros((3, 2), np.float32)
  for moments in ((MEAN, oblong, MEAN, COV), (MEAN, COV, MEAN, oblong), (MEAN[:2], COV, MEAN, COV)):
    with pytest.raises(AssertionError, match='a full covariance needs'):
      function(*moments)
  with pytest.raises(AssertionError, match='must have one shape'):
    function(MEAN, COV, MEAN[:2], COV[:2, :2])


@pytest.mark.parametrize('jit', (False, True))
def test_points_that_do_not_fit_the_map_are_refused(jit):
  for z in (np.zeros(1, np.float32), np.zeros((2, 3), np.float32)):
    with pytest.raises(AssertionError, match='must have one shape'):
      wrap(wasserstein.optimal_map, jit)(FLAT, FLAT, z)
    with pytest.raises(AssertionError, match='must have one shape'):
      wrap(wasserstein.optimal_map, jit)(DENSE, DENSE, z)
    with pytest.raises(AssertionError, match='must have one shape'):
      wrap(wasserstein.optimal_map_full, jit)(MEAN, COV, MEAN, COV, z)


@pytest.mark.parametrize('shape', [(2, 3), (3, 2)])
def test_covariances_that_are_not_square_are_refused(shape):
  with pytest.raises(AssertionError, match='square'):
    wasserstein.optimal_coupling_full(jnp.ones(shape), jnp.ones(shape))
