"""Prints how far each function is from its reference, as a Markdown table.

    python -m tests.tools.accuracy_table

The references are the formulas of the paper evaluated in long double (19 digits on x86) at the very
numbers the library was given: for one latent dimension directly, for full covariance through a
Jacobi eigenvalue iteration. `relative` is the worst |error| / |value|, which is large where a value
of either sign crosses zero; `to terms` the worst |error| / (sum of the magnitudes of the terms that
are added), which is what an implementation can be held to; `to tolerance` the worst
|error| / max(1e-6, 1e-5 |value|) in float32 and / max(1e-14, 1e-13 |value|) in float64.

It takes about half a minute on two cores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from se_vae import gaussians, objectives, wasserstein
from se_vae.gaussians import DiagonalGaussian, FullGaussian
from tests import oracles
from tests.oracles import LONG

PI = LONG('3.14159265358979323846264338327950288')
LOG_2PI = np.log(2 * PI)
TOLERANCES = {'float32': (1e-6, 1e-5), 'float64': (1e-14, 1e-13)}


class Worst:
  """The worst errors of one function in one precision."""

  def __init__(self):
    self.relative = self.to_terms = self.to_tolerance = 0.0

  def add(self, name: str, dtype: str, actual, expected, terms):
    actual, expected, terms = (np.asarray(x, LONG) for x in (actual, expected, terms))
    error = np.abs(actual - expected)
    if name.endswith('coupling_full'):  # matrices: relative to the largest entry
      error, expected = error.max(), np.abs(expected).max()
    absolute, relative = TOLERANCES[dtype]
    nonzero = np.where(expected == 0, 1, expected)
    for column, scale in (
      ('relative', np.abs(nonzero)),
      ('to_terms', np.where(terms == 0, 1, terms)),
      ('to_tolerance', np.maximum(absolute, relative * np.abs(expected))),
    ):
      ratio = error / scale
      assert np.all(np.isfinite(ratio)), 'not finite'
      setattr(self, column, max(getattr(self, column), float(ratio.max())))


# ---------------------------------------------------------------------------------------------
# One latent dimension: log-spaced variances and coupling strengths
# ---------------------------------------------------------------------------------------------


def series_itakura_saito(t):
  """exp(t) - 1 - t, by series where it cancels."""
  small = np.where(np.abs(t) < 0.5, t, 0)
  term, total = small, np.zeros_like(t)
  for k in range(2, 24):
    term = term * small / k
    total = total + term
  return np.where(np.abs(t) < 0.5, total, np.expm1(t) - t)


def factorised(dtype: str):
  """Yields (name, actual, expected, terms) over the grid."""
  log_vars = np.log(np.logspace(-8, 4, 61)).astype(dtype)
  lv_a, lv_b = np.meshgrid(log_vars, log_vars, indexing='ij')
  one = np.ones_like(lv_a)
  q_a = DiagonalGaussian(jnp.asarray(0.3 * one)[..., None], jnp.asarray(lv_a)[..., None])
  q_b = DiagonalGaussian(jnp.asarray(-0.1 * one)[..., None], jnp.asarray(lv_b)[..., None])
  m_a, m_b = (np.asarray(q.mean[..., 0], LONG) for q in (q_a, q_b))
  la, lb = lv_a.astype(LONG), lv_b.astype(LONG)
  sa, sb, var_a = np.exp(la / 2), np.exp(lb / 2), np.exp(la)
  z = jnp.ones_like(q_a.mean)

  standard = ((1 - m_a) / sa) ** 2
  size = np.abs(la) + LOG_2PI
  yield 'log_prob', q_a.log_prob(z), -(standard + la + LOG_2PI) / 2, standard + size
  yield 'entropy', gaussians.entropy(q_a), (la + LOG_2PI + 1) / 2, size + 1
  square = ((m_a - m_b) / sb) ** 2
  kl = (series_itakura_saito(la - lb) + square) / 2
  yield 'kl_divergence', gaussians.kl_divergence(q_a, q_b), kl, kl
  kl = (series_itakura_saito(la) + m_a**2) / 2
  yield 'kl_to_standard_normal', gaussians.kl_to_standard_normal(q_a), kl, kl
  prior = -(m_a**2 + var_a + LOG_2PI) / 2
  yield 'expected_log_standard_normal', gaussians.expected_log_standard_normal(q_a), prior, -prior

  shift = (m_a - m_b) ** 2
  w2 = shift + (sa - sb) ** 2
  yield 'squared_w2', wasserstein.squared_w2(q_a, q_b), w2, w2
  image = m_a + sa / sb * (1 - m_b)
  yield (
    'optimal_map',
    wasserstein.optimal_map(q_a, q_b, z)[..., 0],
    image,
    np.abs(m_a) + sa / sb * (1 - m_b),
  )
  # These two are given the variances, already rounded.
  rounded_a, rounded_b = (np.exp(v.astype(float)).astype(dtype) for v in (lv_a, lv_b))
  product = np.sqrt(rounded_a.astype(LONG) * rounded_b.astype(LONG))
  psi = wasserstein.optimal_coupling(jnp.asarray(rounded_a), jnp.asarray(rounded_b))
  yield 'optimal_coupling', psi, product, product
  coupling = jax.jit(wasserstein.entropic_coupling)
  cost, distance = (
    jax.jit(f) for f in (wasserstein.entropic_transport_cost, wasserstein.entropic_squared_w2)
  )
  for gamma in (10.0 ** np.linspace(-6, 6, 37)).astype(dtype):
    g = LONG(gamma)
    t = 2 * g * product
    psi = product * t / (np.sqrt(1 + t**2) + 1)
    yield 'entropic_coupling', coupling(rounded_a, rounded_b, gamma), psi, psi
    t = 2 * g * sa * sb
    u = np.sqrt(1 + t**2)
    w2_gamma = w2 + 2 * sa * sb * (1 - t / (u + 1))
    yield 'entropic_squared_w2', distance(q_a, q_b, gamma), w2_gamma, w2_gamma
    transport = g / 2 * w2
    excess = (1 - 1 / (u + t) + np.log((u + 1) / 2)) / 2
    expected = transport + excess - (la + lb) / 2 - LOG_2PI - 1
    size = transport + excess + (np.abs(la) + np.abs(lb)) / 2 + LOG_2PI + 1
    yield 'entropic_transport_cost', cost(q_a, q_b, gamma), expected, size


def objective_terms(dtype: str):
  """The likelihood, the two bounds and the constant."""
  rng = np.random.default_rng(0)
  size, dim = 100, 8
  x, x_mean = (rng.uniform(size=(size, 49)).astype(dtype) for _ in range(2))
  q_a, q_b = (
    DiagonalGaussian(*(jnp.asarray(rng.normal(size=(size, dim)).astype(dtype)) for _ in range(2)))
    for _ in range(2)
  )
  (m_a, lv_a), (m_b, lv_b) = (
    (np.asarray(q.mean, LONG), np.asarray(q.log_var, LONG)) for q in (q_a, q_b)
  )
  square = np.sum((x.astype(LONG) - x_mean.astype(LONG)) ** 2, -1)
  kl = np.sum(series_itakura_saito(lv_a) + m_a**2, -1) / 2
  priors = [-np.sum(m**2 + np.exp(lv) + LOG_2PI, -1) / 2 for m, lv in ((m_a, lv_a), (m_b, lv_b))]
  for v in np.logspace(-3, 1, 5).astype(dtype):
    pixels = 49 * (LOG_2PI + np.log(LONG(v)))
    likelihood = -(square / LONG(v) + pixels) / 2
    terms = square / LONG(v) + 49 * (LOG_2PI + abs(np.log(LONG(v))))
    actual = objectives.gaussian_log_likelihood(jnp.asarray(x), jnp.asarray(x_mean), v)
    yield 'gaussian_log_likelihood', actual, likelihood, terms
    bound = objectives.elbo(jnp.asarray(x), jnp.asarray(x_mean), q_a, obs_var=v).elbo
    yield 'elbo', bound, likelihood - kl, terms + kl
    for gamma in np.logspace(-2, 2, 5).astype(dtype):
      cost = oracles.paper_scalar_cost(m_a, lv_a, m_b, lv_b, gamma).sum(-1)
      bound = objectives.se_elbo(
        jnp.asarray(x), jnp.asarray(x_mean), q_a, q_b, gamma=gamma, obs_var=v
      )
      expected = likelihood + priors[0] + priors[1] - cost
      size = terms - priors[0] - priors[1] + np.abs(cost)
      yield 'se_elbo', bound.elbo, expected, size
      normalizer = -dim * np.log1p(2 * LONG(gamma)) / 2
      yield 'log_normalizer', objectives.log_normalizer(gamma, dim), normalizer, -normalizer


# ---------------------------------------------------------------------------------------------
# Full covariance
# ---------------------------------------------------------------------------------------------


def long_eigh(matrix):
  """Eigenvalues and vectors of a symmetric long double matrix, by cyclic Jacobi rotations."""
  matrix, vectors = matrix.copy(), np.eye(len(matrix), dtype=LONG)
  for _ in range(20):
    for i in range(len(matrix)):
      for j in range(i):
        if np.abs(matrix[i, j]) < 1e-300:
          continue
        tau = (matrix[j, j] - matrix[i, i]) / (2 * matrix[i, j])
        t = (1 if tau >= 0 else -1) / (np.abs(tau) + np.sqrt(1 + tau**2))
        c = 1 / np.sqrt(1 + t**2)
        turn = np.eye(len(matrix), dtype=LONG)
        turn[[i, j], [i, j]] = c
        turn[i, j], turn[j, i] = c * t, -c * t
        matrix, vectors = turn.T @ matrix @ turn, vectors @ turn
  return np.diagonal(matrix), vectors


def apply(matrix, function):
  """function(matrix) for a symmetric long double matrix."""
  values, vectors = long_eigh((matrix + matrix.T) / 2)
  return (vectors * function(values)) @ vectors.T


def full_covariance(dtype: str, condition: float):
  rng = np.random.default_rng(int(condition))
  for _ in range(10):
    p_a, p_b = (oracles.random_moments(rng, 4, condition) for _ in range(2))
    q_a, q_b = (oracles.full(p, dtype) for p in (p_a, p_b))
    q_a, q_b = (FullGaussian(q.mean, jnp.tril(q.scale_tril)) for q in (q_a, q_b))
    m_a, m_b, root_a, root_b = (
      np.asarray(x, LONG) for x in (q_a.mean, q_b.mean, q_a.scale_tril, q_b.scale_tril)
    )
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    inverse_b = apply(cov_b, lambda v: 1 / v)
    logs_a, logs_b = (2 * np.log(np.diagonal(r)) for r in (root_a, root_b))
    difference = m_a - m_b
    shift, traces = difference @ difference, np.trace(cov_a) + np.trace(cov_b)

    square = difference @ inverse_b @ difference
    logs = np.sum(np.abs(logs_a)) + np.sum(np.abs(logs_b))
    log_prob = -(square + np.sum(logs_b) + 4 * LOG_2PI) / 2
    yield 'log_prob', q_b.log_prob(q_a.mean), log_prob, square + logs + 4 * LOG_2PI
    entropy = (np.sum(logs_a) + 4 * (LOG_2PI + 1)) / 2
    yield 'entropy', gaussians.entropy(q_a), entropy, logs + 4 * (LOG_2PI + 1)
    kl = (np.trace(inverse_b @ cov_a) - 4 + square + np.sum(logs_b) - np.sum(logs_a)) / 2
    yield 'kl_divergence', gaussians.kl_divergence(q_a, q_b), kl, kl

    a, inverse_a = apply(cov_a, np.sqrt), apply(cov_a, lambda v: 1 / np.sqrt(v))
    optimal = a @ apply(a @ cov_b @ a, np.sqrt) @ inverse_a
    w2 = shift + traces - 2 * np.trace(optimal)
    yield 'squared_w2', wasserstein.squared_w2(q_a, q_b), w2, shift + traces
    for gamma in (10.0 ** np.arange(-6, 7, 2)).astype(dtype):
      g = LONG(gamma)
      inner = np.eye(4, dtype=LONG) + 4 * g**2 * a @ cov_b @ a
      u = long_eigh((inner + inner.T) / 2)[0] ** LONG(0.5)
      # Eq. 18 with A^-1 cancelled: Psi = 2 gamma A (I + U)^-1 A S_b.
      psi = 2 * g * a @ apply(inner, lambda v: 1 / (1 + np.sqrt(v))) @ a @ cov_b
      w2_gamma = shift + traces - 2 * np.trace(psi)
      actual = wasserstein.entropic_squared_w2(q_a, q_b, gamma)
      yield 'entropic_squared_w2', actual, w2_gamma, shift + traces
      # |S_b| |S_a - Psi S_b^-1 Psi^T| = |S_a| |S_b| prod 2 / (u + 1)
      cost = g / 2 * w2_gamma - 4 * (LOG_2PI + 1) - np.sum(logs_a + logs_b) / 2
      cost = cost + np.sum(np.log((u + 1) / 2)) / 2
      size = g / 2 * (shift + traces) + 4 * (LOG_2PI + 1) + logs / 2 + np.sum(np.log((u + 1) / 2))
      actual = wasserstein.entropic_transport_cost(q_a, q_b, gamma)
      yield 'entropic_transport_cost', actual, cost, size

    # From moments: references at the covariances as rounded.
    cov_a, cov_b = (np.asarray((c + c.T) / 2, dtype) for c in (p_a.cov, p_b.cov))
    long_a, long_b = cov_a.astype(LONG), cov_b.astype(LONG)
    a, inverse_a = apply(long_a, np.sqrt), apply(long_a, lambda v: 1 / np.sqrt(v))
    root = apply(a @ long_b @ a, np.sqrt)
    size = np.max(np.abs(long_a)) + np.max(np.abs(long_b))
    w2 = shift + np.trace(long_a) + np.trace(long_b) - 2 * np.trace(root)
    actual = wasserstein.squared_w2_full(q_a.mean, cov_a, q_b.mean, cov_b)
    yield 'squared_w2_full', actual, w2, shift + traces
    actual = wasserstein.optimal_coupling_full(jnp.asarray(cov_a), jnp.asarray(cov_b))
    yield 'optimal_coupling_full', actual, a @ root @ inverse_a, size
    for gamma in (10.0 ** np.arange(-6, 7, 2)).astype(dtype):
      g = LONG(gamma)
      inner = np.eye(4, dtype=LONG) + 4 * g**2 * a @ long_b @ a
      psi = 2 * g * a @ apply(inner, lambda v: 1 / (1 + np.sqrt(v))) @ a @ long_b
      actual = wasserstein.entropic_coupling_full(jnp.asarray(cov_a), jnp.asarray(cov_b), gamma)
      yield 'entropic_coupling_full', actual, psi, size


def random_costs(count: int = 4_000_000) -> str:
  """How often the factorised cost in float32 misses max(1e-6, 1e-5 |cost|), and by what."""
  rng = np.random.default_rng(0)
  lv_a, lv_b, log_gamma = (
    rng.uniform(np.log(low), np.log(high), count).astype(np.float32)
    for low, high in ((1e-8, 1e4), (1e-8, 1e4), (1e-6, 1e6))
  )
  gamma = np.exp(log_gamma)
  q_a, q_b = (
    DiagonalGaussian(jnp.zeros((count, 1)), jnp.asarray(v)[:, None]) for v in (lv_a, lv_b)
  )
  cost = jax.jit(jax.vmap(wasserstein.entropic_transport_cost))(q_a, q_b, gamma)
  expected = oracles.paper_scalar_cost(0, lv_a, 0, lv_b, gamma)
  error = np.abs(np.asarray(cost, LONG) - expected)
  ratio = error / np.maximum(1e-6, 1e-5 * np.abs(expected))
  missed = ratio > 1
  moved = oracles.cost_of_half_a_unit(*(x[missed] for x in (lv_a, lv_b, gamma)))
  return (
    f'{missed.sum()} of {count} random factorised costs in float32 miss max(1e-6, 1e-5 |cost|), '
    f'by up to {ratio.max():.2f} times; their errors are up to {np.max(error[missed] / moved):.2f} '
    'of what half a unit in the last place of a log-variance does.'
  )


def main():
  groups = [('factorised', factorised), ('objective', objective_terms)]
  for condition in (1e0, 1e2, 1e4):
    groups.append(
      (f'full, condition {condition:.0e}', lambda d, c=condition: full_covariance(d, c))
    )
  print('| family | function | float32: relative | to terms | to tolerance | float64: relative '
        '| to terms | to tolerance |')  # fmt: skip
  print('|---|---|---|---|---|---|---|---|')
  for family, group in groups:
    table: dict[str, dict[str, Worst]] = {}
    for dtype in TOLERANCES:
      with jax.enable_x64(dtype == 'float64'):
        for name, actual, expected, terms in group(dtype):
          assert np.asarray(actual).dtype == dtype, (name, np.asarray(actual).dtype)
          row = table.setdefault(name, {}).setdefault(dtype, Worst())
          row.add(name, dtype, actual, expected, terms)
    for name, row in table.items():
      cells = [
        f'{value:.1e}'
        for worst in row.values()
        for value in (worst.relative, worst.to_terms, worst.to_tolerance)
      ]
      print(f'| {family} | `{name}` | ' + ' | '.join(cells) + ' |')
  print(random_costs())


if __name__ == '__main__':
  main()
