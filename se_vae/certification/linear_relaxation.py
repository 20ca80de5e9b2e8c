"""Linear bounds of the outputs (CROWN, Zhang et al., 2018), found from the outputs backwards.

A linear function of a layer's outputs is turned into one of its inputs that is never larger, layer
by layer, until it is one of the network's inputs; its smallest value over the region is the bound.
Linear layers are transposed. A ReLU whose input z lies in [l, u], l <= 0 <= u, gives way to lines,

  a z  <=  max(z, 0)  <=  s z + max(-s l, (1 - s) u),

which hold for any slopes a and s in [0, 1]: max(z, 0) - s z is convex, so it is largest at an end.
They hold for rounded slopes too. s = u / (u - l) gives the smallest area, and so does the adaptive
a, which is 1 where u > -l and 0 elsewhere; alpha-CROWN (Xu et al., 2021) improves a by projected
gradient steps. Where l > 0 or u < 0, both lines are max(z, 0) itself.

Rounding: see `rounding`. With coefficients c of a layer's outputs W x + b, the errors of c W, of
c . b and of the network's own sums add up to at most gamma times `|c| . (|W| |x| + |b|)`, and those
of a ReLU's lines to gamma times `|c| . |z|`. The sum of these is subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from se_vae.certification import interval, rounding
from se_vae.certification.layers import Affine, Layers, ReLU, row
from se_vae.certification.regions import Box, Region, dots

# Operations beside the sums: see `lower_bounds`.
_EXTRA = 16

# The first step of a slope, and what each further one is multiplied with.
_FIRST_STEP = 0.3
_DECAY = 0.8


def boxes(layers: Layers, region: Region) -> list[Box]:
  """Returns a box of the inputs of every layer, and last one of the outputs.

  The inputs of each ReLU are bounded backwards, with the boxes of the ReLUs before it, and by the
  interval rule; each bound is the tighter one. The outputs are bounded by the interval rule alone.

  Args:
    layers: the network.
    region: of its inputs `[B, ...]`.
  """
  found = [region.box]
  for i, (layer, inputs) in enumerate(
    zip(layers, interval.input_regions(layers, region), strict=True)
  ):
    box = found[-1]
    if isinstance(layer, ReLU) and _num_affine(layers[:i]) > 1:
      box = found[-1] = box.intersect(output_box(layers[:i], found, region))
    found.append(interval.propagate(layer, box, inputs))
  return found


def num_coefficients(layers: Layers, in_shape: tuple[int, ...]) -> int:
  """Returns how many coefficients CROWN holds at once for one example, for the inputs of ReLUs.

  Example:
    >>> from se_vae.certification import Dense
    >>> first, second = Dense(jnp.ones((7, 3)), jnp.ones(3)), Dense(jnp.ones((3, 2)), jnp.ones(2))
    >>> num_coefficients((first, ReLU(), second, ReLU()), (7,))  # two bounds of two units each
    28
  """
  sizes = _sizes(layers, in_shape)
  bounded = [
    2 * sizes[i] * num_row_coefficients(layers[:i], in_shape)
    for i, layer in enumerate(layers)
    if isinstance(layer, ReLU) and _num_affine(layers[:i]) > 1
  ]
  return max(bounded, default=1)


def num_row_coefficients(layers: Layers, in_shape: tuple[int, ...]) -> int:
  """Returns how many coefficients a linear bound of one output has at the widest layer."""
  return max(_sizes(layers, in_shape))


def _sizes(layers: Layers, in_shape: tuple[int, ...]) -> list[int]:
  """Returns the sizes of the inputs of all layers, and of the outputs."""
  shapes = [in_shape]
  for layer in layers:
    shapes.append(layer.out_shape(shapes[-1]))
  return [math.prod(shape) for shape in shapes]


def _num_affine(layers: Layers) -> int:
  return sum(isinstance(layer, Affine) for layer in layers)


def output_box(
  layers: Layers, known: Sequence[Box], region: Region, *, slope_steps: int = 0
) -> Box:
  """Returns a box of the network's outputs, `[B, ...]`.

  Args:
    layers: the network.
    known: a box of the inputs of every layer.
    region: of the network's inputs.
    slope_steps: gradient steps on the lower slopes, >= 0.
  """
  shape = region.box.lower.shape[1:]
  for layer in layers:
    shape = layer.out_shape(shape)
  size = math.prod(shape)
  unit = jnp.eye(size, dtype=region.box.lower.dtype)
  rows = jnp.concatenate([unit, -unit]).reshape(1, 2 * size, *shape)
  lower = lower_bounds(layers, known, region, rows, slope_steps=slope_steps)
  lower, minus_upper = jnp.split(lower, 2, axis=1)
  return Box(lower.reshape(-1, *shape), -minus_upper.reshape(-1, *shape))


def lower_bounds(
  layers: Layers,
  known: Sequence[Box],
  region: Region,
  rows: jax.Array,
  *,
  slope_steps: int = 0,
) -> jax.Array:
  """Returns lower bounds of linear functions of the network's outputs over a region.

  Args:
    layers: the network.
    known: a box of the inputs of every layer, as `boxes` and `interval.boxes` return them.
    region: of the network's inputs `[B, ...]`.
    rows: coefficients of the outputs, `[B or 1, R, ...]`.
    slope_steps: gradient steps on the lower slopes, >= 0, which each row has for itself.

  Returns:
    `[B, R]`, sound in floating point.
  """
  slopes = [
    _adaptive_slopes(box)[:, None]
    for layer, box in zip(layers, known, strict=False)
    if isinstance(layer, ReLU)
  ]
  if not slope_steps or not slopes:
    return _with_slopes(layers, known, region, rows, slopes)
  slopes = [jnp.repeat(values, rows.shape[1], axis=1) for values in slopes]

  def total(slopes: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    lower = _with_slopes(layers, known, region, rows, slopes)
    return jnp.sum(lower), lower

  def step(
    i: jax.Array, carry: tuple[list[jax.Array], jax.Array]
  ) -> tuple[list[jax.Array], jax.Array]:
    slopes, best = carry
    gradients, lower = jax.grad(total, has_aux=True)(slopes)
    length = _FIRST_STEP * _DECAY ** i.astype(lower.dtype)
    slopes = [
      jnp.clip(values + length * jnp.sign(gradient), 0.0, 1.0)
      for values, gradient in zip(slopes, gradients, strict=True)
    ]
    return slopes, jnp.maximum(best, lower)

  lowest = jnp.full((len(region.box.lower), rows.shape[1]), -jnp.inf, rows.dtype)
  slopes, best = jax.lax.fori_loop(0, slope_steps, step, (slopes, lowest))
  return jnp.maximum(best, _with_slopes(layers, known, region, rows, slopes))


def _with_slopes(
  layers: Layers,
  known: Sequence[Box],
  region: Region,
  rows: jax.Array,
  slopes: Sequence[jax.Array],
) -> jax.Array:
  """Returns the lower bounds `[B, R]` for given lower slopes `[B, 1 or R, ...]`, one a ReLU."""
  remaining = list(slopes)
  # The constant is a sum over the layers, of which each may be rounded twice.
  extra = _EXTRA + 2 * len(layers)
  constant = slack = jnp.zeros((1, 1), rows.dtype)
  for layer, box in reversed(list(zip(layers, known, strict=False))):
    if isinstance(layer, Affine):
      offset, error = _bias(layer, box, rows, extra)
      rows = layer.transposed(rows, box.lower.shape[1:])
    elif isinstance(layer, ReLU):
      rows, offset, error = _relu(box, rows, remaining.pop(), extra)
    else:
      rows = rows.reshape(*rows.shape[:2], *box.lower.shape[1:])
      continue
    constant, slack = constant + offset, slack + error
  return region.lower_bounds(rows, extra) + constant - slack


def _bias(layer: Affine, box: Box, rows: jax.Array, extra: int) -> tuple[jax.Array, jax.Array]:
  """Returns rows . bias, and the error of this, of the transposed layer and of the layer itself."""
  sizes, flat = interval.magnitude(layer, box), _flat(rows)
  bias = jnp.broadcast_to(row(layer.bias, sizes), sizes.shape).reshape(len(sizes), -1)
  gamma = rounding.gamma(sum(layer.fans) + extra, rows.dtype)
  error = gamma * (dots(jnp.abs(flat), _flat_sizes(sizes)) + _underflow(sizes, box.magnitude))
  gamma = rounding.gamma(flat.shape[2] + extra, rows.dtype)
  return dots(flat, bias), error + gamma * dots(jnp.abs(flat), jnp.abs(bias))


def _relu(
  box: Box, rows: jax.Array, lower_slope: jax.Array, extra: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the rows of a ReLU's inputs, a constant beside them, and the error of both."""
  slope, intercept = _upper_line(box)
  positive, negative = jnp.maximum(rows, 0.0), jnp.minimum(rows, 0.0)
  through = positive * lower_slope + negative * slope[:, None]
  flat, sizes = _flat(negative), _flat_sizes(box.magnitude + rounding.FLOOR)
  offset = dots(flat, _flat_sizes(intercept))
  error = rounding.gamma(extra, rows.dtype) * (
    dots(jnp.abs(_flat(rows)), sizes) + _underflow(sizes)
  )
  # The constant has the sign of negative coefficients: no sum of absolute values is needed.
  return through, offset, error - rounding.gamma(flat.shape[2] + extra, rows.dtype) * offset


