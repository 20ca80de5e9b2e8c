"""The Jacobian norm of an encoder, for a Lipschitz penalty (Hoffman et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def squared_jacobian_norm(
  function: Callable[[jax.Array], jax.Array], x: jax.Array, signs: jax.Array
) -> jax.Array:
  """Returns an unbiased estimate of the squared Frobenius norm of each example's Jacobian, `[B]`.

  It is ||J^T s||^2 for one random vector s of signs: E s s^T = I, so its mean is ||J||_F^2.

  Example:
    >>> print(squared_jacobian_norm(lambda x: 3.0 * x, jnp.zeros((1, 4)), jnp.ones((1, 4))))
    [36.]

  Args:
    function: maps images `[B, ...]` to vectors `[B, D]`, each a function of its own image.
    x: images, `[B, ...]`.
    signs: `[B, D]`, independent draws of -1 and 1.

  Raises:
    AssertionError: if the function does not return vectors of the shape of `signs`.
  """
  means, vjp = jax.vjp(function, x)
  if means.shape != signs.shape:
    raise AssertionError(f'signs must have shape {means.shape}, as the means, got {signs.shape}')
  (gradient,) = vjp(signs.astype(means.dtype))
  return jnp.sum(gradient.reshape(len(x), -1) ** 2, axis=-1)
