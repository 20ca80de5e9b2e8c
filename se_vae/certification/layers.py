"""The layers that can be certified: linear maps and ReLU, with the operations that bounds need.

A network is a tuple of layers. Layers are pytrees of their weights, so bounds are differentiable
in the weights.

To add a kind of layer, write its interval rule (`interval.propagate`) and its backward rule
(`linear_relaxation.lower_bounds`). Linear maps need no rule of their own: they need the methods of
`Dense`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
  """A linear layer: x @ weights + bias.

  Attributes:
    weights: `[K, N]`.
    bias: `[N]`.
  """

  weights: jax.Array
  bias: jax.Array

  def product(self, x: jax.Array) -> jax.Array:
    """Returns `[B, N]`, the layer without its bias, for `[B, K]`."""
    return jnp.matmul(x, self.weights, precision='highest')

  def transposed(self, coefficients: jax.Array, in_shape: Shape) -> jax.Array:
    """Returns coefficients of the inputs, `[B, R, K]`, from those of the outputs, `[B, R, N]`."""
    del in_shape
    return jnp.matmul(coefficients, self.weights.T, precision='highest')

  def map_weights(self, function: Callable[[jax.Array], jax.Array]) -> Dense:
    """Returns the layer with a function applied to weights and bias."""
    return Dense(function(self.weights), function(self.bias))

  def out_shape(self, in_shape: Shape) -> Shape:
    """Returns the shape of an example's outputs."""
    if in_shape != self.weights.shape[:1]:
      raise AssertionError(f'a Dense layer wants inputs {self.weights.shape[:1]}, got {in_shape}')
    return self.weights.shape[1:]

  @property
  def fans(self) -> tuple[int, int]:
    """The number of products in an output, and in a coefficient of an input."""
    return self.weights.shape[0], self.weights.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conv:
  """A `SAME` convolution of images `[B, H, W, I]`.

  Attributes:
    weights: `[K, K', I, O]`.
    bias: `[O]`.
    strides: in height and width.
  """

  weights: jax.Array
  bias: jax.Array
  strides: tuple[int, int] = dataclasses.field(metadata={'static': True})

  def product(self, x: jax.Array) -> jax.Array:
    """Returns `[B, h, w, O]`, the layer without its bias, for `[B, H, W, I]`."""
    return self._convolve(x)

  def _convolve(self, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
      x,
      self.weights,
      self.strides,
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision='highest',
    )

  def transposed(self, coefficients: jax.Array, in_shape: Shape) -> jax.Array:
    """Returns coefficients of the inputs, `[B, R, H, W, I]`, from those of the outputs."""
    rows = coefficients.shape[:2]
    flat = coefficients.reshape(-1, *coefficients.shape[2:])
    inputs = jax.ShapeDtypeStruct((len(flat), *in_shape), flat.dtype)
    (transposed,) = jax.linear_transpose(self._convolve, inputs)(flat)
    return transposed.reshape(*rows, *in_shape)

  def map_weights(self, function: Callable[[jax.Array], jax.Array]) -> Conv:
    """Returns the layer with a function applied to weights and bias."""
    return dataclasses.replace(self, weights=function(self.weights), bias=function(self.bias))

  def out_shape(self, in_shape: Shape) -> Shape:
    """Returns the shape of an example's outputs."""
    channels = self.weights.shape[2]
    if len(in_shape) != 3 or in_shape[2] != channels:
      raise AssertionError(f'a Conv layer wants inputs (H, W, {channels}), got {in_shape}')
    sizes = zip(in_shape[:2], self.strides, strict=True)
    height, width = (-(-size // step) for size, step in sizes)
    return height, width, self.weights.shape[3]

  @property
  def fans(self) -> tuple[int, int]:
    """The number of products in an output, and in a coefficient of an input, at most."""
    height, width, inputs, outputs = self.weights.shape
    return height * width * inputs, height * width * outputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReLU:
  """max(x, 0), elementwise."""

  def out_shape(self, in_shape: Shape) -> Shape:
    """Returns the shape of an example's outputs."""
    return in_shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flatten:
  """`[B, ...]` to `[B, F]`, in row-major order."""

  def out_shape(self, in_shape: Shape) -> Shape:
    """Returns the shape of an example's outputs."""
    return (math.prod(in_shape),)


Affine = Dense | Conv
Layer = Affine | ReLU | Flatten
Layers = Sequence[Layer]


def apply(layers: Layers, x: jax.Array) -> jax.Array:
  """Returns the network's outputs for `[B, ...]`.

  Example:
    >>> layers = (Flatten(), Dense(jnp.array([[1.0], [-1.0]]), jnp.zeros(1)), ReLU())
    >>> print(apply(layers, jnp.array([[3.0, 1.0], [1.0, 3.0]])))
    [[2.]
     [0.]]
  """
  for layer in layers:
    if isinstance(layer, Affine):
      x = layer.product(x) + row(layer.bias, x)
    elif isinstance(layer, ReLU):
      x = jax.nn.relu(x)
    else:
      x = x.reshape(len(x), -1)
  return x


def check(layers: Layers, in_shape: Shape) -> Shape:
  """Returns the shape of an example's outputs.

  Raises:
    TypeError: for something that is no layer, by its name.
    AssertionError: if the shapes of neighbouring layers, or those of weights and bias, do not fit,
      or a layer is empty.
  """
  for layer in layers:
    if not isinstance(layer, Layer):
      raise TypeError(f'cannot certify {type(layer).__name__}: not a Dense, Conv, ReLU or Flatten')
    if isinstance(layer, Affine):
      _check_weights(layer)
    in_shape = layer.out_shape(in_shape)
  return in_shape


def _check_weights(layer: Affine) -> None:
  wanted = '[K, N], [N]' if isinstance(layer, Dense) else "[K, K', I, O], [O]"
  num_axes = 2 if isinstance(layer, Dense) else 4
  weights, bias = layer.weights.shape, layer.bias.shape
  if len(weights) != num_axes or 0 in weights or bias != weights[-1:]:
    raise AssertionError(
      f'{type(layer).__name__}: weights and bias must be {wanted}, not empty, got {weights}, {bias}'
    )


def row(bias: jax.Array, x: jax.Array) -> jax.Array:
  """Returns a bias `[N]` with as many axes as x."""
  return bias.reshape((1,) * (x.ndim - 1) + (-1,))
