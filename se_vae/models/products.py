"""Products of weights and activations, in the form that each platform runs fastest.

Between the layers of an MLP encoder activations are features-major, `[F, B]`: a CPU multiplies a
row-major matrix of weights by them faster than the other way round, and faster still where neither
factor is transposed. A forward pass wants the transposed weights, a backward pass the weights
themselves; a transposed copy behind a barrier is made once, outside the loop of an attack. GPU and
TPU transpose within a product at no cost, and make no copy. The choice is made here, when a program
is lowered, and nowhere else.
"""

from __future__ import annotations

import jax


@jax.custom_jvp
def product(kernel: jax.Array, features: jax.Array) -> jax.Array:
  """Weights `[K, N]` and features-major `[K, B]`, to features-major `[N, B]`."""
  return _product(transposed(kernel), features, 1)


@product.defjvp
def _product_jvp(
  primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (kernel, features), (d_kernel, d_features) = primals, tangents
  # A backward pass transposes these; each is written so that its transpose is fast.
  tangent = _product(kernel, d_features, 0) + _product(d_kernel, features, 0)
  return product(kernel, features), tangent


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
  """Sum over an axis of a, and the first of b."""
  return jax.lax.dot_general(a, b, (((axis,), (0,)), ((), ())))


def transposed(matrix: jax.Array) -> jax.Array:
  """The transpose of a matrix; on a CPU a copy, made apart from what takes it."""
  return jax.lax.platform_dependent(
    matrix,
    cpu=lambda matrix: jax.lax.optimization_barrier(matrix.T),
    default=lambda matrix: matrix.T,
  )
