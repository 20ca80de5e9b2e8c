"""The VAE's evidence lower bound, and the likelihood of the decoder (paper Sec. 1 and 6)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from se_vae import gaussians
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
  error = squared_error(x, x_mean)
  gaussians.check_scalar('obs_var', obs_var, positive=True)
  obs_var = jnp.asarray(obs_var, x_mean.dtype)
  num_pixels = math.prod(x.shape[1:])
  log_scale = gaussians.LOG_2PI + jnp.log(obs_var)
  return -0.5 * (error / obs_var + num_pixels * log_scale)


def squared_error(x: jax.Array, x_mean: jax.Array) -> jax.Array:
  """Returns ||x - x_mean||^2 of each example `[B]`.

  Args:
    x: floating point, `[B, ...]`.
    x_mean: the same shape.

  Raises:
    AssertionError: if the shapes differ, or for arrays that are not floating point.
  """
  gaussians.check_floating(x=x, x_mean=x_mean)
  if x.shape != x_mean.shape or x.ndim < 1:
    raise AssertionError(
      f'x and x_mean must have one shape [B, ...], got {x.shape}, {x_mean.shape}'
    )
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
  check_batch(x, 'q', q)
  kl = gaussians.kl_to_standard_normal(q)
  return ElboTerms(log_likelihood - kl, log_likelihood, kl)


def check_batch(x: jax.Array, name: str, q: Gaussian) -> None:
  """Raises AssertionError unless q has means `[B, D]` for images `[B, ...]`."""
  gaussians.check_gaussian(q)
  if q.mean.ndim != 2 or q.mean.shape[0] != x.shape[0]:
    raise AssertionError(f'{name} needs means [{len(x)}, D], as x has, got {q.mean.shape}')
