"""Transport costs in float32: finite at every extreme, and accurate to rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import gaussians, wasserstein
from se_vae.gaussians import DiagonalGaussian, FullGaussian
from tests import oracles
from tests.oracles import LONG, Moments, in_float64
from tests.transport import (
  FAMILIES,
)

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
      return DiagonalGaussian(
        jnp.ones((25, 2), jnp.float32), jnp.asarray(np.log(variances).astype(np.float32))
      )
    scale = np.sqrt(variances)[..., None] * [[1.0, 0.0], [0.5, 1.0]]
    return FullGaussian(jnp.ones((25, 2), jnp.float32), jnp.asarray(scale.astype(np.float32)))

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


@pytest.mark.long
def test_couplings_and_maps_are_finite_in_float32_at_every_extreme():
  var_a, var_b = (v.ravel().astype(np.float32) for v in np.meshgrid(*[EXTREME_VARIANCES] * 2))
  identity = np.eye(2, dtype=np.float32)
  cov_a, cov_b = (v[:, None, None] * identity for v in (var_a, var_b))

  def values(var_a, var_b, cov_a, cov_b, gamma):
    mean = jnp.ones(2, jnp.float32)
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
    DiagonalGaussian(jnp.zeros((121, 121, 1), jnp.float32), jnp.asarray(v)[..., None])
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
  zero = jnp.zeros((100, 1), jnp.float32)
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


@pytest.mark.long
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
    # The square root of a covariance is good to the root of rounding along its least axis. The
    # largest error at condition 1 depends on the processor: 11.4 units where there is no AVX-512.
    assert np.max(error / size) < (20.0 + condition**0.5) * np.finfo(np.float32).eps


@pytest.mark.parametrize('gamma', [1.0, 100.0, 1000.0])
def test_costs_in_float16_do_not_overflow(gamma):
  def costs(dtype):
    a, b = (
      DiagonalGaussian(jnp.full(2, m, dtype), jnp.full(2, v, dtype))
      for m, v in ((0, 0), (0.01, 0.1))
    )
    cost = wasserstein.entropic_transport_cost(a, b, gamma=gamma)
    coupling = wasserstein.entropic_coupling(jnp.exp(a.log_var), jnp.exp(b.log_var), gamma)
    return np.stack([cost, wasserstein.entropic_squared_w2(a, b, gamma), *coupling])

  def gradient(dtype):
    a, b = jnp.zeros(2, dtype), jnp.full(2, 0.1, dtype)

    def cost(mean, log_var):
      q_a, q_b = DiagonalGaussian(jnp.zeros_like(a), a), DiagonalGaussian(mean, log_var)
      return wasserstein.entropic_transport_cost(q_a, q_b, gamma=gamma)

    return np.stack(jax.grad(cost, argnums=(0, 1))(0.01 * jnp.ones_like(b), b))

  half = np.finfo(np.float16).eps
  # A log-variance's derivative has terms of the size of gamma.
  np.testing.assert_allclose(gradient(jnp.float16), gradient(jnp.float32), atol=4 * half * gamma)
  np.testing.assert_allclose(costs(jnp.float16), costs(jnp.float32), rtol=20 * half, atol=4 * half)
