"""Balls of images: draws, corners, steps of steepest ascent and projections, per example."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

Norm = Literal['linf', 'l2']
NORMS: tuple[str, ...] = ('linf', 'l2')


def random_offsets(keys: jax.Array, x: jax.Array, radius: jax.Array, norm: Norm) -> jax.Array:
  """Uniform draws from the ball, `[B, ...]`, one for each of the keys `[B]`."""

  def draw(key: jax.Array) -> jax.Array:
    if norm == 'linf':
      return jax.random.uniform(key, x.shape[1:], x.dtype, -1.0, 1.0)
    return jax.random.ball(key, math.prod(x.shape[1:]), dtype=x.dtype).reshape(x.shape[1:])

  return radius * jax.vmap(draw)(keys)


def extreme_offsets(keys: jax.Array, x: jax.Array, radius: jax.Array, norm: Norm) -> jax.Array:
  """Uniform draws from the corners of the box, or from the sphere, `[B, ...]`."""

  def draw(key: jax.Array) -> jax.Array:
    if norm == 'linf':
      return jax.random.rademacher(key, x.shape[1:], x.dtype)
    return jax.random.normal(key, x.shape[1:], x.dtype)

  return radius * direction(jax.vmap(draw)(keys), norm)


def direction(gradient: jax.Array, norm: Norm) -> jax.Array:
  """The unit step of steepest ascent in `norm`; zero where the gradient is zero or NaN."""
  gradient = jnp.nan_to_num(gradient)  # one NaN must not make the image illegal
  if norm == 'linf':
    return jnp.sign(gradient)
  # Scaled by the largest entry first: a tiny gradient must not underflow when it is squared.
  scale = jnp.max(jnp.abs(gradient), axis=pixel_axes(gradient), keepdims=True)
  scaled = gradient / jnp.where(scale > 0.0, scale, 1.0)
  return scaled / jnp.maximum(l2_norm(scaled), 1.0)


def project(
  x_adv: jax.Array, *, x: jax.Array, radius: jax.Array, norm: Norm, bounds: tuple[float, float]
) -> jax.Array:
  """Into the ball around x, and into `bounds`."""
  if norm == 'linf':
    lowest = jnp.maximum(x - radius, bounds[0])
    highest = jnp.minimum(x + radius, bounds[1])
    return jnp.clip(x_adv, lowest, highest)
  offset = x_adv - x
  length = l2_norm(offset)
  offset = offset * jnp.where(length > radius, radius / jnp.where(length > 0.0, length, 1.0), 1.0)
  # x is inside the bounds, so clipping moves every pixel towards x: the ball still holds.
  return jnp.clip(x + offset, *bounds)


def better(
  x_adv: jax.Array, values: jax.Array, best: jax.Array, best_value: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Of two images the one of the larger value, and that value; the old one where they tie."""
  improved = values > best_value
  return where(improved, x_adv, best), jnp.where(improved, values, best_value)


def where(chosen: jax.Array, x_a: jax.Array, x_b: jax.Array) -> jax.Array:
  """x_a for the chosen examples `[B]`, x_b for the others."""
  return jnp.where(chosen.reshape(chosen.shape + (1,) * (x_a.ndim - 1)), x_a, x_b)


def pixel_axes(x: jax.Array) -> tuple[int, ...]:
  """All axes but the first."""
  return tuple(range(1, x.ndim))


def l2_norm(x: jax.Array) -> jax.Array:
  """Euclidean length of each example, `[B, 1, ...]`."""
  return jnp.sqrt(jnp.sum(x**2, axis=pixel_axes(x), keepdims=True))


def check(
  x: jax.Array,
  radius: jax.typing.ArrayLike,
  num_steps: int,
  norm: str,
  bounds: tuple[float, float],
) -> None:
  """Raises unless an attack can start from these."""
  if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise AssertionError(f'x must be floating point [B, ...], got {x.dtype} {x.shape}')
  if jnp.ndim(radius) != 0:
    raise AssertionError(f'radius must be a scalar, got shape {jnp.shape(radius)}')
  if num_steps < 1:
    raise ValueError(f'num_steps must be >= 1, got {num_steps}')
  if norm not in NORMS:
    raise ValueError(f'norm must be one of {", ".join(NORMS)}, got {norm!r}')
  if not bounds[0] < bounds[1]:
    raise ValueError(f'bounds must be (lowest, highest), got {bounds}')
