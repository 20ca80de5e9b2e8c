"""Linear layers and convolutions, in the form that each platform runs fastest.

All layers take and return arrays whose first axis is the batch. Inside they compute on activations
of another layout, `[F, B]` in a linear layer and `[H, W, B, C]` in a convolution. A layer includes
its activation function, so that the transpositions at the end of a layer and at the beginning of
the next one are neighbours, and XLA cancels them.

On GPU and TPU a product transposes its factors at no cost, and convolutions are XLA's own. On a CPU

* a product is fastest with the weights as its row-major first factor, and activations as columns.
  The forward pass wants the transposed weights, and the backward pass the weights themselves; a
  transposed copy behind a barrier is made once, outside the loop of an attack;
* the gradient of XLA's convolution, inside the loop of an attack or of many steps, is many times
  slower than the same sum written as matrix products over image patches.

`jax.lax.platform_dependent` makes the choice when a program is lowered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Activation = Callable[[jax.Array], jax.Array]

_LAYOUT = ('HWNC', 'HWIO', 'HWNC')


def identity(x: jax.Array) -> jax.Array:
  """Returns x: the activation function of a linear output."""
  return x


def dense(
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array,
  *,
  activation: Activation = identity,
) -> jax.Array:
  """Returns `activation(x @ kernel + bias)`, `[B, N]`.

  Args:
    x: `[B, K]`.
    kernel: `[K, N]`.
    bias: `[N]`.
    activation: elementwise.
  """
  return activation(_product(kernel, x.T) + bias[:, None]).T


def conv(
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array,
  *,
  stride: int,
  activation: Activation = identity,
) -> jax.Array:
  """Returns the activated `SAME` convolution of images with a kernel, `[B, h, w, O]`.

  Args:
    x: images `[B, H, W, I]`.
    kernel: `[K, K, I, O]`.
    bias: `[O]`.
    stride: in height and width.
    activation: elementwise.
  """
  convolve = jax.lax.platform_dependent(
    x.transpose(1, 2, 0, 3),
    kernel,
    cpu=functools.partial(_conv_as_matmul, stride=stride),
    default=functools.partial(_conv_native, stride=stride),
  )
  return activation(convolve + bias.reshape(1, 1, 1, -1)).transpose(2, 0, 1, 3)


def conv_transpose(
  y: jax.Array,
  kernel: jax.Array,
  bias: jax.Array,
  *,
  stride: int,
  image_size: tuple[int, int],
  activation: Activation = identity,
) -> jax.Array:
  """Returns the activated transpose of the linear part of `conv`, plus a bias, `[B, H, W, I]`.

  Args:
    y: features `[B, h, w, O]`, of the shape that `conv` gives for images of `image_size`.
    kernel: `[K, K, I, O]`, the kernel of the convolution that is transposed.
    bias: `[I]`.
    stride: the stride of that convolution.
    image_size: (H, W) of the result, with h = ceil(H / stride) and w = ceil(W / stride).
    activation: elementwise.
  """
  transposed = jax.lax.platform_dependent(
    y.transpose(1, 2, 0, 3),
    kernel,
    cpu=functools.partial(_conv_transpose_as_matmul, stride=stride, image_size=image_size),
    default=functools.partial(_conv_transpose_native, stride=stride, image_size=image_size),
  )
  return activation(transposed + bias.reshape(1, 1, 1, -1)).transpose(2, 0, 1, 3)


def output_size(size: int, stride: int) -> int:
  """Returns the height or width after a `SAME` convolution."""
  return -(-size // stride)


@jax.custom_jvp
def _product(kernel: jax.Array, features: jax.Array) -> jax.Array:
  """Weights `[K, N]` and columns `[K, B]`, to columns `[N, B]`."""
  return _sum_over(_transposed(kernel), features, 1)


@_product.defjvp
def _product_jvp(
  primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (kernel, features), (d_kernel, d_features) = primals, tangents
  # A backward pass transposes these; each is written so that its transpose is fast.
  tangent = _sum_over(kernel, d_features, 0) + _sum_over(d_kernel, features, 0)
  return _product(kernel, features), tangent


def _sum_over(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
  """The product of two matrices that sums over an axis of a and the first of b."""
  return jax.lax.dot_general(a, b, (((axis,), (0,)), ((), ())))


def _transposed(matrix: jax.Array) -> jax.Array:
  """The transpose of a matrix; on a CPU a copy, made apart from what takes it."""
  return jax.lax.platform_dependent(
    matrix,
    cpu=lambda matrix: jax.lax.optimization_barrier(matrix.T),
    default=lambda matrix: matrix.T,
  )


def _conv_native(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), 'SAME', dimension_numbers=_LAYOUT
  )


def _conv_transpose_native(
  y: jax.Array, kernel: jax.Array, stride: int, image_size: tuple[int, int]
) -> jax.Array:
  shape = jax.ShapeDtypeStruct((*image_size, y.shape[2], kernel.shape[2]), y.dtype)
  return jax.linear_transpose(lambda x: _conv_native(x, kernel, stride), shape)(y)[0]


def _conv_as_matmul(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  batch, (size, _, _, outputs) = x.shape[2], kernel.shape
  matrix = kernel.reshape(-1, outputs)
  if _is_small(matrix, batch):
    patches = _patches(x.swapaxes(2, 3), size, stride, axis=2)
    products = _products(matrix.T, patches.reshape(-1, *patches.shape[2:]))
    return products.reshape(*patches.shape[:2], outputs, batch).swapaxes(2, 3)
  patches = _patches(x, size, stride, axis=3)
  return (patches.reshape(-1, len(matrix)) @ matrix).reshape(*patches.shape[:3], outputs)


def _conv_transpose_as_matmul(
  y: jax.Array, kernel: jax.Array, stride: int, image_size: tuple[int, int]
) -> jax.Array:
  height, width, batch, outputs = y.shape
  size, _, inputs, _ = kernel.shape
  matrix = kernel.reshape(-1, outputs)
  if _is_small(matrix, batch):
    products = _products(matrix, y.swapaxes(2, 3).reshape(-1, outputs, batch))
    patches = products.reshape(height, width, -1, batch)
    return _patches_transpose(patches, size, stride, (*image_size, inputs, batch), 2).swapaxes(2, 3)
  patches = (y.reshape(-1, outputs) @ matrix.T).reshape(height, width, batch, -1)
  return _patches_transpose(patches, size, stride, (*image_size, batch, inputs), 3)


def _patches(x: jax.Array, size: int, stride: int, axis: int) -> jax.Array:
  """What each of the size^2 entries of a kernel sees of `[H, W, ...]`, joined along an axis.

  The image is split into its stride^2 phases, of which each entry sees one, moved. A split
  transposes to a concatenation; a strided slice would to a sum of arrays with holes.
  """
  zero = jnp.zeros((), x.dtype)
  still = ((0, 0, 0),) * (x.ndim - 2)
  spans = [_span(length, size, stride) for length in x.shape[:2]]
  x = jax.lax.pad(x, zero, (*((near, far, 0) for near, far, _ in spans), *still))
  x = x.reshape(x.shape[0] // stride, stride, x.shape[1] // stride, stride, *x.shape[2:])
  phases = [
    [jnp.squeeze(phase, 2) for phase in jnp.split(jnp.squeeze(rows, 1), stride, axis=2)]
    for rows in jnp.split(x, stride, axis=1)
  ]

  def seen(row: int, column: int) -> jax.Array:
    phase = phases[row % stride][column % stride]
    moves = [
      (-(step // stride), outputs + step // stride - blocks, 0)
      for step, (_, _, outputs), blocks in zip((row, column), spans, phase.shape[:2], strict=True)
    ]
    return jax.lax.pad(phase, zero, (*moves, *still))

  return jnp.concatenate([seen(*entry) for entry in np.ndindex(size, size)], axis=axis)


def _patches_transpose(
  patches: jax.Array, size: int, stride: int, shape: tuple[int, ...], axis: int
) -> jax.Array:
  """The transpose of `_patches` as a linear map, to images of this shape."""
  linear = functools.partial(_patches, size=size, stride=stride, axis=axis)
  return jax.linear_transpose(linear, jax.ShapeDtypeStruct(shape, patches.dtype))(patches)[0]


def _span(length: int, size: int, stride: int) -> tuple[int, int, int]:
  """`SAME` padding in front, and behind up to whole blocks of `stride`; the output's length."""
  outputs = output_size(length, stride)
  near = max((outputs - 1) * stride + size - length, 0) // 2
  blocks = max(output_size(near + length, stride), outputs)
  return near, blocks * stride - length - near, outputs


