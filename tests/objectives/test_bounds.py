"""The objectives against quadrature, and against a model whose evidence is known exactly."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import objectives
from se_vae.config import COUPLINGS
from se_vae.gaussians import DiagonalGaussian, FullGaussian
from tests import oracles
from tests.oracles import Moments, in_float64

FAMILIES = ('diagonal', 'full')
# Closed forms and exact quadrature in float64: rounding only.
EXACT = {'rtol': 1e-11, 'atol': 1e-11}

elbo = oracles.quick_jit(objectives.elbo)
se_elbo = oracles.quick_jit(objectives.se_elbo, static_argnames='coupling')


def linear_model(family, gamma, coupling='paper', seed=0):
  """A linear-Gaussian model of 5 pixels and 2 latents whose posterior is of the family."""
  rng = np.random.default_rng(seed)
  weights = rng.normal(size=(5, 2))
  if family == 'diagonal':  # orthogonal columns of unlike lengths
    weights = np.linalg.qr(weights)[0] * [0.7, 2.0]
  return oracles.LinearModel(weights, 0.3, gamma, coupling), rng.normal(size=5)


def batch_of_one(make, p):
  return make(Moments(p.mean[None], p.cov[None]))


def marginals(joint, dim):
  """The moments of (z_a, z_b), each by itself."""
  return (
    Moments(joint.mean[:dim], joint.cov[:dim, :dim]),
    Moments(joint.mean[dim:], joint.cov[dim:, dim:]),
  )


def bound(model, x, p_a, p_b, make):
  """The normalised SE-ELBO with E log p(x | z_a) in closed form.

  `se_elbo` sees one decoded sample. Decoding the mean instead of a sample leaves out exactly
  -Tr(W S_a W^T) / (2 v) of the expectation, whatever the sign or scale of the other terms.
  """
  x_mean = model.weights @ p_a.mean
  terms = se_elbo(
    jnp.asarray(x)[None],
    jnp.asarray(x_mean)[None],
    batch_of_one(make, p_a),
    batch_of_one(make, p_b),
    gamma=model.gamma,
    obs_var=model.obs_var,
    coupling=model.coupling,
  )
  missing = -0.5 * np.trace(model.weights @ p_a.cov @ model.weights.T) / model.obs_var
  np.testing.assert_allclose(
    terms.log_likelihood[0] + missing, model.expected_log_likelihood(p_a, x), **EXACT
  )
  return float(terms.normalized_elbo[0]) + missing


# ---------------------------------------------------------------------------------------------
# The bound
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('coupling', COUPLINGS)
@pytest.mark.parametrize('gamma', (0.0, 0.1, 1.0, 10.0, 1000.0))
@in_float64
def test_bound_is_the_log_evidence_at_the_exact_posterior(family, coupling, gamma):
  model, x = linear_model(family, gamma, coupling)
  posterior = model.posterior(x)
  p_a, p_b = marginals(posterior, 2)
  if family == 'diagonal':  # otherwise the factorised family would not hold the posterior
    for p in (p_a, p_b):
      np.testing.assert_allclose(p.cov, np.diag(np.diag(p.cov)), atol=1e-14)
  value = bound(model, x, p_a, p_b, getattr(oracles, family))
  np.testing.assert_allclose(value, model.log_marginal(x), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('coupling', COUPLINGS)
@hypothesis.given(seed=st.integers(0, 2**16), log_gamma=st.floats(-3.0, 2.0))
@hypothesis.settings(derandomize=True, deadline=None, max_examples=25, database=None)
@in_float64
def test_bound_is_below_the_log_evidence_at_any_encodings(family, coupling, seed, log_gamma):
  model, x = linear_model(family, 10.0**log_gamma, coupling, seed)
  rng = np.random.default_rng(seed + 1)
  (p_a, _), (p_b, _) = (oracles.family(family, rng, 2) for _ in range(2))
  make = getattr(oracles, family)
  assert bound(model, x, p_a, p_b, make) < model.log_marginal(x)
  # Near the posterior the bound is nearly tight, and a lost constant would break it.
  near_a, near_b = (
    Moments(p.mean + 1e-3 * rng.normal(size=2), p.cov * np.exp(1e-3 * rng.normal()))
    for p in marginals(model.posterior(x), 2)
  )
  gap = model.log_marginal(x) - bound(model, x, near_a, near_b, make)
  assert -1e-10 < gap < 1e-2


@pytest.mark.parametrize('gamma', (0.0, 0.5, 3.0))
@in_float64
def test_log_evidence_of_the_linear_model_is_the_integral_of_eq_2(gamma):
  # One latent, two pixels: Eq. 2-3 summed on a grid, where the rectangle rule is exact to rounding.
  weights, obs_var, x = np.array([[0.8], [-0.5]]), 0.4, np.array([0.3, 1.1])
  z = np.arange(-9.0, 9.0, 0.05)
  density = np.exp(oracles.log_density(oracles.standard_normal(1), z[:, None]))
  pair = density[:, None] * density * np.exp(-0.5 * gamma * (z[:, None] - z) ** 2)
  noise = Moments(np.zeros(2), obs_var * np.eye(2))
  likelihood = np.exp(oracles.log_density(noise, x - z[:, None] @ weights.T))
  evidence = np.sum(likelihood[:, None] * pair) / np.sum(pair)
  model = oracles.LinearModel(weights, obs_var, gamma)
  np.testing.assert_allclose(model.log_marginal(x), np.log(evidence), **EXACT)
  np.testing.assert_allclose(
    objectives.log_normalizer(gamma, 1), np.log(np.sum(pair) * 0.05**2), **EXACT
  )


@pytest.mark.parametrize('dim', (1, 2))
@in_float64
def test_log_normalizer_is_the_integral_of_eq_3(dim):
  # E exp(-gamma/2 ||z_a - z_b||^2) under the two priors; order 24 is exact to 1e-9 for gamma < 1.
  points, weights = oracles.gauss_hermite(2 * dim, 24)
  squared = np.sum((points[:, :dim] - points[:, dim:]) ** 2, -1)
  for gamma in (0.0, 0.1, 0.25):
    integral = weights @ np.exp(-0.5 * gamma * squared)
    np.testing.assert_allclose(objectives.log_normalizer(gamma, dim), np.log(integral), atol=1e-7)
  assert objectives.log_normalizer(0.0, dim) == 0.0
  np.testing.assert_allclose(
    objectives.log_normalizer(3.0, 5 * dim), 5.0 * objectives.log_normalizer(3.0, dim), **EXACT
  )


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('coupling', COUPLINGS)
@in_float64
def test_without_coupling_the_bound_is_the_elbo_less_the_fictive_kl(family, coupling):
  rng = np.random.default_rng(1)
  (_, q_a), (p_b, q_b) = (oracles.family(family, rng, 2) for _ in range(2))
  q_a, q_b = (jax.tree.map(lambda leaf: leaf[None], q) for q in (q_a, q_b))
  x, x_mean = jnp.asarray(rng.normal(size=(2, 1, 5)))
  plain = elbo(x, x_mean, q_a, obs_var=0.3)
  smooth = se_elbo(x, x_mean, q_a, q_b, gamma=0.0, obs_var=0.3, coupling=coupling)
  fictive = oracles.kl_divergence(p_b, oracles.standard_normal(2))
  np.testing.assert_allclose(smooth.elbo, plain.elbo - fictive, **EXACT)
  np.testing.assert_array_equal(smooth.normalized_elbo, smooth.elbo)


# ---------------------------------------------------------------------------------------------
# The terms
# ---------------------------------------------------------------------------------------------


@in_float64
def test_gaussian_log_likelihood_is_scipys():
  rng = np.random.default_rng(2)
  x, x_mean = rng.normal(size=(2, 3, 4, 2, 1))
  for obs_var in (0.05, 1.0, 3.0):
    noise = Moments(np.zeros(8), obs_var * np.eye(8))
    expected = [oracles.log_density(noise, (a - b).ravel()) for a, b in zip(x, x_mean, strict=True)]
    actual = objectives.gaussian_log_likelihood(jnp.asarray(x), jnp.asarray(x_mean), obs_var)
    np.testing.assert_allclose(actual, expected, **EXACT)
    flat = objectives.gaussian_log_likelihood(
      jnp.asarray(x.reshape(3, 8)), jnp.asarray(x_mean.reshape(3, 8)), obs_var
    )
    np.testing.assert_allclose(flat, expected, **EXACT)


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_elbo_of_a_nonlinear_decoder_is_its_integral(family):
  rng = np.random.default_rng(3)
  p, q = oracles.family(family, rng, 2)
  weights, x, obs_var = rng.normal(size=(4, 2)), rng.normal(size=4), 0.3
  noise, prior = Moments(np.zeros(4), obs_var * np.eye(4)), oracles.standard_normal(2)

  def integrand(z):  # log p(x, z) - log q(z)
    log_likelihood = oracles.log_density(noise, x - np.tanh(z @ weights.T))
    return log_likelihood + oracles.log_density(prior, z) - oracles.log_density(p, z)

  # The expectation of `elbo` over the sampled z, one batch entry a quadrature point.
  points, masses = oracles.gauss_hermite(2, 20)
  z = p.mean + points @ np.linalg.cholesky(p.cov).T
  repeated = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(z), *leaf.shape)), q)
  repeated_x = jnp.broadcast_to(jnp.asarray(x), (len(z), 4))
  terms = elbo(repeated_x, jnp.asarray(np.tanh(z @ weights.T)), repeated, obs_var=obs_var)
  np.testing.assert_allclose(masses @ terms.elbo, oracles.expectation(p, integrand), **EXACT)
  np.testing.assert_allclose(terms.kl, np.full(len(z), oracles.kl_divergence(p, prior)), **EXACT)


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_se_elbo_terms_are_their_expectations(family):
  model, x = linear_model(family, 0.8, seed=4)
  rng = np.random.default_rng(5)
  (p_a, q_a), (p_b, q_b) = (oracles.family(family, rng, 2) for _ in range(2))
  points, masses = oracles.gauss_hermite(2, 3)  # exact: the log-likelihood is quadratic in z
  z = p_a.mean + points @ np.linalg.cholesky(p_a.cov).T
  q_a, q_b = (
    jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (9, *leaf.shape)), q) for q in (q_a, q_b)
  )
  terms = se_elbo(
    jnp.broadcast_to(jnp.asarray(x), (9, 5)),
    jnp.asarray(z @ model.weights.T),
    q_a,
    q_b,
    gamma=model.gamma,
    obs_var=model.obs_var,
  )
  prior = oracles.standard_normal(2)
  plan = oracles.minimise_coupling(p_a, p_b, model.gamma)
  expected = {
    'log_likelihood': model.expected_log_likelihood(p_a, x),
    'log_prior_a': oracles.expectation(p_a, lambda z: oracles.log_density(prior, z)),
    'log_prior_b': oracles.expectation(p_b, lambda z: oracles.log_density(prior, z)),
    'transport_cost': plan.cost,
  }
  assert len(set(np.round(list(expected.values()), 2))) == 4  # no two could be exchanged
  for name, value in expected.items():  # 1e-9: the minimiser's accuracy
    np.testing.assert_allclose(masses @ getattr(terms, name), value, rtol=1e-9, err_msg=name)
  total = sum(expected.values()) - 2.0 * expected['transport_cost']
  np.testing.assert_allclose(masses @ terms.elbo, total, rtol=1e-9)
  normalizer = -0.5 * 2 * np.log(1.0 + 2.0 * model.gamma)
  np.testing.assert_allclose(masses @ terms.normalized_elbo, total - normalizer, rtol=1e-9)


@in_float64
def test_log_likelihood_of_drawn_samples_averages_to_its_expectation():
  model, x = linear_model('diagonal', 1.0, seed=6)
  p, q = oracles.family('diagonal', np.random.default_rng(7), 2)
  num_samples = 50_000
  q, x_of_all = (
    jax.tree.map(lambda leaf: np.broadcast_to(leaf, (num_samples, *leaf.shape)), tree)
    for tree in (q, x)
  )

  @oracles.quick_jit
  def log_likelihood(x, q, weights):
    x_mean = q.sample(jax.random.key(0)) @ weights.T
    return objectives.se_elbo(x, x_mean, q, q, gamma=1.0, obs_var=model.obs_var).log_likelihood

  draws = np.asarray(log_likelihood(x_of_all, q, model.weights))
  error = draws.mean() - model.expected_log_likelihood(p, x)
  assert abs(error) < 4.0 * draws.std() / np.sqrt(num_samples)  # four standard errors, seed fixed


# ---------------------------------------------------------------------------------------------
# Gradients and batches
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_decoder_gradient_is_that_of_the_elbo(family):
  rng = np.random.default_rng(8)
  (_, q_a), (_, q_b) = (oracles.family(family, rng, 2) for _ in range(2))
  q_a, q_b = (jax.tree.map(lambda leaf: leaf[None], q) for q in (q_a, q_b))
  x, weights = jnp.asarray(rng.normal(size=(1, 5))), jnp.asarray(rng.normal(size=(2, 5)))
  z = q_a.sample(jax.random.key(0))

  def decode(weights):
    return jax.nn.sigmoid(z @ weights)

  def plain(weights, obs_var):
    return objectives.elbo(x, decode(weights), q_a, obs_var=obs_var).elbo[0]

  def smooth(weights, obs_var):
    return objectives.se_elbo(x, decode(weights), q_a, q_b, gamma=2.0, obs_var=obs_var).elbo[0]

  ours, theirs = oracles.quick_jit(
    lambda *x: [jax.grad(f, argnums=(0, 1))(*x) for f in (smooth, plain)]
  )(weights, 0.3)
  # (x - mean) / v, through the sigmoid and the weights.
  mean = np.asarray(decode(weights))
  expected = np.asarray(z).T @ ((np.asarray(x) - mean) / 0.3 * mean * (1.0 - mean))
  np.testing.assert_allclose(theirs[0], expected, **EXACT)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, **EXACT)


@pytest.mark.long
@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_first_and_second_derivatives_match_finite_differences(family):
  rng = np.random.default_rng(9)
  make = getattr(oracles, family)
  (p_a, q_a), (_, q_b) = (oracles.family(family, rng, 2) for _ in range(2))
  generic_a, generic_b = (jax.tree.map(lambda leaf: leaf[None], q) for q in (q_a, q_b))
  standard = batch_of_one(make, oracles.standard_normal(2))
  narrow = batch_of_one(make, Moments(p_a.mean, np.diag([0.5, 2.0])))
  x, x_mean = jnp.asarray(rng.normal(size=(2, 1, 3)))

  def every_function(x, x_mean, q_a, q_b, gamma, obs_var):
    if family == 'full':  # above the diagonal there is no parameter
      q_a, q_b = (FullGaussian(q.mean, jnp.tril(q.scale_tril)) for q in (q_a, q_b))
    return (
      objectives.elbo(x, x_mean, q_a, obs_var=obs_var),
      objectives.se_elbo(x, x_mean, q_a, q_b, gamma=gamma, obs_var=obs_var),
    )

  check = oracles.DerivativeCheck(every_function, (x, x_mean, generic_a, generic_b, 1.0, 0.5))
  for gamma in (0.0, 0.8):
    for q_a, q_b in ((generic_a, generic_b), (generic_a, generic_a), (standard, narrow)):
      check(x, x_mean, q_a, q_b, gamma, 0.5)


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_terms_are_per_example(family):
  rng = np.random.default_rng(10)
  make = getattr(oracles, family)
  p_a, p_b = ([oracles.family(family, rng, 2)[0] for _ in range(4)] for _ in range(2))
  stack = lambda p: make(Moments(*map(np.stack, zip(*p, strict=True))))  # noqa: E731
  x, x_mean = jnp.asarray(rng.normal(size=(2, 4, 3, 2)))
  options = {'gamma': 0.8, 'obs_var': 0.3}

  @oracles.quick_jit
  def all_terms(x, x_mean, q_a, q_b):
    smooth = objectives.se_elbo(x, x_mean, q_a, q_b, **options)
    plain = objectives.elbo(x, x_mean, q_a, obs_var=0.3)
    return smooth._asdict() | {f'plain {name}': value for name, value in plain._asdict().items()}

  whole = all_terms(x, x_mean, stack(p_a), stack(p_b))
  for i in range(4):  # with no other neighbours than itself
    alike = np.full(4, i)
    alone = all_terms(x[alike], x_mean[alike], stack([p_a[i]] * 4), stack([p_b[i]] * 4))
    for name, part in alone.items():
      expected = np.broadcast_to(whole[name][i], part.shape)
      np.testing.assert_allclose(part, expected, err_msg=name, **EXACT)


@pytest.mark.parametrize('family', FAMILIES)
def test_values_and_gradients_are_finite_in_float32_at_every_extreme(family):
  variances = np.array([1e-12, 1e-8, 1.0, 1e4, 1e6])
  var_a, var_b = (v.ravel() for v in np.meshgrid(variances, variances))
  mean = np.ones((25, 2), np.float32)

  def make(var):
    if family == 'diagonal':
      return DiagonalGaussian(mean, np.log(var[:, None] * [1.0, 2.0]).astype(np.float32))
    tril = np.array([[1.0, 0.0], [0.5, 1.0]], np.float32)
    return FullGaussian(mean, np.sqrt(var).astype(np.float32)[:, None, None] * tril)

  def total(x_mean, q_a, q_b, gamma, obs_var):
    x = jnp.zeros_like(x_mean)
    terms = objectives.se_elbo(x, x_mean, q_a, q_b, gamma=gamma, obs_var=obs_var)
    return jnp.sum(terms.normalized_elbo) + jnp.sum(
      objectives.elbo(x, x_mean, q_b, obs_var=obs_var).elbo
    )

  function = oracles.quick_jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4)))
  for gamma in (0.0, 1e-6, 1.0, 1e4, 1e6):
    for obs_var in (1e-6, 1.0, 1e6):
      numbers = np.float32(gamma), np.float32(obs_var)
      result = function(np.ones((25, 3), np.float32), make(var_a), make(var_b), *numbers)
      for leaf in jax.tree.leaves(result):
        assert leaf.dtype == jnp.float32
        assert np.all(np.isfinite(leaf)), (gamma, obs_var)
