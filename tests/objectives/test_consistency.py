"""The Autoencoding VAE's bound, against divergences of the joint Gaussians and a linear model."""

import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import objectives
from se_vae.gaussians import DiagonalGaussian
from tests import oracles
from tests.oracles import Moments, in_float64

FAMILIES = ('diagonal', 'full')
avae_elbo = oracles.quick_jit(objectives.avae_elbo)


def batch_of_one(family, p):
  return getattr(oracles, family)(Moments(p.mean[None], p.cov[None]))


def rho_of(gamma):
  return max(np.roots([gamma, 1.0, -gamma])) if gamma else 0.0


def least_divergence(p, p_cycle, gamma):
  """E KL(Q(z~ | z) || N(rho z, (1 - rho^2) I)) by the chain rule, for the best joint Gaussian."""
  cross = oracles.minimise_coupling(p, p_cycle, gamma).cross_covariance
  dim, rho = len(p.mean), rho_of(gamma)
  joint = Moments(
    np.concatenate([p.mean, p_cycle.mean]), oracles.joint_covariance(p, p_cycle, cross)
  )
  prior = Moments(np.zeros(2 * dim), np.kron([[1.0, rho], [rho, 1.0]], np.eye(dim)))
  return oracles.kl_divergence(joint, prior) - oracles.kl_divergence(
    p, oracles.standard_normal(dim)
  )


def drawn(family, seed, dim=2):
  """Moments of an encoding and of one of x~, and their Gaussians with one example."""
  rng = np.random.default_rng(seed)
  moments = [oracles.family(family, rng, dim)[0] for _ in range(2)]
  return moments, [batch_of_one(family, p) for p in moments]


@oracles.quick_jit
def avae_and_plain_elbo(x, x_mean, q, q_cycle, gamma):
  avae = objectives.avae_elbo(x, x_mean, q, q_cycle, gamma=gamma, obs_var=0.3)
  return avae, objectives.elbo(x, x_mean, q, obs_var=0.3)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('gamma', (0.0, 0.4, 25.0))
@in_float64
def test_the_consistency_is_the_least_expected_divergence(family, gamma):
  (p, p_cycle), (q, q_cycle) = drawn(family, 0)
  x, x_mean = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 5)))
  terms, plain = avae_and_plain_elbo(x, x_mean, q, q_cycle, gamma)
  least = least_divergence(p, p_cycle, gamma)
  np.testing.assert_allclose(terms.consistency_kl[0], least, rtol=1e-6)
  np.testing.assert_allclose(terms.elbo, plain.elbo - terms.consistency_kl, rtol=1e-12)
  for name in ('log_likelihood', 'kl'):
    np.testing.assert_array_equal(getattr(terms, name), getattr(plain, name))


class Linear:
  """A decoder W z of 5 pixels and 2 latents, one image, and encodings of it and of x~."""

  def __init__(self, gamma, seed=1):
    rng = np.random.default_rng(seed)
    self.model = oracles.LinearModel(rng.normal(size=(5, 2)), 0.3, gamma, 'balanced')
    self.x, self.gamma = rng.normal(size=5), gamma

  def bound(self, p, p_cycle):
    """The bound with the exact E log p(x | z) in place of the decoded sample's."""
    q, q_cycle = batch_of_one('full', p), batch_of_one('full', p_cycle)
    x = jnp.asarray(self.x[None])
    numbers = {'gamma': self.gamma, 'obs_var': self.model.obs_var}
    terms = avae_elbo(x, x, q, q_cycle, **numbers)
    sampled, exact = terms.log_likelihood, self.model.expected_log_likelihood(p, self.x)
    return float(terms.elbo[0] - sampled[0] + exact)


@pytest.mark.parametrize('gamma', (0.5, 5.0))
@in_float64
def test_it_is_a_lower_bound_whatever_was_decoded(gamma):
  linear, rng = Linear(gamma), np.random.default_rng(2)
  for _ in range(20):
    p, p_cycle = oracles.random_moments(rng, 2), oracles.random_moments(rng, 2)
    assert linear.bound(p, p_cycle) < linear.model.log_marginal(linear.x)


@pytest.mark.parametrize('gamma', (0.5, 5.0))
@in_float64
def test_it_is_tight_at_the_posterior_and_a_consistent_encoding(gamma):
  linear = Linear(gamma)
  joint = linear.model.posterior(linear.x)  # of z, and of a second latent that is not decoded
  p, p_cycle = (Moments(joint.mean[part], joint.cov[part, part]) for part in np.s_[:2, 2:])
  np.testing.assert_allclose(linear.bound(p, p_cycle), linear.model.log_marginal(linear.x))


@pytest.mark.parametrize('coupling', ('paper', 'balanced'))
@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_se_avae_is_the_se_elbo_less_the_divergence(family, coupling):
  (p, p_cycle), (q_a, q_cycle) = drawn(family, 5)
  _, (q_b, _) = drawn(family, 6)
  x, x_mean = jnp.asarray(np.random.default_rng(7).normal(size=(2, 1, 5)))
  numbers = {'gamma': 3.0, 'obs_var': 0.3, 'coupling': coupling}

  @oracles.quick_jit
  def both(x, x_mean, q_a, q_b, q_cycle):
    terms = objectives.se_avae_elbo(x, x_mean, q_a, q_b, q_cycle, **numbers)
    return terms, objectives.se_elbo(x, x_mean, q_a, q_b, **numbers)

  terms, smooth = both(x, x_mean, q_a, q_b, q_cycle)
  missing = least_divergence(p, p_cycle, 3.0)
  np.testing.assert_allclose(terms.elbo, smooth.elbo - missing, rtol=1e-6)
  np.testing.assert_allclose(terms.normalized_elbo, smooth.normalized_elbo - missing, rtol=1e-6)
  for name in ('log_likelihood', 'log_prior_a', 'log_prior_b', 'transport_cost'):
    np.testing.assert_array_equal(getattr(terms, name), getattr(smooth, name))


def test_a_large_log_likelihood_leaves_the_consistency_its_digits():
  p, p_cycle = (oracles.random_diagonal_moments(np.random.default_rng(i), 2) for i in range(2))
  q, q_cycle = (
    DiagonalGaussian(*(np.float32(v[None]) for v in (m.mean, np.log(np.diag(m.cov)))))
    for m in (p, p_cycle)
  )
  x = jnp.ones((1, 784), jnp.float32)
  terms = avae_elbo(x, 0.0 * x, q, q_cycle, gamma=5.0, obs_var=1e-5)
  assert abs(terms.log_likelihood[0]) > 1e7
  np.testing.assert_allclose(terms.consistency_kl[0], least_divergence(p, p_cycle, 5.0), rtol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
  q = DiagonalGaussian(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
  x, other = jnp.zeros((2, 5)), DiagonalGaussian(jnp.zeros((1, 3)), jnp.zeros((1, 3)))
  with pytest.raises(AssertionError, match='q_cycle needs means'):
    objectives.avae_elbo(x, x, q, other, gamma=1.0, obs_var=0.1)