def _is_small(matrix: jax.Array, batch: int) -> bool:
  """Whether to make one product a position: a product of many short rows is slow.

  Copies of the matrix for all of them are then no larger than the patches or the outputs.
  """
  return max(matrix.shape) <= batch


@jax.custom_jvp
def _products(matrix: jax.Array, x: jax.Array) -> jax.Array:
  """A matrix `[M, K]` times what is at N positions, `[N, K, B]`, to `[N, M, B]`."""
  return jax.lax.dot_general(_copies(matrix, len(x)), x, (((2,), (1,)), ((0,), (0,))))


@_products.defjvp
def _products_jvp(
  primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (matrix, x), (d_matrix, d_x) = primals, tangents
  # A backward pass transposes these tangents; each is written so that its transpose is fast.
  tangent = jax.lax.dot_general(_copies(matrix.T, len(x)), d_x, (((1,), (1,)), ((0,), (0,))))
  columns = x.swapaxes(0, 1).reshape(x.shape[1], -1)
  by_matrix = (d_matrix @ columns).reshape(-1, x.shape[0], x.shape[2])
  return _products(matrix, x), tangent + by_matrix.swapaxes(0, 1)


def _copies(matrix: jax.Array, count: int) -> jax.Array:
  """`[count, ...]`, made once, outside the loop of an attack."""
  return jax.lax.optimization_barrier(jnp.broadcast_to(matrix, (count, *matrix.shape)))
