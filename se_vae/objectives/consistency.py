"""Self-consistency: the encoder gives back a latent that was decoded (Cemgil et al., 2020).

The Autoencoding VAE extends the VAE by a second latent z~ with z~ | z ~ N(rho z, (1 - rho^2) I), so
that p(x) stays the same. An image x~ is decoded from z ~ q(z | x), and z~ ~ q(. | x~). Given z, the
second latent does not depend on x, and the bound of log p(x) is

  ELBO(x) - E KL(q(z~ | x~) || N(rho z, (1 - rho^2) I)).

Here x~ is the decoder mean, and the expectation over z is estimated with the decoded sample. The
authors' code uses the moments of q(z | x) in place of the sample, as if x~ did not depend on z.
Training treats x~ as data: no gradient flows through it, as in that code.

`se_avae_elbo` adds the selected x' (Sec. 2.1) to it, with the entropic coupling of z and z'. How
the two are combined is this project's choice.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from se_vae import gaussians
from se_vae.gaussians import DiagonalGaussian, Gaussian
from se_vae.objectives import bounds, smooth


class AVAETerms(NamedTuple):
  """The bound of the Autoencoding VAE and its terms, in nats.

  `elbo = log_likelihood - kl - consistency_kl`.

  Attributes:
    elbo: `[B]`, a lower bound on log p(x), estimated with the decoded sample.
    log_likelihood: `[B]`, E log p(x | z), estimated with the decoded sample.
    kl: `[B]`, KL(q(z | x) || N(0, I)) >= 0, in closed form.
    consistency_kl: `[B]`, E KL(q(z~ | x~) || p(z~ | z)) >= 0, estimated with the decoded sample.
  """

  elbo: jax.Array
  log_likelihood: jax.Array
  kl: jax.Array
  consistency_kl: jax.Array


class SEAVAETerms(NamedTuple):
  """The SE-ELBO with self-consistency, and its terms, in nats.

  Attributes:
    elbo: `[B]`, the `elbo` of `SEElboTerms` less `consistency_kl`.
    log_likelihood: `[B]`, as in `SEElboTerms`.
    log_prior_a: `[B]`, as in `SEElboTerms`.
    log_prior_b: `[B]`, as in `SEElboTerms`.
    transport_cost: `[B]`, as in `SEElboTerms`.
    consistency_kl: `[B]`, as in `AVAETerms`.
    normalized_elbo: `[B]`, that of `SEElboTerms` less `consistency_kl`: a lower bound on the
      log-density of x under the normalised model.
  """

  elbo: jax.Array
  log_likelihood: jax.Array
  log_prior_a: jax.Array
  log_prior_b: jax.Array
  transport_cost: jax.Array
  consistency_kl: jax.Array
  normalized_elbo: jax.Array


def consistency_kl(z: jax.Array, q_cycle: Gaussian, gamma: jax.typing.ArrayLike) -> jax.Array:
  """Returns KL(q_cycle || N(rho z, (1 - rho^2) I)) >= 0, in nats, `[B]`.

  Example:
    >>> z = jnp.ones((1, 2))
    >>> print(consistency_kl(z, DiagonalGaussian(z, jnp.zeros((1, 2))), gamma=0.0))
    [1.]

  Args:
    z: latents that were decoded, `[B, D]`.
    q_cycle: encodings of the decoded images, with means `[B, D]`.
    gamma: coupling strength, a scalar >= 0, which gives rho (`smooth.correlation`). It may be
      traced.

  Raises:
    AssertionError: if shapes do not fit, or gamma is not a scalar.
    ValueError: if the value of gamma is known, and it is negative or not finite.
  """
  gaussians.check_gaussian(q_cycle)
  gaussians.check_floating(z=z)
  if z.shape != q_cycle.mean.shape:
    raise AssertionError(
      f'z and q_cycle must have one shape [B, D], got {z.shape} and {q_cycle.mean.shape}'
    )
  gamma = jnp.asarray(gamma, z.dtype)
  mean, log_var = smooth.correlation(gamma) * z, smooth.log_conditional_variance(gamma)
  if isinstance(q_cycle, DiagonalGaussian):
    prediction: Gaussian = DiagonalGaussian(mean, jnp.full_like(mean, log_var))
  else:
    identity = jnp.broadcast_to(jnp.eye(q_cycle.dim, dtype=z.dtype), q_cycle.scale_tril.shape)
    prediction = gaussians.FullGaussian(mean, jnp.exp(0.5 * log_var) * identity)
  return gaussians.kl_divergence(q_cycle, prediction)


def avae_elbo(
  x: jax.Array,
  x_mean: jax.Array,
  q: Gaussian,
  z: jax.Array,
  q_cycle: Gaussian,
  *,
  gamma: jax.typing.ArrayLike,
  obs_var: jax.typing.ArrayLike,
) -> AVAETerms:
  """Returns the bound of the Autoencoding VAE and its terms for each example.

  With gamma = 0 it is `elbo(x) - KL(q_cycle || N(0, I))`.

  Args:
    x: observations, `[B, ...]`.
    x_mean: decoder mean at z, the same shape as x.
    q: encoding q(z | x), with means `[B, D]`.
    z: the sample of q that was decoded, `[B, D]`.
    q_cycle: encoding of x~ = x_mean, of the same family and shape as q.
    gamma: coupling strength, a scalar >= 0, in inverse squared latent units. It may be traced.
    obs_var: observation noise variance v, a scalar > 0. It may be traced.

  Returns:
    `AVAETerms`, each `[B]`, in nats.

  Raises:
    AssertionError: if shapes do not fit, or gamma or obs_var is not a scalar.
    ValueError: if the value of gamma or obs_var is known and outside its range.
  """
  terms = bounds.elbo(x, x_mean, q, obs_var=obs_var)
  bounds.check_batch(x, 'q_cycle', q_cycle)
  consistency = consistency_kl(z, q_cycle, gamma)
  return AVAETerms(terms.elbo - consistency, terms.log_likelihood, terms.kl, consistency)


def se_avae_elbo(
  x: jax.Array,
  x_mean: jax.Array,
  q_a: Gaussian,
  q_b: Gaussian,
  z: jax.Array,
  q_cycle: Gaussian,
  *,
  gamma: jax.typing.ArrayLike,
  obs_var: jax.typing.ArrayLike,
  coupling: str = 'paper',
) -> SEAVAETerms:
  """Returns the SE-ELBO with self-consistency and its terms for each example.

  Given z, the latents of x' and of x~ are independent, so the bound is the SE-ELBO less the term
  of `avae_elbo`. The conditional N(rho z, (1 - rho^2) I) is normalised with either coupling.

  Args:
    x: observations, `[B, ...]`.
    x_mean: decoder mean at z, the same shape as x.
    q_a: encoding q(z | x), with means `[B, D]`.
    q_b: encoding of the selected x', of the same family and shape.
    z: the sample of q_a that was decoded, `[B, D]`.
    q_cycle: encoding of x~ = x_mean, of the same family and shape.
    gamma: coupling strength of both pairs, a scalar >= 0. It may be traced.
    obs_var: observation noise variance v, a scalar > 0. It may be traced.
    coupling: of z and z': 'paper' (Eq. 2) or 'balanced'.

  Returns:
    `SEAVAETerms`, each `[B]`, in nats.

  Raises:
    AssertionError: if shapes do not fit, or gamma or obs_var is not a scalar.
    TypeError: if q_a and q_b are of different families.
    ValueError: if the value of gamma or obs_var is known and outside its range; for an unknown
      coupling.
  """
  terms = smooth.se_elbo(x, x_mean, q_a, q_b, gamma=gamma, obs_var=obs_var, coupling=coupling)
  bounds.check_batch(x, 'q_cycle', q_cycle)
  consistency = consistency_kl(z, q_cycle, gamma)
  shared = terms._asdict()
  shared['elbo'] -= consistency
  shared['normalized_elbo'] -= consistency
  return SEAVAETerms(**shared, consistency_kl=consistency)
