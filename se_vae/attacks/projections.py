"""Balls of images: draws, corners, steps of steepest ascent and projections, per example.

Attacks hold images as columns `[P, B]`, one of P numbers for each example: what they do to them is
done number by number, which a CPU does to many at once along the last axis, and that of grey images
`[B, H, W, C]` has length 1. The networks' products want them so as well.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

Norm = Literal['linf', 'l2']
NORMS: tuple[str, ...] = ('linf', 'l2')


def columns(x: jax.Array) -> jax.Array:
  """Images `[B, ...]` as columns."""
  return x.reshape(x.shape[0], math.prod(x.shape[1:])).T


def images(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Columns as images of this shape, `[B, ...]`."""
  return x.T.reshape(shape)


def random_offsets(keys: jax.Array, x: jax.Array, radius: jax.Array, norm: Norm) -> jax.Array:
  """Uniform draws from the ball, as columns, one for each of the keys `[B]`."""

  def draw(key: jax.Array) -> jax.Array:
    if norm == 'linf':
      return jax.random.uniform(key, x.shape[:1], x.dtype, -1.0, 1.0)
    return jax.random.ball(key, len(x), dtype=x.dtype)

  return radius * jax.vmap(draw, out_axes=1)(keys)


def extreme_offsets(keys: jax.Array, x: jax.Array, radius: jax.Array, norm: Norm) -> jax.Array:
  """Uniform draws from the corners of the box, or from the sphere, as columns."""

  def draw(key: jax.Array) -> jax.Array:
    if norm == 'linf':
      return jax.random.rademacher(key, x.shape[:1], x.dtype)
    return jax.random.normal(key, x.shape[:1], x.dtype)

  return radius * direction(jax.vmap(draw, out_axes=1)(keys), norm)


def direction(gradient: jax.Array, norm: Norm) -> jax.Array:
  """The unit step of steepest ascent in `norm`; zero where the gradient is zero or NaN."""
  gradient = jnp.nan_to_num(gradient)  # one NaN must not make the image illegal
  if norm == 'linf':
    return jnp.sign(gradient)
  # Scaled by the largest entry first: a tiny gradient must not underflow when it is squared.
  scale = jnp.max(jnp.abs(gradient), axis=0, keepdims=True)
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
  return jnp.where(chosen[None], x_a, x_b)


def l2_norm(x: jax.Array) -> jax.Array:
  """Euclidean length of each example, `[1, B]`."""
  return jnp.sqrt(jnp.sum(x**2, axis=0, keepdims=True))


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
