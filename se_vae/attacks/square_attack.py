"""The Square attack: random search over squares of pixels, without gradients (linf).

Andriushchenko, Croce, Flammarion and Hein (2020), Algorithm 1 and 2.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from se_vae import seeds
from se_vae.attacks import projected_gradient, projections

# The share of the pixels that a square covers at first. It is halved after these shares of the
# queries.
_FIRST_SHARE = 0.8
_HALVED_AFTER = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@projections.checked
@functools.partial(jax.jit, static_argnames=('objective', 'num_queries', 'bounds'))
def square(
  objective: projected_gradient.Objective,
  key: jax.Array,
  x: jax.Array,
  *,
  radius: jax.typing.ArrayLike,
  num_queries: int,
  bounds: tuple[float, float] = (0.0, 1.0),
  args: tuple[Any, ...] = (),
  index: jax.Array | None = None,
) -> jax.Array:
  """Maximises `objective(x', *args)` in the linf ball from its values alone.

  Starts from vertical stripes, and sets a random square of pixels to a random corner of its box
  whenever that raises the value.

  Args:
    objective: maps images `[B, ...]` (and `args`) to values `[B]`, one per example, each a function
      of its own example only; never differentiated. Compiled once per function object.
    key: one PRNG key. Example i draws from `fold_in(key, index[i])`.
    x: clean images `[B, H, W, C]` inside `bounds`, or `[B, ...]` with channels on the last axis.
    radius: radius of the linf ball, a scalar >= 0, traced.
    num_queries: number of forward passes >= 1.
    bounds: lowest and highest pixel value.
    args: further arguments of `objective`, traced.
    index: `[B]` integers that identify the examples; `arange(B)` if None.

  Returns:
    The best of all queried images, of x's shape and dtype, inside the ball and `bounds`.

  Raises:
    AssertionError: if shapes do not fit, x is empty, or x is not of a float dtype.
    ValueError: for num_queries < 1, or bounds that are not (lowest, highest). If x and
      the radius are not traced, also for images outside the bounds, or a radius that is not finite
      or < 0.
  """
  ball = projections.ball(x, radius, 'linf', bounds)
  keys = projected_gradient.batch_keys(key, index, x.shape[0])
  height, width, channels = _as_image(x.shape[1:])
  sides = jnp.asarray(_sides(num_queries, height, width))

  def signs(example_key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return seeds.draw(jax.random.rademacher, example_key, shape, x.dtype)

  def to_image(pixels: jax.Array) -> jax.Array:
    """Values that broadcast to (H, W, C), as one example of x."""
    return jnp.broadcast_to(pixels, (height, width, channels)).reshape(x.shape[1:])

  def stripes(example_key: jax.Array) -> jax.Array:
    return to_image(signs(example_key, (1, width, channels)))

  def draw_square(
    example_key: jax.Array, x_adv: jax.Array, x: jax.Array, side: jax.Array
  ) -> jax.Array:
    row_key, column_key, sign_key = jax.random.split(example_key, 3)
    tall, wide = jnp.minimum(side, height), jnp.minimum(side, width)
    top = jax.random.randint(row_key, (), 0, height - tall + 1, jnp.int32)
    left = jax.random.randint(column_key, (), 0, width - wide + 1, jnp.int32)
    row, column = jnp.arange(height, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
    rows, columns = (row >= top) & (row < top + tall), (column >= left) & (column < left + wide)
    inside = to_image(rows[:, None, None] & columns[None, :, None])
    corner = x + ball.radius * to_image(signs(sign_key, (1, 1, channels)))
    return jnp.where(inside, corner, x_adv)

  def query(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)
    changed = jax.vmap(draw_square, in_axes=(0, 0, 0, None))(step_keys, carry[0], x, sides[i])
    x_adv = ball.project(changed)
    return ball.better(x_adv, projected_gradient.values(objective, x_adv, args), *carry)

  start = ball.project(x + ball.radius * jax.vmap(stripes)(keys))
  lowest = jnp.full(x.shape[:1], -jnp.inf, x.dtype)
  value = projected_gradient.values(objective, start, args)
  first = ball.better(start, value, start, lowest)
  return jax.lax.fori_loop(1, num_queries, query, first)[0]


def _as_image(shape: tuple[int, ...]) -> tuple[int, int, int]:
  """(H, W, C) for an example's shape; rows of a vector are one pixel wide."""
  if len(shape) < 2:
    return 1, shape[0], 1
  return shape[0], math.prod(shape[1:-1]), shape[-1]


def _sides(num_queries: int, height: int, width: int) -> np.ndarray:
  """Side of the square at each query, `[num_queries]`."""
  done = np.arange(num_queries) / num_queries
  share = _FIRST_SHARE / 2.0 ** np.searchsorted(_HALVED_AFTER, done, side='right')
  return np.maximum(1, np.round(np.sqrt(share * height * width))).astype(np.int32)
