"""The ball that an attack stays in: random points of it, steps of steepest ascent, projections.

All functions treat each example on its own. Images are `[B, ...]`, or have another batch axis.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from se_vae import seeds
from se_vae.config import ArgumentError

Arguments = ParamSpec('Arguments')
Norm = Literal['linf', 'l2']
NORMS: tuple[str, ...] = ('linf', 'l2')


@dataclasses.dataclass(frozen=True)
class Ball:
  """The images within `radius` of x and within `bounds`.

  Attributes:
    x: images `[B, ...]`, inside `bounds`.
    radius: a scalar >= 0.
    norm: 'linf' or 'l2', of the difference to x over all pixels of an example.
    bounds: the lowest and the highest pixel value.
    batch_axis: of x, and of all images that the methods take; 0 where points are drawn.
  """

  x: jax.Array
  radius: jax.Array
  norm: Norm
  bounds: tuple[float, float]
  batch_axis: int = 0

  @property
  def batch_size(self) -> int:
    """The number of images."""
    return self.x.shape[self.batch_axis]

  def project(self, x_adv: jax.Array) -> jax.Array:
    """The images of the ball that are nearest to x_adv; for l2, nearest up to the clipping."""
    if self.norm == 'linf':
      lowest = jnp.maximum(self.x - self.radius, self.bounds[0])
      highest = jnp.minimum(self.x + self.radius, self.bounds[1])
      return jnp.clip(x_adv, lowest, highest)
    offset = x_adv - self.x
    length = _l2_norm(offset, self.batch_axis)
    shrunk = self.radius / jnp.where(length > 0.0, length, 1.0)
    offset = offset * jnp.where(length <= self.radius, 1.0, shrunk)
    # x is inside the bounds, so clipping moves every pixel towards x: the ball still holds.
    return jnp.clip(self.x + offset, *self.bounds)

  def step(self, x_adv: jax.Array, gradient: jax.Array, *, step_size: jax.Array) -> jax.Array:
    """x_adv after a step of steepest ascent, projected.

    Args:
      x_adv: images `[B, ...]`.
      gradient: of each example's value in its own image, `[B, ...]`.
      step_size: the step's length in the ball's norm, a scalar or `[B]`.
    """
    length = _per_example(step_size, x_adv, self.batch_axis)
    return self.project(x_adv + length * _direction(gradient, self.norm, self.batch_axis))

  def where(self, chosen: jax.Array, x_a: jax.Array, x_b: jax.Array) -> jax.Array:
    """x_a for the chosen examples `[B]`, x_b for the others."""
    return jnp.where(_per_example(chosen, x_a, self.batch_axis), x_a, x_b)

  def better(
    self, x_adv: jax.Array, values: jax.Array, best: jax.Array, best_value: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Of two images the one of the larger value, and that value; the old one where they tie."""
    improved = values > best_value
    return self.where(improved, x_adv, best), jnp.where(improved, values, best_value)

  def random_points(self, keys: jax.Array) -> jax.Array:
    """Uniform draws from the ball `[B, ...]`, one for each of the keys `[B]`, then clipped."""
    shape, dtype = self.x.shape[1:], self.x.dtype

    def draw(key: jax.Array) -> jax.Array:
      if self.norm == 'linf':
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0)
      # As `jax.random.ball` draws, which takes three times as long to compile: in a ball of n
      # dimensions the length to the power of n is uniform.
      key_direction, key_length = jax.random.split(key)
      direction = seeds.draw(jax.random.normal, key_direction, shape, dtype)
      length = seeds.draw(jax.random.uniform, key_length, (), dtype) ** (1.0 / math.prod(shape))
      return direction * (length / jnp.sqrt(jnp.sum(direction**2)))

    return self.project(self.x + self.radius * jax.vmap(draw)(keys))

  def extreme_points(self, keys: jax.Array) -> jax.Array:
    """Uniform draws from the corners of the box or from the sphere `[B, ...]`, then clipped."""
    generator = jax.random.rademacher if self.norm == 'linf' else jax.random.normal
    shape, dtype = self.x.shape[1:], self.x.dtype
    offsets = jax.vmap(lambda key: seeds.draw(generator, key, shape, dtype))(keys)
    return self.step(self.x, offsets, step_size=self.radius)


def ball(
  x: jax.Array, radius: jax.typing.ArrayLike, norm: Norm, bounds: tuple[float, float]
) -> Ball:
  """The ball about images `[B, ...]`; no image is in it if the radius is not finite and >= 0.

  A traced radius cannot raise an error. If it is wrong, an attack returns NaN, and no image that
  looks as if it had been attacked.
  """
  radius = jnp.asarray(radius, x.dtype)
  radius = jnp.where((radius >= 0.0) & (radius < jnp.inf), radius, jnp.nan)
  return Ball(x, radius, norm, bounds)


