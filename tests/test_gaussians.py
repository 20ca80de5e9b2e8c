"""Gaussian encodings against SciPy densities, quadrature and Monte Carlo."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from se_vae import gaussians
from se_vae.gaussians import DiagonalGaussian, FullGaussian
from tests import oracles
from tests.oracles import LONG, in_float64

FAMILIES = ('diagonal', 'full')
# float64 quadrature of a quadratic polynomial: only rounding, of order 1e-14.
EXACT = {'rtol': 1e-12, 'atol': 1e-12}

entropy = oracles.quick_jit(gaussians.entropy)
kl_divergence = oracles.quick_jit(gaussians.kl_divergence)
symmetric_kl = oracles.quick_jit(gaussians.symmetric_kl)
kl_to_standard_normal = oracles.quick_jit(gaussians.kl_to_standard_normal)
expected_log_standard_normal = oracles.quick_jit(gaussians.expected_log_standard_normal)
log_prob = oracles.quick_jit(lambda q, z: q.log_prob(z))
sample = oracles.quick_jit(lambda q, key: q.sample(key))


def pair(family, seed, dim):
  rng = np.random.default_rng(seed)
  return oracles.family(family, rng, dim), oracles.family(family, rng, dim)


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_log_prob_is_scipys(family):
  rng = np.random.default_rng(0)
  for dim in (1, 2, 5):
    p, q = oracles.family(family, rng, dim)
    z = rng.normal(size=dim)
    np.testing.assert_allclose(log_prob(q, z), oracles.log_density(p, z), **EXACT)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('dim', (1, 2))
@in_float64
def test_entropy_is_minus_the_expected_log_density(family, dim):
  (p, q), _ = pair(family, dim, dim)
  np.testing.assert_allclose(entropy(q), oracles.entropy(p), **EXACT)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('dim', (1, 2))
@in_float64
def test_kl_divergence_is_the_expected_log_ratio(family, dim):
  (p_a, q_a), (p_b, q_b) = pair(family, dim, dim)
  forward, backward = oracles.kl_divergence(p_a, p_b), oracles.kl_divergence(p_b, p_a)
  assert abs(forward - backward) > 0.1  # so that swapped arguments cannot pass
  np.testing.assert_allclose(kl_divergence(q_a, q_b), forward, **EXACT)
  np.testing.assert_allclose(kl_divergence(q_b, q_a), backward, **EXACT)
  np.testing.assert_allclose(symmetric_kl(q_a, q_b), forward + backward, **EXACT)


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_kl_divergence_and_entropy_match_monte_carlo_in_five_dimensions(family):
  (p_a, q_a), (p_b, q_b) = pair(family, 5, 5)
  z = np.random.default_rng(6).multivariate_normal(p_a.mean, p_a.cov, size=200_000)
  surprise = -oracles.log_density(p_a, z)
  log_ratio = oracles.log_density(p_a, z) - oracles.log_density(p_b, z)
  for value, draws in (
    (entropy(q_a), surprise),
    (kl_divergence(q_a, q_b), log_ratio),
  ):
    standard_error = draws.std() / np.sqrt(len(draws))
    assert standard_error < 0.05
    assert abs(float(value) - draws.mean()) < 4.0 * standard_error  # one-in-16,000, seed fixed


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('dim', (1, 2))
@in_float64
def test_prior_terms_are_expectations_under_the_standard_normal(family, dim):
  (p, q), _ = pair(family, 10 + dim, dim)
  prior = oracles.standard_normal(dim)
  expected = oracles.expectation(p, lambda z: oracles.log_density(prior, z))
  np.testing.assert_allclose(expected_log_standard_normal(q), expected, **EXACT)
  np.testing.assert_allclose(kl_to_standard_normal(q), oracles.kl_divergence(p, prior), **EXACT)


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_moments_are_read_back(family):
  (p, q), _ = pair(family, 20, 4)
  np.testing.assert_allclose(q.log_det(), np.linalg.slogdet(p.cov)[1], **EXACT)
  np.testing.assert_allclose(q.trace(), np.trace(p.cov), **EXACT)
  assert q.dim == 4
  if family == 'diagonal':
    np.testing.assert_allclose(q.var, np.diag(p.cov), **EXACT)
    np.testing.assert_allclose(q.stddev, np.sqrt(np.diag(p.cov)), **EXACT)
  else:
    np.testing.assert_allclose(q.cov, p.cov, **EXACT)
    built = FullGaussian.from_covariance(jnp.asarray(p.mean), jnp.asarray(p.cov))
    np.testing.assert_allclose(built.mean, p.mean, **EXACT)
    np.testing.assert_allclose(built.scale_tril, q.scale_tril, **EXACT)


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_kl_divergence_vanishes_with_its_gradient_at_equal_gaussians_only(family):
  (_, q_a), (_, q_b) = pair(family, 30, 3)
  assert float(kl_divergence(q_a, q_a)) == 0.0
  gradient = oracles.quick_jit(jax.grad(gaussians.kl_divergence))(q_a, q_a)
  for leaf in jax.tree.leaves(gradient):
    leaf = np.tril(leaf) if leaf.ndim == 2 else leaf  # above the diagonal there is no parameter
    np.testing.assert_allclose(leaf, 0.0, atol=1e-12)
  assert float(kl_divergence(q_a, q_b)) > 0.1


@in_float64
def test_families_agree_on_diagonal_covariances():
  rng = np.random.default_rng(40)
  p_a, p_b = (oracles.random_diagonal_moments(rng, 4) for _ in range(2))
  z = jnp.asarray(rng.normal(size=4))
  functions = {
    'log_prob': lambda make: make(p_a).log_prob(z),
    'entropy': lambda make: gaussians.entropy(make(p_a)),
    'kl': lambda make: gaussians.kl_divergence(make(p_a), make(p_b)),
    'kl_to_standard_normal': lambda make: gaussians.kl_to_standard_normal(make(p_a)),
    'prior': lambda make: gaussians.expected_log_standard_normal(make(p_a)),
    'sample': lambda make: make(p_a).sample(jax.random.key(0)),
  }
  flat, dense = oracles.quick_jit(
    lambda: [
      {name: function(make) for name, function in functions.items()}
      for make in (oracles.diagonal, oracles.full)
    ]
  )()
  for name, value in flat.items():
    np.testing.assert_allclose(value, dense[name], err_msg=name, **EXACT)


# ---------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
def test_samples_have_the_mean_and_covariance_of_the_gaussian(family):
  # Variances far from 1, so that a variance taken for a standard deviation fails by a wide margin.
  mean = np.array([1.0, -2.0, 3.0])
  stddev = np.array([0.2, 1.0, 3.0])
  correlation = np.eye(3)
  if family == 'full':
    correlation = np.array([[1.0, 0.8, -0.3], [0.8, 1.0, 0.0], [-0.3, 0.0, 1.0]])
  p = oracles.Moments(mean, correlation * np.outer(stddev, stddev))
  make = oracles.diagonal if family == 'diagonal' else oracles.full
  num_samples = 100_000
  q = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf, (num_samples, *leaf.shape)), make(p, jnp.float32)
  )
  z = np.asarray(sample(q, jax.random.key(1)), np.float64)
  # Five standard errors of each of the 12 statistics; the seed is fixed.
  standard_error = stddev / np.sqrt(num_samples)
  assert np.all(np.abs(z.mean(0) - mean) < 5.0 * standard_error)
  variances = np.outer(stddev, stddev) ** 2
  standard_error = np.sqrt((variances + p.cov**2) / num_samples)
  assert np.all(np.abs(np.cov(z.T) - p.cov) < 5.0 * standard_error)
  # The shape too: a sample's squared Mahalanobis length is chi-square with 3 degrees of freedom.
  squared = np.sum((z - mean) * np.linalg.solve(p.cov, (z - mean).T).T, axis=-1)
  assert scipy.stats.kstest(squared, scipy.stats.chi2(3).cdf).pvalue > 1e-3


@pytest.mark.parametrize('family', FAMILIES)
def test_samples_are_a_function_of_the_key_alone(family):
  p = oracles.random_diagonal_moments(np.random.default_rng(50), 3)
  q = (oracles.diagonal if family == 'diagonal' else oracles.full)(p, jnp.float32)
  first = sample(q, jax.random.key(0))
  np.testing.assert_array_equal(first, sample(q, jax.random.key(0)))
  assert np.all(first != sample(q, jax.random.key(1)))
  assert first.dtype == jnp.float32


@pytest.mark.parametrize('family', FAMILIES)
def test_each_sample_of_sample_each_is_a_function_of_its_own_key_and_gaussian(family):
  rng = np.random.default_rng(52)
  if family == 'diagonal':
    make, single = oracles.diagonal, [oracles.random_diagonal_moments(rng, 3) for _ in range(4)]
  else:
    make, single = oracles.full, [oracles.random_moments(rng, 3) for _ in range(4)]
  keys = jax.random.split(jax.random.key(0), 4)
  batch = oracles.Moments(*map(np.stack, zip(*single, strict=True)))
  samples = oracles.quick_jit(gaussians.sample_each)(make(batch, jnp.float32), keys)
  alone = np.stack([sample(make(p, jnp.float32), k) for p, k in zip(single, keys, strict=True)])
  # float32 rounding of a matrix product that is batched one way and not the other.
  np.testing.assert_allclose(samples, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_sample_gradients_are_those_of_the_reparameterisation(family):
  _, q = oracles.family(family, np.random.default_rng(51), 2)
  draw = sample(q, jax.random.key(3))
  jacobian = oracles.quick_jit(jax.jacobian(lambda q: q.sample(jax.random.key(3))))(q)
  np.testing.assert_allclose(jacobian.mean, np.eye(2), **EXACT)
  if family == 'diagonal':  # d z / d log_var = (z - mean) / 2
    np.testing.assert_allclose(jacobian.log_var, np.diag(draw - q.mean) / 2.0, **EXACT)
  else:  # z is linear in scale_tril
    scaled = jnp.einsum('ijk,jk->i', jacobian.scale_tril, q.scale_tril)
    np.testing.assert_allclose(scaled, draw - q.mean, **EXACT)


# ---------------------------------------------------------------------------------------------
# Batches, gradients, limits
# ---------------------------------------------------------------------------------------------

UNARY = {
  'entropy': gaussians.entropy,
  'kl_to_standard_normal': gaussians.kl_to_standard_normal,
  'expected_log_standard_normal': gaussians.expected_log_standard_normal,
  'log_prob': lambda q: q.log_prob(jnp.ones_like(q.mean)),
  'sample': lambda q: q.sample(jax.random.key(0)),
}


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_batches_of_several_axes_are_loops(family):
  rng = np.random.default_rng(60)
  q_a, q_b = (
    oracles.batch_of([oracles.family(family, rng, 4)[1] for _ in range(6)]) for _ in range(2)
  )

  def every_function(q_a, q_b):
    values = {name: function(q_a) for name, function in UNARY.items() if name != 'sample'}
    values |= {'kl': gaussians.kl_divergence(q_a, q_b), 'trace': q_a.trace(), 'det': q_a.log_det()}
    if family == 'diagonal':
      return values | {'var': q_a.var, 'stddev': q_a.stddev}
    rebuilt = FullGaussian.from_covariance(q_a.mean, q_a.cov)
    return values | {'cov': q_a.cov, 'from_covariance': rebuilt}

  oracles.assert_batches_are_loops(every_function, q_a, q_b)
  # A batch is one draw of noise, which the standard normal shows.
  key, standard = jax.random.key(0), getattr(oracles, family)(oracles.standard_normal(4))
  noise = oracles.batch_of([standard] * 6).sample(key)
  scale = jnp.exp(0.5 * q_a.log_var) * noise if family == 'diagonal' else None
  if family == 'full':
    scale = np.einsum('abij,abj->abi', q_a.scale_tril, noise)
  np.testing.assert_allclose(q_a.sample(key), q_a.mean + scale, **EXACT)


@pytest.mark.parametrize('family', FAMILIES)
@in_float64
def test_first_and_second_derivatives_match_finite_differences(family):
  (_, q_a), (_, q_b) = pair(family, 70, 2)
  make = oracles.diagonal if family == 'diagonal' else oracles.full
  standard = make(oracles.standard_normal(2))

  def every_function(q_a, q_b):
    return gaussians.kl_divergence(q_a, q_b), [function(q_a) for function in UNARY.values()]

  check = oracles.DerivativeCheck(every_function, (q_a, q_b))
  check(q_a, q_b)
  check(q_a, q_a)
  check(standard, standard)


def test_values_and_gradients_are_finite_in_float32_at_extreme_variances():
  variances = np.array([1e-12, 1e-8, 1.0, 1e4, 1e6])
  var_a, var_b = (v.ravel() for v in np.meshgrid(variances, variances))

  @oracles.quick_jit
  def values_and_gradients(q_a, q_b):
    def values(q_a, q_b):
      kl_divergence = gaussians.kl_divergence(q_a, q_b)
      return {'kl': kl_divergence} | {name: function(q_a) for name, function in UNARY.items()}

    # What is not finite in any part is not finite in the gradient of the sum.
    results, pullback = jax.vjp(values, q_a, q_b)
    return results | {'gradient': pullback(jax.tree.map(jnp.ones_like, results))}

  mean = np.ones((25, 2), np.float32)
  unit_tril = np.array([[1.0, 0.0], [0.5, 1.0]], np.float32)
  for make in (
    lambda var: DiagonalGaussian(mean, np.log(var[:, None] * [1.0, 2.0]).astype(np.float32)),
    lambda var: FullGaussian(mean, np.sqrt(var).astype(np.float32)[:, None, None] * unit_tril),
  ):
    for name, result in values_and_gradients(make(var_a), make(var_b)).items():
      assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(result)), name


def test_kl_divergence_keeps_its_digits_in_float32():
  # Relative to the sum of the two (non-negative) terms, from variances that differ by 1e-4 to
  # ones that differ by a factor of 1e12. r - log r - 1 is of order difference^2 / 2, so the
  # textbook expression would have no digit left at 1e-4.
  difference = np.concatenate([np.logspace(-4, np.log10(28.0), 200)] * 2)
  difference[200:] *= -1.0
  log_var = np.float32(-0.5) + difference.astype(np.float32)
  zeros = jnp.zeros((400, 1), jnp.float32)
  q_a = DiagonalGaussian(zeros, jnp.asarray(log_var)[:, None])
  q_b = DiagonalGaussian(zeros + 1e-4, zeros - 0.5)
  t = log_var.astype(LONG) + LONG(0.5)
  # exp(t) - 1 - t in extended precision, by series where it cancels.
  series = sum(t**k / scipy.special.factorial(k, exact=True) for k in range(2, 25))
  ratio = np.where(np.abs(t) < 1.0, series, np.exp(t) - 1 - t)
  expected = 0.5 * (ratio + LONG(np.float32(1e-4)) ** 2 * np.exp(LONG(0.5)))
  error = np.abs(np.asarray(jax.jit(gaussians.kl_divergence)(q_a, q_b), LONG) / expected - 1)
  # 2e-7 is two units in the last place of the difference of the log-variances; it enters squared
  # or, at 28, through an exponential, with another five units from expm1.
  assert error.max() < 3e-6
  same = jax.jit(gaussians.kl_to_standard_normal)(
    DiagonalGaussian(zeros, jnp.asarray(difference, jnp.float32)[:, None])
  )
  t = difference.astype(np.float32).astype(LONG)
  series = sum(t**k / scipy.special.factorial(k, exact=True) for k in range(2, 25))
  ratio = np.where(np.abs(t) < 1.0, series, np.exp(t) - 1 - t)
  assert np.max(np.abs(np.asarray(same, LONG) / (0.5 * ratio) - 1)) < 3e-6


@in_float64
def test_exp_remainder_keeps_its_digits_in_float64():
  t = np.concatenate([np.linspace(-3.0, 3.0, 601), [-40.0, 40.0]])
  expected = np.expm1(t.astype(LONG)) - t
  small = np.abs(t) < 0.5
  series = sum(t.astype(LONG) ** k / scipy.special.factorial(k, exact=True) for k in range(2, 20))
  expected = np.where(small, series, expected).astype(float)
  np.testing.assert_allclose(jax.jit(gaussians.exp_remainder)(t), expected, rtol=2e-15)


def test_a_gaussian_cannot_be_changed():
  for q in (GOOD, FullGaussian(np.zeros(3, np.float32), np.eye(3, dtype=np.float32))):
    with pytest.raises(dataclasses.FrozenInstanceError):
      q.mean = np.ones(3, np.float32)


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------

GOOD = DiagonalGaussian(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32))
BAD_GAUSSIANS = {
  'short log_var': DiagonalGaussian(np.zeros(3, np.float32), np.zeros(2, np.float32)),
  'log_var without its batch axis': DiagonalGaussian(
    np.zeros((2, 3), np.float32), np.zeros(3, np.float32)
  ),
  'scalar mean': DiagonalGaussian(np.float32(0), np.float32(0)),
  'oblong scale_tril': FullGaussian(np.zeros(3, np.float32), np.zeros((3, 2), np.float32)),
  'vector scale_tril': FullGaussian(np.zeros(3, np.float32), np.zeros(3, np.float32)),
  'scale_tril without its batch axis': FullGaussian(
    np.zeros((2, 3), np.float32), np.eye(3, dtype=np.float32)
  ),
}


@pytest.mark.parametrize('jit', (False, True))
@pytest.mark.parametrize('name', BAD_GAUSSIANS)
def test_shapes_that_do_not_fit_are_refused(name, jit):
  wrap = jax.jit if jit else lambda function: function
  for function in UNARY.values():
    with pytest.raises(AssertionError, match='Gaussian needs mean'):
      wrap(lambda q, f=function: f(q))(BAD_GAUSSIANS[name])
  with pytest.raises(AssertionError, match='Gaussian needs mean'):
    wrap(gaussians.kl_divergence)(BAD_GAUSSIANS[name], BAD_GAUSSIANS[name])


@pytest.mark.parametrize('jit', (False, True))
def test_pairs_and_points_that_do_not_fit_are_refused(jit):
  wrap = jax.jit if jit else lambda function: function
  short = DiagonalGaussian(np.zeros((2, 1), np.float32), np.zeros((2, 1), np.float32))
  for q_a, q_b in ((GOOD, short), (short, GOOD)):
    with pytest.raises(AssertionError, match='must have one shape'):
      wrap(gaussians.kl_divergence)(q_a, q_b)
  dense = FullGaussian(np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
  flat = DiagonalGaussian(np.zeros(3, np.float32), np.zeros(3, np.float32))
  for q_a, q_b in ((flat, dense), (dense, flat)):
    with pytest.raises(TypeError, match='must be of one family'):
      wrap(gaussians.kl_divergence)(q_a, q_b)
  for q in (flat, dense):
    for z in (np.zeros((2, 3), np.float32), np.zeros(1, np.float32)):
      with pytest.raises(AssertionError, match='shape'):
        wrap(lambda q, z: q.log_prob(z))(q, z)
  with pytest.raises(AssertionError, match='a full covariance needs'):
    wrap(FullGaussian.from_covariance)(np.zeros(3, np.float32), np.zeros((3, 2), np.float32))


def test_a_scalar_mean_is_refused():
  with pytest.raises(AssertionError):
    gaussians.check_moments(jnp.zeros(()), jnp.zeros((1, 1)))


@pytest.mark.parametrize('name', ('mean', 'log_var'))
def test_parameters_of_integers_are_refused_by_name(name):
  q = dataclasses.replace(GOOD, **{name: np.zeros((2, 3), np.int32)})
  with pytest.raises(AssertionError, match=f'^{name} must be floating point, got int32'):
    gaussians.check_gaussian(q)


@pytest.mark.parametrize('jit', (False, True))
@pytest.mark.parametrize('value', (np.ones(1), 1j), ids=('vector', 'complex'))
def test_what_is_no_real_scalar_is_refused(value, jit):
  check = functools.partial(gaussians.check_scalar, 'gamma')
  with pytest.raises(AssertionError, match=r'^gamma must be a scalar and real'):
    (jax.jit(check) if jit else check)(value)


@pytest.mark.parametrize('positive, relation', ((False, '>='), (True, '>')))
def test_scalars_are_finite_and_not_negative(positive, relation):
  refused = [-1.0, np.inf, np.nan] + [0.0] * positive
  for value in refused:
    with pytest.raises(ValueError, match=f'^gamma must be finite and {relation} 0, got {value}'):
      gaussians.check_scalar('gamma', value, positive=positive)
  for value in [1e-30, 1.0, 1e30] + [0.0] * (not positive):
    gaussians.check_scalar('gamma', value, positive=positive)
  gaussians.check_scalar('gamma', 0.0)  # as most are
  # What is traced is not known.
  jax.jit(lambda value: gaussians.check_scalar('gamma', value, positive=positive))(-1.0)
