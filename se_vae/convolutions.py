"""Strided convolution and its transpose, in the form that each platform runs fastest.

XLA's native convolution is right on GPU and TPU. On CPU, inside the loops of an attack or of a
multi-step dispatch, it is many times slower than the same sum written as one matrix product over
image patches. The choice is made here, when a program is lowered, and nowhere else.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def output_size(size: int, stride: int) -> int:
  """Height or width after a `SAME` convolution."""
  return -(-size // stride)


def conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`SAME` convolution of images `[B, H, W, I]` with a kernel `[K, K, I, O]`."""
  return jax.lax.platform_dependent(
    x,
    kernel,
    cpu=functools.partial(_conv_as_matmul, stride=stride),
    default=functools.partial(_conv_native, stride=stride),
  )


def conv_transpose(
  y: jax.Array, kernel: jax.Array, stride: int, image_size: tuple[int, int]
) -> jax.Array:
  """The transpose of `conv` as a linear map: `[B, h, w, O]` to images `[B, H, W, I]`.

  Args:
    y: features, of the shape that `conv` gives for images of `image_size`.
    kernel: `[K, K, I, O]`, the kernel of the convolution that is transposed.
    stride: its stride.
    image_size: (H, W) of the result, with h = ceil(H / stride) and w = ceil(W / stride).
  """
  shape = jax.ShapeDtypeStruct((y.shape[0], *image_size, kernel.shape[2]), y.dtype)
  transposed = jax.linear_transpose(lambda x: conv(x, kernel, stride), shape)
  return transposed(y)[0]


def _conv_native(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), 'SAME', dimension_numbers=_LAYOUT
  )


def _conv_as_matmul(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  batch, height, width, _ = x.shape
  size = kernel.shape[0]
  out_height, out_width = output_size(height, stride), output_size(width, stride)
  pads = [_same_padding(length, size, stride) for length in (height, width)]
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  rows, columns = ((length - 1) * stride + 1 for length in (out_height, out_width))
  patches = [
    x[:, row : row + rows : stride, column : column + columns : stride]
    for row in range(size)
    for column in range(size)
  ]
  stacked = jnp.concatenate(patches, axis=-1).reshape(-1, size * size * x.shape[3])
  return (stacked @ kernel.reshape(-1, kernel.shape[3])).reshape(batch, out_height, out_width, -1)


def _same_padding(length: int, size: int, stride: int) -> tuple[int, int]:
  total = max((output_size(length, stride) - 1) * stride + size - length, 0)
  return total // 2, total - total // 2
