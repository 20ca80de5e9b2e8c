"""The contrastive loss of two views of each image (van den Oord et al., 2018; Kim et al., 2020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from se_vae import gaussians


def info_nce(
  queries: jax.Array,
  candidates: jax.Array,
  *,
  positives: jax.Array,
  temperature: jax.typing.ArrayLike,
) -> jax.Array:
  """Returns minus the log-probability that each query picks its positive, in nats, `[B]`.

  The probabilities are a softmax over the candidates of the cosine similarity, divided by the
  temperature.

  Example:
    >>> z = jnp.eye(2)
    >>> losses = info_nce(z, z, positives=jnp.array([0, 1]), temperature=1.0)
    >>> print(f'{losses[0]:.4f} {losses[1]:.4f}')  # log(1 + exp(-1))
    0.3133 0.3133

  Args:
    queries: vectors `[B, D]`.
    candidates: vectors `[M, D]`; the positive of each query is one of them.
    positives: `[B]` integers in [0, M), the candidate that belongs to each query.
    temperature: a scalar > 0. It may be traced.

  Raises:
    AssertionError: if shapes do not fit, or the temperature is not a scalar.
    ValueError: if the temperature is known, and it is not finite or not > 0.
  """
  if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
    raise AssertionError(
      f'queries [B, D] and candidates [M, D] do not fit: {queries.shape}, {candidates.shape}'
    )
  if positives.shape != queries.shape[:1]:
    raise AssertionError(f'positives must be [{len(queries)}], got {positives.shape}')
  gaussians.check_scalar('temperature', temperature, positive=True)
  logits = _unit(queries) @ _unit(candidates).T / temperature
  log_probabilities = jax.nn.log_softmax(logits, axis=-1)
  return -jnp.take_along_axis(log_probabilities, positives[:, None], axis=-1)[:, 0]


def _unit(vectors: jax.Array) -> jax.Array:
  """Returns vectors of length 1; those shorter than 1e-6 become shorter, with finite gradients."""
  squared = jnp.sum(vectors**2, axis=-1, keepdims=True)
  return vectors * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))
