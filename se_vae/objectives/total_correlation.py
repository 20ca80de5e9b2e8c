"""The ELBO with its KL term taken apart, for a beta-TC-VAE (Chen et al., 2018).

The mean of KL(q(z | x) || p(z)) over the data is the mutual information of x and z, plus the total
correlation of the aggregated encoding q(z), plus the divergences of its dimensions from the prior.
q(z) is estimated from the encodings of the batch (minibatch-weighted sampling).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from se_vae import gaussians
from se_vae.gaussians import DiagonalGaussian, Gaussian
from se_vae.objectives import bounds


class TCElboTerms(NamedTuple):
  """The ELBO and its terms, in nats, all estimated with the decoded sample.

  `elbo = log_likelihood - mutual_information - total_correlation - dimensionwise_kl`.

  Attributes:
    elbo: `[B]`, a lower bound on log p(x) in expectation over the sample.
    log_likelihood: `[B]`, log p(x | z).
    mutual_information: `[B]`, log q(z | x) - log q(z).
    total_correlation: `[B]`, log q(z) - sum over d of log q(z_d).
    dimensionwise_kl: `[B]`, sum over d of log q(z_d) - log p(z_d).
  """

  elbo: jax.Array
  log_likelihood: jax.Array
  mutual_information: jax.Array
  total_correlation: jax.Array
  dimensionwise_kl: jax.Array


def tc_elbo(
  x: jax.Array,
  x_mean: jax.Array,
  q: Gaussian,
  z: jax.Array,
  q_all: Gaussian,
  *,
  obs_var: jax.typing.ArrayLike,
  num_examples: int = 1,
) -> TCElboTerms:
  """Returns the ELBO, with its KL term taken apart, for each example (Chen et al., 2018).

  Args:
    x: observations, `[B, ...]`.
    x_mean: decoder mean at z, the same shape as x.
    q: factorised encodings q(z | x), with means `[B, D]`.
    z: the samples of q that were decoded, `[B, D]`.
    q_all: encodings of the whole batch, with means `[M, D]`, of which q is a part or all.
    obs_var: observation noise variance v, a scalar > 0. It may be traced.
    num_examples: N, the size of the data set in the weights 1 / (N M) of Chen et al. It shifts the
      terms by constants, which cancel in `elbo`: no gradient depends on it. With 1, q(z) is the
      mean of the densities of the batch.

  Returns:
    `TCElboTerms`, each `[B]`, in nats.

  Raises:
    AssertionError: if shapes do not fit, or obs_var is not a scalar.
    TypeError: for encodings that are not factorised.
    ValueError: if the value of obs_var is known, and it is not finite or not > 0.
  """
  if not (isinstance(q, DiagonalGaussian) and isinstance(q_all, DiagonalGaussian)):
    raise TypeError('tc_elbo needs factorised encodings: DiagonalGaussian')
  log_likelihood = bounds.gaussian_log_likelihood(x, x_mean, obs_var)
  bounds.check_batch(x, 'q', q)
  gaussians.check_gaussian(q_all)
  if q_all.mean.ndim != 2 or q_all.mean.shape[1] != q.dim:
    raise AssertionError(f'q_all needs means [M, {q.dim}], got {q_all.mean.shape}')
  log_conditional = q.log_prob(z)
  by_dimension = _log_densities(z, q_all)  # [B, M, D]
  log_count = jnp.log(jnp.asarray(num_examples * q_all.mean.shape[0], z.dtype))
  log_joint = jax.nn.logsumexp(jnp.sum(by_dimension, axis=-1), axis=1) - log_count
  log_product = jnp.sum(jax.nn.logsumexp(by_dimension, axis=1) - log_count, axis=-1)
  log_prior = -0.5 * jnp.sum(z**2 + gaussians.LOG_2PI, axis=-1)
  return TCElboTerms(
    elbo=log_likelihood - log_conditional + log_prior,
    log_likelihood=log_likelihood,
    mutual_information=log_conditional - log_joint,
    total_correlation=log_joint - log_product,
    dimensionwise_kl=log_product - log_prior,
  )


def _log_densities(z: jax.Array, q: DiagonalGaussian) -> jax.Array:
  """Returns log q_m(z_bd) for samples `[B, D]` and Gaussians with means `[M, D]`: `[B, M, D]`."""
  mean, log_var = q.mean[None, :, :], q.log_var[None, :, :]
  whitened = (z[:, None, :] - mean) * jnp.exp(-0.5 * log_var)
  return -0.5 * (whitened**2 + log_var + gaussians.LOG_2PI)
