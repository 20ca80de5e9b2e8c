"""The training objectives: the VAE's ELBO and the Smooth Encoder ELBO (paper Eq. 1, 4-7, Sec. 6).

Both are lower bounds, which training maximises. The functions return every term of them, in nats,
one value for each example, `[B]`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from se_vae import gaussians, wasserstein
from se_vae.gaussians import Gaussian


class ElboTerms(NamedTuple):
  """The ELBO and its terms, in nats: `elbo = log_likelihood - kl` (Sec. 1).

  Attributes:
    elbo: `[B]`, a lower bound on log p(x), estimated with the decoded sample.
    log_likelihood: `[B]`, E log p(x | z), estimated with the decoded sample.
    kl: `[B]`, KL(q(z | x) || N(0, I)) >= 0, in closed form.
  """

  elbo: jax.Array
  log_likelihood: jax.Array
  kl: jax.Array


class SEElboTerms(NamedTuple):
  """The SE-ELBO and its terms, in nats (Eq. 6-7, Sec. 6).

  `elbo = log_likelihood + log_prior_a + log_prior_b - transport_cost`.

  Attributes:
    elbo: `[B]`, B_SE of Sec. 6: a bound for the *unnormalised* model of Eq. 2.
    log_likelihood: `[B]`, E log p(x | z_a), estimated with the decoded sample.
    log_prior_a: `[B]`, E log p(z_a), in closed form.
    log_prior_b: `[B]`, E log p(z_b), in closed form.
    transport_cost: `[B]`, the entropic transport cost WD. It contains -H[Q], the negative entropy
      of the coupling.
    normalized_elbo: `[B]`, `elbo - log_normalizer(gamma, D)`: a lower bound on log p~(x), the
      log-density of x under the normalised model of Eq. 2.
  """

  elbo: jax.Array
  log_likelihood: jax.Array
  log_prior_a: jax.Array
  log_prior_b: jax.Array
  transport_cost: jax.Array
  normalized_elbo: jax.Array


def gaussian_log_likelihood(
  x: jax.Array, x_mean: jax.Array, obs_var: jax.typing.ArrayLike
) -> jax.Array:
  """Returns log N(x; x_mean, obs_var I), summed over all axes but the first (Sec. 6).

  Args:
    x: observations, `[B, ...]`.
    x_mean: decoder means, the same shape.
    obs_var: observation noise variance v, a scalar > 0. It may be traced.

  Returns:
    The log-likelihoods `[B]`, in nats.

  Raises:
    AssertionError: if the shapes differ, or obs_var is not a scalar.
    ValueError: if the value of obs_var is known, and it is not finite or not > 0.
  """
  gaussians.check_floating(x=x, x_mean=x_mean)
  if x.shape != x_mean.shape or x.ndim < 1:
    raise AssertionError(
      f'x and x_mean must have one shape [B, ...], got {x.shape}, {x_mean.shape}'
    )
  _check_obs_var(obs_var)
  obs_var = jnp.asarray(obs_var, x_mean.dtype)
  num_pixels = math.prod(x.shape[1:])
  log_scale = gaussians.LOG_2PI + jnp.log(obs_var)
  return -0.5 * (squared_error(x, x_mean) / obs_var + num_pixels * log_scale)


def squared_error(x: jax.Array, x_mean: jax.Array) -> jax.Array:
  """Returns ||x - x_mean||^2 of each example `[B]`, for x and x_mean of one shape `[B, ...]`."""
  # XLA's CPU backend vectorises along the last axis, which has length 1 in grey images.
  flat = (x.shape[0], math.prod(x.shape[1:]))
  return jnp.sum((x.reshape(flat) - x_mean.reshape(flat)) ** 2, axis=-1)


def elbo(
  x: jax.Array, x_mean: jax.Array, q: Gaussian, *, obs_var: jax.typing.ArrayLike
) -> ElboTerms:
  """Returns the VAE's evidence lower bound and its terms for each example (Sec. 1).

  Example:
    >>> x, zeros = jnp.full((1, 4), 0.5), jnp.zeros((1, 2))
    >>> terms = elbo(x, x, gaussians.DiagonalGaussian(zeros, zeros), obs_var=0.1)
    >>> print(terms.kl, terms.elbo == terms.log_likelihood)
    [0.] [ True]

  Args:
    x: observations, `[B, ...]`.
    x_mean: decoder mean at one sample z ~ q(z | x), the same shape as x.
    q: encoding q(z | x), with means `[B, D]`.
    obs_var: observation noise variance v, a scalar > 0. It may be traced.

  Returns:
    `ElboTerms`, each `[B]`, in nats.

  Raises:
    AssertionError: if shapes do not fit, or obs_var is not a scalar.
    ValueError: if the value of obs_var is known, and it is not finite or not > 0.
  """
  log_likelihood = gaussian_log_likelihood(x, x_mean, obs_var)
  _check_batch(x, 'q', q)
  kl = gaussians.kl_to_standard_normal(q)
  return ElboTerms(log_likelihood - kl, log_likelihood, kl)


def se_elbo(
  x: jax.Array,
  x_mean: jax.Array,
  q_a: Gaussian,
  q_b: Gaussian,
  *,
  gamma: jax.typing.ArrayLike,
  obs_var: jax.typing.ArrayLike,
) -> SEElboTerms:
  """Returns the Smooth Encoder ELBO and its terms for each example (Eq. 6-7, Sec. 6).

  Its gradient in the decoder's parameters equals the gradient of `elbo`. With gamma = 0 it does not
  become the ELBO of a VAE: it is `elbo(x) - KL(q_b || N(0, I))` then.

  Example:
    >>> x, zeros = jnp.full((1, 4), 0.5), jnp.zeros((1, 2))
    >>> q = gaussians.DiagonalGaussian(zeros, zeros)
    >>> print(se_elbo(x, x, q, q, gamma=0.0, obs_var=0.1).elbo - elbo(x, x, q, obs_var=0.1).elbo)
    [0.]

  Args:
    x: observations, `[B, ...]`.
    x_mean: decoder mean at one sample z_a ~ q_a, the same shape as x.
    q_a: encoding q(z | x) of the observation, with means `[B, D]`.
    q_b: encoding q(z | x') of the selected fictive observation, of the same family and shape.
    gamma: coupling strength, a scalar >= 0, in inverse squared latent units. It may be traced.
    obs_var: observation noise variance v, a scalar > 0. It may be traced.

  Returns:
    `SEElboTerms`, each `[B]`, in nats.

  Raises:
    AssertionError: if shapes do not fit, or gamma or obs_var is not a scalar.
    TypeError: if q_a and q_b are of different families.
    ValueError: if the value of gamma or obs_var is known and outside its range.
  """
  log_likelihood = gaussian_log_likelihood(x, x_mean, obs_var)
  _check_batch(x, 'q_a', q_a)
  log_prior_a = gaussians.expected_log_standard_normal(q_a)
  log_prior_b = gaussians.expected_log_standard_normal(q_b)
  transport_cost = wasserstein.entropic_transport_cost(q_a, q_b, gamma)
  bound = log_likelihood + log_prior_a + log_prior_b - transport_cost
  return SEElboTerms(
    elbo=bound,
    log_likelihood=log_likelihood,
    log_prior_a=log_prior_a,
    log_prior_b=log_prior_b,
    transport_cost=transport_cost,
    normalized_elbo=bound - log_normalizer(jnp.asarray(gamma, bound.dtype), q_a.dim),
  )


def log_normalizer(gamma: jax.typing.ArrayLike, dim: int) -> jax.Array:
  """Returns the log-normaliser of the paired prior (Eq. 2-3), a scalar <= 0, in nats.

  It is the logarithm of E exp(-gamma / 2 ||z_a - z_b||^2) under two independent standard normals,
  `-dim / 2 log(1 + 2 gamma)`. The paper drops this constant. The SE-ELBO minus it is a lower bound
  on a normalised log-density.

  Example:
    >>> print(log_normalizer(gamma=0.0, dim=64) == 0.0)
    True

  Args:
    gamma: coupling strength, a scalar >= 0. It may be traced.
    dim: latent dimension D of each of z_a and z_b.

  Raises:
    AssertionError: if gamma is not a scalar.
    ValueError: if the value of gamma is known, and it is negative or not finite.
  """
  wasserstein.check_gamma(gamma)
  return -0.5 * dim * jnp.log1p(2.0 * gamma)


def _check_batch(x: jax.Array, name: str, q: Gaussian) -> None:
  gaussians.check_gaussian(q)
  if q.mean.ndim != 2 or q.mean.shape[0] != x.shape[0]:
    raise AssertionError(f'{name} needs means [{len(x)}, D], as x has, got {q.mean.shape}')


def _check_obs_var(obs_var: jax.typing.ArrayLike) -> None:
  if jnp.ndim(obs_var) != 0 or jnp.iscomplexobj(obs_var):
    raise AssertionError(f'obs_var must be a scalar and real, got {obs_var}')
  if not isinstance(obs_var, jax.core.Tracer) and not 0.0 < float(np.asarray(obs_var)) < math.inf:
    raise ValueError(f'obs_var must be finite and > 0, got {obs_var}')
