"""The balanced coupling: its numbers, its relation to the paper's, and its derivatives.

That the bound is tight and a bound is tested in `test_bounds`, for both couplings.
"""

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import objectives
from se_vae.gaussians import DiagonalGaussian, FullGaussian
from se_vae.objectives.smooth import log_conditional_variance
from tests import oracles
from tests.oracles import Moments, in_float64

FAMILIES = ('diagonal', 'full')
# `test_bounds` holds the same of full covariances, with the paper's coupling.
DIAGONAL_AND_SLOW_FULL = ('diagonal', pytest.param('full', marks=pytest.mark.slow))
correlation = oracles.quick_jit(objectives.correlation)
log_variance = oracles.quick_jit(log_conditional_variance)
se_elbo = oracles.quick_jit(objectives.se_elbo, static_argnames='coupling')
GAMMAS = (0.0, 1e-6, 1e-3, 0.5, 1.0, 30.0, 1e3, 1e6)


def exact(gamma):
  """rho and log(1 - rho^2) with 50 digits."""
  decimal.getcontext().prec = 50
  gamma = decimal.Decimal(float(np.float32(gamma)))
  if not gamma:
    return 0.0, 0.0
  rho = ((1 + 4 * gamma**2).sqrt() - 1) / (2 * gamma)
  return float(rho), float((1 - rho**2).ln())


@pytest.mark.parametrize('gamma', GAMMAS)
def test_correlation_has_all_digits_in_float32(gamma):
  rho, log_var = exact(gamma)
  gamma = jnp.float32(gamma)
  # A few roundings of float32; no cancellation at either end.
  np.testing.assert_allclose(correlation(gamma), rho, rtol=3e-7)
  np.testing.assert_allclose(log_variance(gamma), log_var, rtol=3e-7, atol=1.2e-7)


@pytest.mark.parametrize('gamma', (0.1, 1.0, 30.0))
@in_float64
def test_gamma_is_rho_over_one_minus_rho_squared(gamma):
  rho = float(correlation(gamma))
  np.testing.assert_allclose(rho / (1.0 - rho**2), gamma, rtol=1e-11)
  np.testing.assert_allclose(log_variance(gamma), np.log1p(-(rho**2)), rtol=1e-11)


def test_correlation_has_a_gradient_everywhere():
  slope = oracles.quick_jit(jax.vmap(jax.grad(objectives.correlation)))(
    jnp.asarray([0.0, 1.0, 1e6], jnp.float32)
  )
  # d rho / d gamma is 1 at 0, and 1 / (2 gamma^2) far out.
  np.testing.assert_allclose(slope[0], 1.0, rtol=1e-6)
  assert 0.0 < slope[1] < 1.0 and 0.0 <= slope[2] < 1e-11


def test_the_largest_gamma_of_float32_does_not_overflow():
  assert correlation(jnp.float32(1e38)) == 1.0
  assert np.isfinite(log_variance(jnp.float32(1e38)))


@pytest.mark.parametrize('function', [objectives.correlation, objectives.balanced_gamma])
def test_wrong_strengths_are_refused(function):
  for gamma in (-1.0, np.nan, np.inf):
    with pytest.raises(ValueError, match='gamma must be finite and >= 0'):
      function(gamma)
  with pytest.raises(AssertionError, match='gamma must be a scalar'):
    function(jnp.ones(2))


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('gamma', (0.0, 0.7, 10.0))
@in_float64
def test_the_papers_coupling_is_a_balanced_one_in_other_units(family, gamma):
  """With latents in units of the deviation s of the paper's prior, the bounds are equal."""
  rng = np.random.default_rng(4)
  make = getattr(oracles, family)
  moments = [oracles.family(family, rng, 3)[0] for _ in range(2)]
  s = np.sqrt((1.0 + gamma) / (1.0 + 2.0 * gamma))
  scaled = [Moments(p.mean / s, p.cov / s**2) for p in moments]
  x, x_mean = jnp.asarray(rng.normal(size=(2, 1, 5)))

  def bound(pair, gamma, coupling):
    q_a, q_b = (make(Moments(p.mean[None], p.cov[None])) for p in pair)
    options = {'gamma': gamma, 'obs_var': 0.3, 'coupling': coupling}
    return se_elbo(x, x_mean, q_a, q_b, **options).normalized_elbo[0]

  paper = bound(moments, gamma, 'paper')
  balanced = bound(scaled, objectives.balanced_gamma(gamma), 'balanced')
  np.testing.assert_allclose(balanced, paper, rtol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize('family', DIAGONAL_AND_SLOW_FULL)
@in_float64
def test_first_and_second_derivatives_match_finite_differences(family):
  rng = np.random.default_rng(9)
  (_, q_a), (_, q_b) = (oracles.family(family, rng, 2) for _ in range(2))
  q_a, q_b = (jax.tree.map(lambda leaf: leaf[None], q) for q in (q_a, q_b))
  x, x_mean = jnp.asarray(rng.normal(size=(2, 1, 3)))

  def terms(x, x_mean, q_a, q_b, gamma, obs_var):
    if family == 'full':  # above the diagonal there is no parameter
      q_a, q_b = (FullGaussian(q.mean, jnp.tril(q.scale_tril)) for q in (q_a, q_b))
    numbers = {'gamma': gamma, 'obs_var': obs_var}
    return objectives.se_avae_elbo(x, x_mean, q_a, q_b, q_b, **numbers, coupling='balanced')

  check = oracles.DerivativeCheck(terms, (x, x_mean, q_a, q_b, 1.0, 0.5))
  for gamma in (0.0, 0.8):
    check(x, x_mean, q_a, q_b, gamma, 0.5)


@pytest.mark.parametrize('family', DIAGONAL_AND_SLOW_FULL)
def test_values_and_gradients_are_finite_in_float32_at_every_extreme(family):
  variances = np.array([1e-12, 1.0, 1e6])
  var_a, var_b = (v.ravel() for v in np.meshgrid(variances, variances))
  mean = np.ones((9, 2), np.float32)

  def make(var):
    if family == 'diagonal':
      return DiagonalGaussian(mean, np.log(var[:, None] * [1.0, 2.0]).astype(np.float32))
    tril = np.array([[1.0, 0.0], [0.5, 1.0]], np.float32)
    return FullGaussian(mean, np.sqrt(var).astype(np.float32)[:, None, None] * tril)

  def total(x_mean, q_a, q_b, gamma):
    x = jnp.zeros_like(x_mean)
    options = {'gamma': gamma, 'obs_var': 0.1, 'coupling': 'balanced'}
    return jnp.sum(objectives.se_avae_elbo(x, x_mean, q_a, q_b, q_b, **options).elbo)

  function = oracles.quick_jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))
  ones = np.ones((9, 3), np.float32)
  for gamma in map(np.float32, (0.0, 1e-6, 1.0, 1e4, 1e6)):
    for leaf in jax.tree.leaves(function(ones, make(var_a), make(var_b), gamma)):
      assert leaf.dtype == jnp.float32
      assert np.all(np.isfinite(leaf)), gamma


def test_an_unknown_coupling_is_refused():
  q = DiagonalGaussian(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
  x = jnp.zeros((1, 3))
  with pytest.raises(ValueError, match="coupling must be one of paper, balanced, got 'full'"):
    objectives.se_elbo(x, x, q, q, gamma=1.0, obs_var=0.1, coupling='full')
