"""The Autoencoding VAE's bound, against closed forms of a linear model and the written KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import objectives
from se_vae.gaussians import DiagonalGaussian
from tests import oracles
from tests.oracles import Moments, in_float64

FAMILIES = ('diagonal', 'full')


def batch_of_one(make, p):
  return make(Moments(p.mean[None], p.cov[None]))


def rho_of(gamma):
  return max(np.roots([gamma, 1.0, -gamma])) if gamma else 0.0


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('gamma', (0.0, 0.4, 25.0))
@in_float64
def test_consistency_is_the_divergence_from_the_conditional(family, gamma):
  rng = np.random.default_rng(0)
  (p, _), z, rho = oracles.family(family, rng, 3), rng.normal(size=3), rho_of(gamma)
  conditional = Moments(rho * z, (1.0 - rho**2) * np.eye(3))
  value = objectives.consistency_kl(z[None], batch_of_one(getattr(oracles, family), p), gamma)
  np.testing.assert_allclose(value[0], oracles.kl_divergence(p, conditional), rtol=1e-10)


class Linear:
  """Decoder W z and encoders of x and x~ that are affine, of 5 pixels and 2 latents."""

  def __init__(self, gamma, seed=1):
    rng = np.random.default_rng(seed)
    self.model = oracles.LinearModel(rng.normal(size=(5, 2)), 0.3, 0.0, 'balanced')
    self.x = rng.normal(size=5)
    self.encoder = rng.normal(size=(2, 5)) * 0.3
    self.bias = rng.normal(size=2) * 0.1
    self.cov = np.diag([0.2, 0.5])
    self.rho = rho_of(gamma)

  def encode(self, x):
    return Moments(self.encoder @ x + self.bias, self.cov)

  def expected_bound(self):
    """E over z of the bound, from quadrature of order 2, which is exact for quadratics."""
    p = self.encode(self.x)

    def one(z):
      conditional = Moments(self.rho * z, (1.0 - self.rho**2) * np.eye(2))
      return oracles.kl_divergence(self.encode(self.model.weights @ z), conditional)

    consistency = oracles.expectation(p, lambda zs: np.array([one(z) for z in zs]), order=3)
    kl = oracles.kl_divergence(p, oracles.standard_normal(2))
    return self.model.expected_log_likelihood(p, self.x) - kl - consistency


@pytest.mark.parametrize('gamma', (0.5, 5.0))
@in_float64
def test_the_sampled_bound_has_the_mean_of_the_exact_one_which_is_a_bound(gamma):
  linear, count = Linear(gamma), 4000
  p = linear.encode(linear.x)
  z = np.random.default_rng(2).normal(size=(count, 2)) * np.sqrt(np.diag(p.cov)) + p.mean
  x_mean = z @ linear.model.weights.T
  cycle = x_mean @ linear.encoder.T + linear.bias
  log_var = np.broadcast_to(np.log(np.diag(linear.cov)), z.shape)
  terms = jax.jit(objectives.avae_elbo)(
    np.broadcast_to(linear.x, x_mean.shape),
    x_mean,
    DiagonalGaussian(jnp.broadcast_to(p.mean, z.shape), jnp.asarray(log_var)),
    z,
    DiagonalGaussian(jnp.asarray(cycle), jnp.asarray(log_var)),
    gamma=gamma,
    obs_var=linear.model.obs_var,
  )
  exact = linear.expected_bound()
  error = np.std(terms.elbo) / np.sqrt(count)
  assert abs(np.mean(terms.elbo) - exact) < 4.0 * error
  assert exact < linear.model.log_marginal(linear.x)
  np.testing.assert_allclose(
    terms.elbo, terms.log_likelihood - terms.kl - terms.consistency_kl, rtol=1e-12
  )


@in_float64
def test_a_consistent_encoder_pays_nothing():
  """E(W z) = N(rho z, (1 - rho^2) I): the bound is the ELBO."""
  gamma, rng = 4.0, np.random.default_rng(3)
  rho, weights = rho_of(gamma), rng.normal(size=(5, 2))
  z = jnp.asarray(rng.normal(size=(6, 2)))
  mean = z @ weights.T @ (rho * np.linalg.pinv(weights)).T
  cycle = DiagonalGaussian(mean, jnp.full((6, 2), np.log(1.0 - rho**2)))
  x, q = jnp.asarray(rng.normal(size=(6, 5))), DiagonalGaussian(z, 0.1 * z)
  x_mean = z @ weights.T
  terms = objectives.avae_elbo(x, x_mean, q, z, cycle, gamma=gamma, obs_var=0.3)
  np.testing.assert_allclose(terms.consistency_kl, 0.0, atol=1e-12)
  np.testing.assert_allclose(
    terms.elbo, objectives.elbo(x, x_mean, q, obs_var=0.3).elbo, rtol=1e-12
  )


@pytest.mark.parametrize('coupling', ('paper', 'balanced'))
@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_se_avae_is_the_se_elbo_less_the_divergence(family, coupling):
  rng = np.random.default_rng(5)
  (_, q_a), (_, q_b), (p_c, q_c) = (oracles.family(family, rng, 2) for _ in range(3))
  q_a, q_b, q_c = (jax.tree.map(lambda leaf: leaf[None], q) for q in (q_a, q_b, q_c))
  x, x_mean = jnp.asarray(rng.normal(size=(2, 1, 5)))
  z, gamma = rng.normal(size=2), 3.0
  numbers = {'gamma': gamma, 'obs_var': 0.3, 'coupling': coupling}
  terms = objectives.se_avae_elbo(x, x_mean, q_a, q_b, jnp.asarray(z[None]), q_c, **numbers)
  smooth = objectives.se_elbo(x, x_mean, q_a, q_b, **numbers)
  rho = rho_of(gamma)
  conditional = Moments(rho * z, (1.0 - rho**2) * np.eye(2))
  missing = oracles.kl_divergence(p_c, conditional)
  np.testing.assert_allclose(terms.elbo, smooth.elbo - missing, rtol=1e-11)
  np.testing.assert_allclose(terms.normalized_elbo, smooth.normalized_elbo - missing, rtol=1e-11)
  for name in ('log_likelihood', 'log_prior_a', 'log_prior_b', 'transport_cost'):
    np.testing.assert_array_equal(getattr(terms, name), getattr(smooth, name))


def test_shapes_that_do_not_fit_are_refused():
  q = DiagonalGaussian(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
  with pytest.raises(AssertionError, match='z and q_cycle must have one shape'):
    objectives.consistency_kl(jnp.zeros((1, 3)), q, 1.0)
  with pytest.raises(AssertionError, match='z must be floating point'):
    objectives.consistency_kl(jnp.zeros((2, 3), jnp.int32), q, 1.0)
  x, other = jnp.zeros((2, 5)), DiagonalGaussian(jnp.zeros((1, 3)), jnp.zeros((1, 3)))
  with pytest.raises(AssertionError, match='q_cycle needs means'):
    objectives.avae_elbo(x, x, q, jnp.zeros((2, 3)), other, gamma=1.0, obs_var=0.1)
