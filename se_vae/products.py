"""Products of activations and weights, in the form that each platform runs fastest.

Between the layers of an MLP activations are features-major, `[F, B]`: a CPU multiplies a row-major
matrix of weights by them faster than the other way round, and faster still where neither factor is
transposed. A forward pass wants the transposed weights, a backward pass the weights themselves; a
transposed copy behind a barrier is made once, outside the loop of an attack. GPU and TPU transpose
within a product at no cost, and make no copy. The choice is made here, when a program is lowered,
and nowhere else.
"""

from __future__ import annotations

import jax


@jax.custom_jvp
def enter(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Rows `[B, K]` times weights `[K, N]`, to features-major `[N, B]`."""
  return _product(_transposed(kernel), x, 1, 1)


@jax.custom_jvp
def through(features: jax.Array, kernel: jax.Array) -> jax.Array:
  """Features-major `[K, B]` times weights `[K, N]`, to features-major `[N, B]`."""
  return _product(_transposed(kernel), features, 1, 0)


# A backward pass transposes these tangents; each is written so that its transpose is fast.


@enter.defjvp
def _enter_jvp(
  primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (x, kernel), (d_x, d_kernel) = primals, tangents
  tangent = _product(_transposed(kernel), d_x, 1, 1) + _product(d_kernel, x, 0, 1)
  return enter(x, kernel), tangent


@through.defjvp
def _through_jvp(
  primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (features, kernel), (d_features, d_kernel) = primals, tangents
  tangent = _product(kernel, d_features, 0, 0) + _product(d_kernel, features, 0, 0)
  return through(features, kernel), tangent


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """Sum over one axis of each."""
  return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())))


def _transposed(kernel: jax.Array) -> jax.Array:
  return jax.lax.platform_dependent(
    kernel,
    cpu=lambda kernel: jax.lax.optimization_barrier(kernel.T),
    default=lambda kernel: kernel.T,
  )
