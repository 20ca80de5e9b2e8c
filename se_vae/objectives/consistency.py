"""Self-consistency: the encoder gives back a latent that was decoded (Cemgil et al., 2020).

The Autoencoding VAE extends the VAE by a second latent z~ with z~ | z ~ N(rho z, (1 - rho^2) I), so
that p(x) stays the same. The second latent is the encoding of an image x~, decoded from a sample of
q(z | x). For every x~ and every joint distribution Q of z ~ q(z | x) and z~ ~ q(. | x~),

  log p(x) >= ELBO(x) - E KL(Q(z~ | z) || N(rho z, (1 - rho^2) I)).

As in the paper of the Smooth Encoder, Q is the best one, the entropic coupling (Eq. 20-24), so this
bound is the SE-ELBO with the balanced coupling and x~ in the place of x'. The authors' code uses
the moments of the two encodings too, with z and z~ independent. Training treats x~ as data: no
gradient flows through it, as in that code.

`se_avae_elbo` adds the selected x' (Sec. 2.1) to it, with the entropic coupling of z and z'. How
the two are combined is this project's choice.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from se_vae.gaussians import Gaussian
from se_vae.objectives import bounds, smooth


class AVAETerms(NamedTuple):
  """The bound of the Autoencoding VAE and its terms, in nats.

  `elbo = log_likelihood - kl - consistency_kl`.

  Attributes:
    elbo: `[B]`, a lower bound on log p(x), estimated with the decoded sample.
    log_likelihood: `[B]`, E log p(x | z), estimated with the decoded sample.
    kl: `[B]`, KL(q(z | x) || N(0, I)) >= 0, in closed form.
    consistency_kl: `[B]`, E KL(Q(z~ | z) || p(z~ | z)) >= 0, in closed form.
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


def avae_elbo(
  x: jax.Array,
  x_mean: jax.Array,
  q: Gaussian,
  q_cycle: Gaussian,
  *,
  gamma: jax.typing.ArrayLike,
  obs_var: jax.typing.ArrayLike,
) -> AVAETerms:
  """Returns the bound of the Autoencoding VAE and its terms for each example.

  With gamma = 0 it is `elbo(x) - KL(q_cycle || N(0, I))`.

  Args:
    x: observations, `[B, ...]`.
    x_mean: decoder mean at one sample of q, the same shape as x.
    q: encoding q(z | x), with means `[B, D]`.
    q_cycle: encoding of x~, of the same family and shape as q; x~ may be `x_mean`.
    gamma: coupling strength, a scalar >= 0, in inverse squared latent units. It may be traced.
    obs_var: observation noise variance v, a scalar > 0. It may be traced.

  Returns:
    `AVAETerms`, each `[B]`, in nats.

  Raises:
    AssertionError: if shapes do not fit, or gamma or obs_var is not a scalar.
    TypeError: if q and q_cycle are of different families.
    ValueError: if the value of gamma or obs_var is known and outside its range.
  """
  terms = bounds.elbo(x, x_mean, q, obs_var=obs_var)
  bounds.check_batch(x, 'q_cycle', q_cycle)
  pair = smooth.se_elbo(x, x_mean, q, q_cycle, gamma=gamma, obs_var=obs_var, coupling='balanced')
  # The difference of the two bounds would lose digits to a large log-likelihood.
  consistency = pair.transport_cost - pair.log_prior_a - pair.log_prior_b - terms.kl
  return AVAETerms(terms.elbo - consistency, terms.log_likelihood, terms.kl, consistency)


def se_avae_elbo(
  x: jax.Array,
  x_mean: jax.Array,
  q_a: Gaussian,
  q_b: Gaussian,
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
    x_mean: decoder mean at one sample of q_a, the same shape as x.
    q_a: encoding q(z | x), with means `[B, D]`.
    q_b: encoding of the selected x', of the same family and shape.
    q_cycle: encoding of x~, of the same family and shape; x~ may be `x_mean`.
    gamma: coupling strength of both pairs, a scalar >= 0. It may be traced.
    obs_var: observation noise variance v, a scalar > 0. It may be traced.
    coupling: of z and z': 'paper' (Eq. 2) or 'balanced'.

  Returns:
    `SEAVAETerms`, each `[B]`, in nats.

  Raises:
    AssertionError: if shapes do not fit, or gamma or obs_var is not a scalar.
    TypeError: if q_a, q_b and q_cycle are of different families.
    ValueError: if the value of gamma or obs_var is known and outside its range; for an unknown
      coupling.
  """
  numbers = {'gamma': gamma, 'obs_var': obs_var}
  terms = smooth.se_elbo(x, x_mean, q_a, q_b, **numbers, coupling=coupling)
  consistency = avae_elbo(x, x_mean, q_a, q_cycle, **numbers).consistency_kl
  shared = terms._asdict()
  shared['elbo'] -= consistency
  shared['normalized_elbo'] -= consistency
  return SEAVAETerms(**shared, consistency_kl=consistency)
