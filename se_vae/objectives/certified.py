"""The SE-ELBO at its smallest over a box of encodings: a bound that no x' can undercut.

For factorised Gaussians, what q_b subtracts from the SE-ELBO is a sum over latents, and each
summand is a function of that latent's mean plus one of its log-variance. The function of the
mean is a convex parabola. With u = sqrt(1 + 4 gamma^2 S_a S_b) and the prior's weight p, which is 1
for the paper's coupling and 1 / (1 + rho) for the balanced one, the derivative in log S_b is

  (u + 1) / 4 * ((gamma + p) (u - 1) / (2 gamma^2 S_a) - 1).

It changes its sign once, from minus to plus. So both functions are largest at an end of their
interval, and the encoding that makes the SE-ELBO smallest is a corner of the box.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from se_vae import gaussians, wasserstein
from se_vae.gaussians import DiagonalGaussian
from se_vae.objectives import smooth

Ends = tuple[jax.Array, jax.Array]


def worst_encoding(
  q_a: DiagonalGaussian,
  mean: Ends,
  log_var: Ends,
  *,
  gamma: jax.typing.ArrayLike,
  coupling: str = 'paper',
) -> DiagonalGaussian:
  """Returns the encoding q_b within a box for which the SE-ELBO is smallest.

  With it in the place of q_b, `se_elbo` is a lower bound of the SE-ELBO for every x' whose encoding
  is in the box. Its gradient flows to the ends of the box.

  Example:
    >>> q_a = DiagonalGaussian(jnp.array([[1.0]]), jnp.array([[0.0]]))
    >>> ends = jnp.array([[0.5]]), jnp.array([[2.0]])
    >>> print(worst_encoding(q_a, ends, (q_a.log_var, q_a.log_var), gamma=10.0).mean)
    [[2.]]

  Args:
    q_a: encoding of the observation, with means `[B, D]`.
    mean: the smallest and the largest mean in the box, each `[B, D]`.
    log_var: the same for the log-variance.
    gamma: coupling strength, a scalar >= 0. It may be traced.
    coupling: 'paper' (Eq. 2) or 'balanced'.

  Raises:
    AssertionError: if shapes do not fit, or gamma is not a scalar.
    ValueError: if the value of gamma is known, and it is negative or not finite; for an unknown
      coupling.
  """
  gaussians.check_gaussian(q_a)
  for name, values in zip(('mean', 'log_var'), (mean, log_var), strict=True):
    if any(end.shape != q_a.mean.shape for end in values):
      shapes = ' and '.join(str(end.shape) for end in values)
      raise AssertionError(f'{name} must have two ends {q_a.mean.shape}, got {shapes}')

  def cost(mean: jax.Array, log_var: jax.Array) -> jax.Array:
    """What each latent of q_b subtracts from the SE-ELBO, `[B, D]`."""
    a, b = (
      DiagonalGaussian(values[0][..., None], values[1][..., None])
      for values in (jax.lax.stop_gradient((q_a.mean, q_a.log_var)), (mean, log_var))
    )
    transport = wasserstein.entropic_transport_cost(a, b, gamma)
    return transport - smooth.log_prior(b, gamma, coupling)

  # The comparison has no gradient; the chosen ends do.
  means, log_vars = jax.lax.stop_gradient((mean, log_var))
  use_lower_mean = cost(means[0], q_a.log_var) > cost(means[1], q_a.log_var)
  use_lower_log_var = cost(q_a.mean, log_vars[0]) > cost(q_a.mean, log_vars[1])
  return DiagonalGaussian(jnp.where(use_lower_mean, *mean), jnp.where(use_lower_log_var, *log_var))
