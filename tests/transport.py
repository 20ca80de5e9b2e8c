"""Pairs of Gaussians and jitted functions, shared by the tests of `se_vae.wasserstein`."""

import jax.numpy as jnp
import numpy as np

from se_vae import wasserstein
from tests import oracles

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
