"""Strided convolution and its transpose, in the form that each platform runs fastest.

XLA's native convolution is right on GPU and TPU. On CPU its gradient, inside the loops of an attack
or of a multi-step dispatch, is many times slower than the same sum written as matrix products over
image patches. The choice is made here, when a program is lowered, and nowhere else.

Between layers images are `[H, W, B, C]`: the products' rows in order, and every patch and its
transpose a copy or a sum of whole vectors `[B, C]`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

_LAYOUT = ('HWNC', 'HWIO', 'HWNC')


def output_size(size: int, stride: int) -> int:
  """Height or width after a `SAME` convolution."""
  return -(-size // stride)


def conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`SAME` convolution of images `[H, W, B, I]` with a kernel `[K, K, I, O]`, to `[h, w, B, O]`."""
  return jax.lax.platform_dependent(
    x,
    kernel,
    cpu=functools.partial(_conv_as_matmul, stride=stride),
    default=functools.partial(_conv_native, stride=stride),
  )


def conv_transpose(
  y: jax.Array, kernel: jax.Array, stride: int, image_size: tuple[int, int]
) -> jax.Array:
  """The transpose of `conv` as a linear map: `[h, w, B, O]` to images `[H, W, B, I]`.

  Args:
    y: features, of the shape that `conv` gives for images of `image_size`.
    kernel: `[K, K, I, O]`, the kernel of the convolution that is transposed.
    stride: its stride.
    image_size: (H, W) of the result, with h = ceil(H / stride) and w = ceil(W / stride).
  """
  return jax.lax.platform_dependent(
    y,
    kernel,
    cpu=functools.partial(_conv_transpose_as_matmul, stride=stride, image_size=image_size),
    default=functools.partial(_conv_transpose_native, stride=stride, image_size=image_size),
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
