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

from se_vae.attacks import projected_gradient, projections

# The share of pixels that a square covers falls from this, halved after these shares of the search.
_FIRST_SHARE = 0.8
_HALVED_AFTER = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


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

  Starts from vertical stripes, and moves a random square to a random corner of its box whenever
  that raises the value.

  Args:
    objective: as for `projected_gradient.pgd`; never differentiated.
    key: as for `projected_gradient.pgd`.
    x: images `[B, H, W, C]`, or `[B, ...]` of which the last axis is taken for channels.
    radius: as for `projected_gradient.pgd`, in linf.
    num_queries: forward passes >= 1.
    bounds: as for `projected_gradient.pgd`.
    args: as for `projected_gradient.pgd`.
    index: as for `projected_gradient.pgd`.

  Returns:
    The best of all tried images, as legal as `projected_gradient.pgd`'s.

  Raises:
    AssertionError, ValueError: as for `projected_gradient.pgd`.
  """
  projections.check(x, radius, num_queries, 'linf', bounds)
  radius = jnp.asarray(radius, x.dtype)
  height, width, channels = _as_image(x.shape[1:])
  shape, (objective, x) = x.shape, projected_gradient.on_columns(objective, x)
  project = functools.partial(projections.project, x=x, radius=radius, norm='linf', bounds=bounds)
  keys = projected_gradient.example_keys(key, projected_gradient.identities(index, shape))
  sides = jnp.asarray(_sides(num_queries, height, width))
  # Of each number in a column.
  row_of, column_of, _ = np.indices((height, width, channels)).reshape(3, -1)

  def stripes(example_key: jax.Array) -> jax.Array:
    return jnp.tile(jax.random.rademacher(example_key, (width * channels,), x.dtype), height)

  def move(example_key: jax.Array, x_adv: jax.Array, x: jax.Array, side: jax.Array) -> jax.Array:
    row_key, column_key, sign_key = jax.random.split(example_key, 3)
    tall, wide = jnp.minimum(side, height), jnp.minimum(side, width)
    row = row_of - jax.random.randint(row_key, (), 0, height - tall + 1)
    column = column_of - jax.random.randint(column_key, (), 0, width - wide + 1)
    inside = (row >= 0) & (row < tall) & (column >= 0) & (column < wide)
    signs = jax.random.rademacher(sign_key, (channels,), x.dtype)
    return jnp.where(inside, x + radius * jnp.tile(signs, height * width), x_adv)

  def query(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)
    moved = jax.vmap(move, in_axes=(0, 1, 1, None), out_axes=1)(step_keys, carry[0], x, sides[i])
    x_adv = project(moved)
    return projections.better(x_adv, objective(x_adv, *args), *carry)

  start = project(x + radius * jax.vmap(stripes, out_axes=1)(keys))
  lowest = jnp.full(x.shape[1:], -jnp.inf, x.dtype)
  first = projections.better(start, objective(start, *args), start, lowest)
  return projections.images(jax.lax.fori_loop(1, num_queries, query, first)[0], shape)


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
