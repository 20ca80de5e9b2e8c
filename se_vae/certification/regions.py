"""The set of inputs that a certificate is about: a ball about x, cut with the pixel box."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from se_vae.attacks.projections import Norm, check_norm_and_bounds
from se_vae.certification import rounding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Box:
  """An interval for each number: lower <= value <= upper.

  Attributes:
    lower: `[B, ...]`.
    upper: `[B, ...]`.
  """

  lower: jax.Array
  upper: jax.Array

  @property
  def center(self) -> jax.Array:
    """The middle of each interval, up to rounding."""
    return 0.5 * (self.lower + self.upper)

  @property
  def half_width(self) -> jax.Array:
    """Half the width of each interval, up to rounding."""
    return 0.5 * (self.upper - self.lower)

  @property
  def magnitude(self) -> jax.Array:
    """The largest absolute value in each interval."""
    return jnp.maximum(jnp.abs(self.lower), jnp.abs(self.upper))

  def intersect(self, other: Box) -> Box:
    """Returns the intersection; a bound is NaN where one of the two is."""
    return Box(jnp.maximum(self.lower, other.lower), jnp.minimum(self.upper, other.upper))

  def relu(self) -> Box:
    """Returns the box of max(value, 0)."""
    return Box(jnp.maximum(self.lower, 0.0), jnp.maximum(self.upper, 0.0))

  def flatten(self) -> Box:
    """Returns the box `[B, F]`."""
    size = len(self.lower)
    return Box(self.lower.reshape(size, -1), self.upper.reshape(size, -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Region:
  """Inputs inside a box and, if there is a radius, within it of x in the Euclidean norm.

  Attributes:
    box: of the inputs, `[B, ...]`.
    x: the centre of the Euclidean ball `[B, ...]`, or None.
    radius: of the Euclidean ball, `[B]`, or None.
  """

  box: Box
  x: jax.Array | None = None
  radius: jax.Array | None = None

  def flatten(self) -> Region:
    """Returns the region of inputs `[B, F]`."""
    x = None if self.x is None else self.x.reshape(len(self.x), -1)
    return Region(self.box.flatten(), x, self.radius)

  def lower_bounds(self, coefficients: jax.Array, num_roundings: int) -> jax.Array:
    """Returns a lower bound of coefficients . x' over the region.

    Args:
      coefficients: `[B or 1, R, ...]`.
      num_roundings: further operations on the result, whose rounding is to be covered.

    Returns:
      `[B, R]`. It holds for inputs that are outside the region by one unit in the last place too.
    """
    region = self.flatten()
    box, x = region.box, region.x
    rows = coefficients.reshape(*coefficients.shape[:2], -1)
    sizes = box.magnitude + rounding.FLOOR
    error = rounding.gamma(rows.shape[2] + num_roundings + 16, rows.dtype)
    underflow = rounding.FLOOR * jnp.sum(sizes, axis=1, keepdims=True)
    slack = error * (dots(jnp.abs(rows), sizes) + underflow)
    lower = dots(rows, box.center) - dots(jnp.abs(rows), box.half_width)
    if x is not None and self.radius is not None:
      # The floor makes up for squares that underflow.
      norm = jnp.sqrt(jnp.sum(rows**2 + rounding.FLOOR, axis=2)) * self.radius[:, None]
      lower = jnp.maximum(lower, dots(rows, x) - norm - error * norm)
    return lower - slack


def ball(
  x: jax.Array,
  radius: jax.typing.ArrayLike,
  *,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
) -> Region:
  """Returns the inputs within `radius` of x and within `bounds`.

  The linf ball is cut with the pixel box exactly. Bounds over the l2 ball are the tighter of those
  over the whole ball and those over the smallest box around ball and pixel box.

  Example:
    >>> region = ball(jnp.array([[0.0, 0.5]]), 0.1)
    >>> print(region.box.lower, region.box.upper)
    [[0.  0.4]] [[0.1 0.6]]

  Args:
    x: clean inputs `[B, ...]`, inside `bounds`.
    radius: a scalar or `[B]`, >= 0, traced. Where it is not finite or not >= 0, or an input is
      outside `bounds`, every bound is NaN, and nothing is certified.
    norm: 'linf' or 'l2', of x' - x over all pixels of an example.
    bounds: lowest and highest pixel value.

  Raises:
    AssertionError: if x is not a batch of floats, or the radius fits neither shape.
    ValueError: for an unknown norm or bounds that are not (lowest, highest).
  """
  if x.ndim < 2 or not x.size or not jnp.issubdtype(x.dtype, jnp.floating):
    raise AssertionError(f'x must be floats [B, ...], not empty, got {x.dtype} {x.shape}')
  if jnp.shape(radius) not in ((), (len(x),)):
    raise AssertionError(f'radius must be a scalar or [{len(x)}], got {jnp.shape(radius)}')
  check_norm_and_bounds(norm, bounds)
  lowest, highest = bounds
  radius = jnp.broadcast_to(jnp.asarray(radius, x.dtype), len(x))
  is_inside = ((x >= lowest) & (x <= highest)).reshape(len(x), -1).all(axis=1)
  radius = jnp.where(is_inside & (radius >= 0.0) & (radius < jnp.inf), radius, jnp.nan)
  widths = radius.reshape((-1,) + (1,) * (x.ndim - 1))
  box = Box(jnp.maximum(x - widths, lowest), jnp.minimum(x + widths, highest))
  return Region(box) if norm == 'linf' else Region(box, x, radius)


def dots(rows: jax.Array, values: jax.Array) -> jax.Array:
  """Returns the inner products `[B, R]` of rows `[B or 1, R, F]` with values `[B, F]`."""
  if len(rows) == 1:  # the same rows for all examples: one matrix product
    return jnp.matmul(values, rows[0].T, precision='highest')
  return jnp.einsum('brf,bf->br', rows, values, precision='highest')
