"""Differentiable matrix functions: symmetric square roots and the polar factor.

Their derivatives solve Sylvester equations, and so stay finite where a derivative taken through the
eigenvectors or singular vectors would divide by the gap between two equal ones. Each derivative is
itself written with these functions, so that derivatives of every order exist.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def transpose(matrix: jax.Array) -> jax.Array:
  """Transposes the last two axes."""
  return jnp.swapaxes(matrix, -1, -2)


@jax.custom_jvp
def sqrtm(matrix: jax.Array) -> jax.Array:
  """Symmetric square root of symmetric positive semidefinite matrices `[..., D, D]`.

  Eigenvalues that rounding made negative count as zero. The derivative along the null space of a
  singular matrix, unbounded in truth, is returned as zero.
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
  """The symmetric (I + M^T M)^(1/2) for any square M, `[..., D, D]`.

  From the singular values of M: the small ones would not survive the squaring of M in float32.
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
  """The orthogonal factor O of the polar decomposition M = O (M^T M)^(1/2), `[..., D, D]`.

  It is the rotation that maximises Tr(O^T M). For a singular M one of the maximisers is returned,
  and the derivative is zero along the part of O that M leaves free.
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
  """Solves P X + X P = R for X, with P symmetric positive semidefinite, all `[..., D, D]`.

  Where P is singular, the part of X that the equation leaves free is zero.
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

  # Differentiates the equation, not the solver, and transposes it as the self-adjoint map it is.
  return jax.lax.custom_linear_solve(operator, rhs, solve, symmetric=True)
