"""Interval bounds (Gowal et al., 2018): a layer maps a box to the smallest box of its outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from se_vae.certification import rounding
from se_vae.certification.layers import Affine, Flatten, Layer, Layers, ReLU, row
from se_vae.certification.regions import Box, Region


def boxes(layers: Layers, region: Region) -> list[Box]:
  """Returns a box of the inputs of every layer, and last one of the outputs.

  Example:
    >>> from se_vae.certification import Dense, ball
    >>> layers = (Dense(jnp.array([[1.0], [-1.0]]), jnp.zeros(1)), ReLU())
    >>> print(boxes(layers, ball(jnp.array([[0.5, 0.5]]), 0.1))[-1].upper.round(3))
    [[0.2]]

  Args:
    layers: the network.
    region: of its inputs `[B, ...]`.
  """
  found = [region.box]
  for layer, inputs in zip(layers, input_regions(layers, region), strict=True):
    found.append(propagate(layer, found[-1], inputs))
  return found


def input_regions(layers: Layers, region: Region) -> list[Region | None]:
  """Returns the region for each layer whose inputs are the network's, and None for the others."""
  regions: list[Region | None] = []
  inputs: Region | None = region
  for layer in layers:
    regions.append(inputs)
    inputs = inputs.flatten() if inputs is not None and isinstance(layer, Flatten) else None
  return regions


def propagate(layer: Layer, box: Box, region: Region | None = None) -> Box:
  """Returns a box of a layer's outputs, `[B, ...]`, for inputs in a box `[B, ...]`.

  Args:
    layer: the layer.
    box: of its inputs.
    region: what is known of the inputs besides, if they are those of the network. Its Euclidean
      ball makes the box of a linear layer's outputs smaller.
  """
  if isinstance(layer, ReLU):
    return box.relu()
  if not isinstance(layer, Affine):
    return box.flatten()
  half = layer.map_weights(jnp.abs).product(box.half_width)
  outputs = _around(layer, box.center, half, box)
  if region is None or region.x is None or region.radius is None:
    return outputs
  # By Cauchy and Schwarz; the padding of a convolution has no part in the norm of a row. The floor
  # makes up for squares that underflow.
  radius = region.radius.reshape((-1,) + (1,) * (region.x.ndim - 1))
  squares = layer.map_weights(jnp.square).product(jnp.broadcast_to(radius**2, region.x.shape))
  return outputs.intersect(_around(layer, region.x, jnp.sqrt(squares + rounding.FLOOR), box))


def magnitude(layer: Affine, box: Box) -> jax.Array:
  """Returns `|W| |x| + |b|` at its largest over a box: what rounding errors are relative to."""
  sizes = layer.map_weights(jnp.abs)
  outputs = sizes.product(box.magnitude)
  return outputs + row(sizes.bias, outputs) + rounding.FLOOR


def _around(layer: Affine, x: jax.Array, half: jax.Array, box: Box) -> Box:
  """Returns the box of `half` about the outputs for x, widened by all rounding."""
  outputs = layer.product(x)
  outputs += row(layer.bias, outputs)
  # One sum here, the same in the network, and the few operations around them.
  slack = rounding.gamma(2 * layer.fans[0] + 16, outputs.dtype) * (magnitude(layer, box) + half)
  slack = jax.lax.stop_gradient(slack)  # see `rounding`
  return Box(outputs - (half + slack), outputs + (half + slack))