def _upper_line(box: Box) -> tuple[jax.Array, jax.Array]:
  """Returns slope and intercept, `[B, ...]`, of a line above max(z, 0) on the box."""
  lower, upper = jnp.minimum(box.lower, 0.0), jnp.maximum(box.upper, 0.0)
  width = upper - lower
  slope = upper / jnp.where(width > 0.0, width, 1.0)
  return slope, jnp.maximum(-slope * lower, (1.0 - slope) * upper)


def _adaptive_slopes(box: Box) -> jax.Array:
  """Returns the lower slope `[B, ...]` that leaves the smaller triangle: 0 or 1."""
  return (box.upper > -box.lower).astype(box.lower.dtype)


def _flat(rows: jax.Array) -> jax.Array:
  """Rows `[B, R, ...]` as `[B, R, F]`."""
  return rows.reshape(*rows.shape[:2], -1)


def _flat_sizes(sizes: jax.Array) -> jax.Array:
  """Values `[B, ...]` as `[B, F]`."""
  return sizes.reshape(len(sizes), -1)


def _underflow(*sizes: jax.Array) -> jax.Array:
  """What underflow adds to an error, `[B, 1]`: see `rounding.FLOOR`."""
  total = sum(jnp.sum(_flat_sizes(values), axis=1, keepdims=True) for values in sizes)
  return rounding.FLOOR * jnp.asarray(total)
