"""The Smooth Encoder ELBO (paper Eq. 2-7, Sec. 6), with two couplings of z_a and z_b.

Both couplings are Gaussian and contain exp(-gamma / 2 ||z_a - z_b||^2), so the best joint
distribution of the two encodings is the same entropic one (Eq. 20-24). They differ in the prior:

* 'paper' is Eq. 2: the coupling times a standard normal prior for each of z_a and z_b. Its
  marginals are N(0, s^2 I) with s^2 = (1 + gamma) / (1 + 2 gamma), and it is not normalised.
* 'balanced' is N(0, [[I, rho I], [rho I, I]]) with gamma = rho / (1 - rho^2), as in the model of
  the Autoencoding VAE (Cemgil et al., 2020). Its marginals are the standard normal prior, so p(x)
  is the VAE's.

Rescaled by s, the paper's coupling with `gamma` is the balanced one with `balanced_gamma(gamma)`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from se_vae import gaussians, wasserstein
from se_vae.config import COUPLINGS
from se_vae.gaussians import LOG_2PI, Gaussian
from se_vae.objectives.bounds import check_batch, gaussian_log_likelihood


class SEElboTerms(NamedTuple):
  """The SE-ELBO and its terms, in nats (Eq. 6-7, Sec. 6).

  `elbo = log_likelihood + log_prior_a + log_prior_b - transport_cost`.

  Attributes:
    elbo: `[B]`, B_SE of Sec. 6. With the paper's coupling it is a bound for the *unnormalised*
      model of Eq. 2. With the balanced one it is a lower bound on log p(x) of the VAE's model.
    log_likelihood: `[B]`, E log p(x | z_a), estimated with the decoded sample.
    log_prior_a: `[B]`, the part of E log psi(z_a, z_b) that depends on z_a alone, in closed form.
      With the paper's coupling it is E log p(z_a).
    log_prior_b: `[B]`, the same for z_b.
    transport_cost: `[B]`, the entropic transport cost WD. It contains -H[Q], the negative entropy
      of the coupling.
    normalized_elbo: `[B]`, a lower bound on the log-density of x under the normalised model:
      `elbo - log_normalizer(gamma, D)` with the paper's coupling, `elbo` with the balanced one.
  """

  elbo: jax.Array
  log_likelihood: jax.Array
  log_prior_a: jax.Array
  log_prior_b: jax.Array
  transport_cost: jax.Array
  normalized_elbo: jax.Array


def se_elbo(
  x: jax.Array,
  x_mean: jax.Array,
  q_a: Gaussian,
  q_b: Gaussian,
  *,
  gamma: jax.typing.ArrayLike,
  obs_var: jax.typing.ArrayLike,
  coupling: str = 'paper',
) -> SEElboTerms:
  """Returns the Smooth Encoder ELBO and its terms for each example (Eq. 6-7, Sec. 6).

  Its gradient in the decoder's parameters equals the gradient of `elbo`. With gamma = 0 it does not
  become the ELBO of a VAE: it is `elbo(x) - KL(q_b || N(0, I))` then, with either coupling.

  Example:
    >>> from se_vae.objectives import elbo
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
    coupling: 'paper' (Eq. 2) or 'balanced'.

  Returns:
    `SEElboTerms`, each `[B]`, in nats.

  Raises:
    AssertionError: if shapes do not fit, or gamma or obs_var is not a scalar.
    TypeError: if q_a and q_b are of different families.
    ValueError: if the value of gamma or obs_var is known and outside its range; for an unknown
      coupling.
  """
  log_likelihood = gaussian_log_likelihood(x, x_mean, obs_var)
  check_batch(x, 'q_a', q_a)
  wasserstein.check_gamma(gamma)
  gamma = jnp.asarray(gamma, log_likelihood.dtype)
  log_prior_a, log_prior_b = (log_prior(q, gamma, coupling) for q in (q_a, q_b))
  log_mass = jnp.zeros((), log_likelihood.dtype)
  if coupling == 'paper':
    log_mass = log_normalizer(gamma, q_a.dim)
  transport_cost = wasserstein.entropic_transport_cost(q_a, q_b, gamma)
  bound = log_likelihood + log_prior_a + log_prior_b - transport_cost
  return SEElboTerms(
    elbo=bound,
    log_likelihood=log_likelihood,
    log_prior_a=log_prior_a,
    log_prior_b=log_prior_b,
    transport_cost=transport_cost,
    normalized_elbo=bound - log_mass,
  )


def log_prior(q: Gaussian, gamma: jax.typing.ArrayLike, coupling: str = 'paper') -> jax.Array:
  """Returns the part of E log psi(z_a, z_b) that depends on one of the two latents alone.

  With the paper's coupling it is E log p(z) (Eq. 2). With the balanced one,

    log psi(z_a, z_b) = -gamma / 2 ||z_a - z_b||^2 - (||z_a||^2 + ||z_b||^2) / (2 (1 + rho))
                        - D log(2 pi) - D / 2 log(1 - rho^2),

  and each latent has half of the constants.

  Args:
    q: encodings, with means `[..., D]`.
    gamma: coupling strength, a scalar >= 0. It may be traced.
    coupling: 'paper' (Eq. 2) or 'balanced'.

  Returns:
    `[...]`, in nats.

  Raises:
    AssertionError: if gamma is not a scalar.
    ValueError: if the value of gamma is known, and it is negative or not finite; for an unknown
      coupling.
  """
  if coupling not in COUPLINGS:
    raise ValueError(f'coupling must be one of {", ".join(COUPLINGS)}, got {coupling!r}')
  if coupling == 'paper':
    return gaussians.expected_log_standard_normal(q)
  quadratic = gaussians.expected_squared_norm(q) / (1.0 + correlation(gamma))
  log_det = log_conditional_variance(gamma)
  return -0.5 * (quadratic + q.dim * (LOG_2PI + 0.5 * log_det))


def correlation(gamma: jax.typing.ArrayLike) -> jax.Array:
  """Returns the correlation rho in [0, 1) of the balanced coupling, gamma = rho / (1 - rho^2).

  Example:
    >>> print(f'{correlation(0.0):.3f} {correlation(10.0):.3f}')
    0.000 0.951

  Args:
    gamma: coupling strength, a scalar >= 0. It may be traced.

  Raises:
    AssertionError: if gamma is not a scalar.
    ValueError: if the value of gamma is known, and it is negative or not finite.
  """
  wasserstein.check_gamma(gamma)
  # (sqrt(1 + 4 gamma^2) - 1) / (2 gamma), in the form in which nothing cancels.
  return 2.0 * jnp.asarray(gamma) / (1.0 + _root(gamma))


def log_conditional_variance(gamma: jax.typing.ArrayLike) -> jax.Array:
  """Returns log(1 - rho^2), a scalar <= 0: the log-variance of z_b given z_a, in each dimension.

  Its arguments and errors are those of `correlation`.
  """
  wasserstein.check_gamma(gamma)
  return math.log(2.0) - jnp.log1p(_root(gamma))  # 1 - rho^2 = rho / gamma


def _root(gamma: jax.typing.ArrayLike) -> jax.Array:
  """Returns sqrt(1 + 4 gamma^2), which does not overflow."""
  return jnp.hypot(1.0, 2.0 * jnp.asarray(gamma))


def balanced_gamma(gamma: jax.typing.ArrayLike) -> jax.Array:
  """Returns the balanced coupling strength that equals the paper's `gamma`: about half of it.

  The paper's normalised prior has marginals of standard deviation s. With latents in units of s, it
  is the balanced one of this strength: the correlation is gamma / (1 + gamma) in both. Since an
  encoder and a decoder that are trained together learn any scale of the latents, the two couplings
  differ in their units only. They differ in more where one of the networks is frozen.

  Example:
    >>> print(f'{balanced_gamma(1.0):.3f} {balanced_gamma(10.0):.3f}')
    0.667 5.238

  Args:
    gamma: the paper's coupling strength, a scalar >= 0. It may be traced.

  Raises:
    AssertionError: if gamma is not a scalar.
    ValueError: if the value of gamma is known, and it is negative or not finite.
  """
  wasserstein.check_gamma(gamma)
  gamma = jnp.asarray(gamma)
  return gamma * ((1.0 + gamma) / (1.0 + 2.0 * gamma))


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
    ValueError: if dim is negative; or if the value of gamma is known, and it is negative or not
      finite.
  """
  wasserstein.check_gamma(gamma)
  if dim < 0:
    raise ValueError(f'dim must be >= 0, got {dim}')
  return -0.5 * dim * jnp.log1p(2.0 * gamma)
