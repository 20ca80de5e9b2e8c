"""Transport costs against Sinkhorn, a numerical minimiser, linear programming and the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import wasserstein
from se_vae.gaussians import DiagonalGaussian, FullGaussian
from tests import oracles
from tests.oracles import Moments, in_float64
from tests.transport import (
  EXACT,
  FAMILIES,
  coupling_of,
  entropic_coupling,
  entropic_coupling_full,
  entropic_squared_w2,
  entropic_transport_cost,
  moment_arguments,
  pair,
  squared_w2,
)

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
