"""Differentiable matrix functions: symmetric square roots and the polar factor.

The derivatives solve Sylvester equations. They stay finite where eigenvalues or singular values are
equal; derivatives through the eigenvectors would divide by the difference of the two values there.
The rules for the derivatives call these same functions, so derivatives of every order exist. All
matrices are `[..., D, D]`, with batch axes first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def transpose(matrix: jax.Array) -> jax.Array:
  """Returns the matrices with their last two axes exchanged."""
  return jnp.swapaxes(matrix, -1, -2)


@jax.custom_jvp
def sqrtm(matrix: jax.Array) -> jax.Array:
  """Returns the symmetric square root of positive semidefinite matrices `[..., D, D]`.

  Negative eigenvalues, which rounding can produce, count as zero. The derivative along the null
  space of a singular matrix is unbounded; zero is returned in its place.
  """
  eigenvalues, vectors = jnp.linalg.eigh(matrix)
  roots = jnp.sqrt(jnp.maximum(eigenvalues, 0.0))
  return (vectors * roots[..., None, :]) @ transpose(vectors)


@sqrtm.defjvp
def _sqrtm_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (matrix,), (d_matrix,) = primals, tangents
  root = sqrtm(matrix)
  return root, solve_sylvester(root, 0.5 * (d_matrix + transpose(d_matrix)))


@jax.custom_jvp
def hypotenuse(matrix: jax.Array) -> jax.Array:
  """Returns the symmetric matrix (I + M^T M)^(1/2) for any square M `[..., D, D]`.

  It is computed from the singular values of M, because M^T M loses the small ones in float32.
  """
  _, singular, right = jnp.linalg.svd(matrix)
  return (transpose(right) * jnp.sqrt(1.0 + singular**2)[..., None, :]) @ right


@hypotenuse.defjvp
def _hypotenuse_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (matrix,), (d_matrix,) = primals, tangents
  root = hypotenuse(matrix)
  half = transpose(matrix) @ d_matrix
  return root, solve_sylvester(root, half + transpose(half))


@jax.custom_jvp
def polar_factor(matrix: jax.Array) -> jax.Array:
  """Returns the orthogonal factor O of the polar decomposition M = O (M^T M)^(1/2), `[..., D, D]`.

  O maximises Tr(O^T M) over the orthogonal matrices. A singular M has several maximisers: one of
  them is returned, and the derivative along the undetermined part of O is zero.
  """
  left, _, right = jnp.linalg.svd(matrix)
  return left @ right


@polar_factor.defjvp
def _polar_factor_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (matrix,), (d_matrix,) = primals, tangents
  rotation = polar_factor(matrix)
  stretch = transpose(rotation) @ matrix
  skew = transpose(rotation) @ d_matrix
  skew = solve_sylvester(0.5 * (stretch + transpose(stretch)), skew - transpose(skew))
  return rotation, rotation @ skew


def solve_sylvester(psd: jax.Array, rhs: jax.Array) -> jax.Array:
  """Returns the solution X of P X + X P = R, all `[..., D, D]`.

  Args:
    psd: P, symmetric positive semidefinite. If it is singular, the equation does not determine all
      of X, and the undetermined part of the result is zero.
    rhs: R, any matrix.
  """

  def operator(x: jax.Array) -> jax.Array:
    return psd @ x + x @ psd

  def solve(_: Any, rhs: jax.Array) -> jax.Array:
    eigenvalues, vectors = jnp.linalg.eigh(psd)
    sums = eigenvalues[..., :, None] + eigenvalues[..., None, :]
    size = jnp.maximum(eigenvalues[..., -1:, None], jnp.finfo(psd.dtype).tiny)
    solvable = sums > psd.shape[-1] * jnp.finfo(psd.dtype).eps * size
    inverse = jnp.where(solvable, 1.0 / jnp.where(solvable, sums, 1.0), 0.0)
    return vectors @ (inverse * (transpose(vectors) @ rhs @ vectors)) @ transpose(vectors)

  # JAX then differentiates the equation rather than the solver. The map X -> P X + X P is
  # symmetric, so JAX may use the same solver for its transpose.
  return jax.lax.custom_linear_solve(operator, rhs, solve, symmetric=True)