def checked(attack: Callable[Arguments, jax.Array]) -> Callable[Arguments, jax.Array]:
  """Returns the attack with a check of its arguments; of traced ones, of shape and dtype alone."""
  signature = inspect.signature(attack)

  @functools.wraps(attack)
  def checking(*args: Arguments.args, **kwargs: Arguments.kwargs) -> jax.Array:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    bound.arguments['bounds'] = as_bounds(bound.arguments['bounds'])
    _check(**bound.arguments)
    return attack(*bound.args, **bound.kwargs)

  return checking


def _check(
  *,
  x: jax.Array,
  radius: jax.typing.ArrayLike,
  bounds: tuple[float, float],
  norm: str = 'linf',
  **others: Any,
) -> None:
  if x.ndim < 2 or x.size == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise AssertionError(
      f'x must be floating point [B, ...], and not empty, got {x.dtype} {x.shape}'
    )
  if jnp.ndim(radius) != 0 or jnp.iscomplexobj(radius):
    raise AssertionError(f'radius must be a scalar and real, got {radius}')
  for name in ('num_steps', 'num_queries'):
    count = others.get(name, 1)
    if not isinstance(count, numbers.Integral) or count < 1:
      raise ValueError(f'{name} must be an integer >= 1, got {count}')
  _check_norm(norm)
  if _is_known(radius) and not 0.0 <= float(np.asarray(radius)) < math.inf:
    raise ValueError(f'radius must be finite and >= 0, got {radius}')
  if _is_known(x):
    pixels = np.asarray(x)  # JAX would trace, within another function, what is known
    least, most = pixels.min(), pixels.max()
    if not (bounds[0] <= least and most <= bounds[1]):  # NaN is outside too
      raise ValueError(f'x must lie in the bounds {bounds}, got values from {least} to {most}')


def check_norm_and_bounds(norm: str, bounds: Sequence[float]) -> None:
  """Raises ValueError for an unknown norm, or bounds that are not (lowest, highest)."""
  _check_norm(norm)
  as_bounds(bounds)


def _check_norm(norm: str) -> None:
  if norm not in NORMS:
    raise ValueError(f'norm must be one of {", ".join(NORMS)}, got {norm!r}')


def as_bounds(bounds: Sequence[float]) -> tuple[float, float]:
  """Returns the lowest and the highest pixel value as Python's numbers, which can be hashed.

  Raises:
    ArgumentError: unless they are two numbers, the smaller one first.
  """
  try:
    lowest, highest = map(float, bounds)
  except (TypeError, ValueError):
    raise ArgumentError('bounds', f'must be (lowest, highest), got {bounds}') from None
  if not lowest < highest:
    raise ArgumentError('bounds', f'must be (lowest, highest), got {bounds}')
  return lowest, highest


def _is_known(value: Any) -> bool:
  return not isinstance(value, jax.core.Tracer) and getattr(value, 'is_fully_addressable', True)


def _direction(gradient: jax.Array, norm: Norm, batch_axis: int) -> jax.Array:
  """The unit step of steepest ascent; zero where the gradient is zero or NaN."""
  gradient = jnp.nan_to_num(gradient)  # one NaN must not make the image illegal
  if norm == 'linf':
    return jnp.sign(gradient)
  # Scaled by the largest entry first: a tiny gradient must not underflow when it is squared.
  scale = jnp.max(jnp.abs(gradient), axis=_pixels(gradient, batch_axis), keepdims=True)
  scaled = gradient / jnp.where(scale > 0.0, scale, 1.0)
  return scaled / jnp.maximum(_l2_norm(scaled, batch_axis), 1.0)


def _l2_norm(x: jax.Array, batch_axis: int) -> jax.Array:
  """Euclidean length of each example, with axes of length 1 for the pixels."""
  return jnp.sqrt(jnp.sum(x**2, axis=_pixels(x, batch_axis), keepdims=True))


def _pixels(x: jax.Array, batch_axis: int) -> tuple[int, ...]:
  """The axes of an example."""
  return tuple(axis for axis in range(x.ndim) if axis != batch_axis)


def _per_example(values: jax.Array, x: jax.Array, batch_axis: int) -> jax.Array:
  """A scalar or `[B]`, with an axis of length 1 for each axis of an example of x."""
  return jnp.expand_dims(values.reshape(-1), _pixels(x, batch_axis))
