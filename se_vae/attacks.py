"""Projected gradient ascent on any per-example objective (paper Sec. 2.1: how x' is selected).

An attack is a step rule, a random start and a projection. It sees only a callable, and knows
nothing of encoders, labels or losses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Objective = Callable[..., jax.Array]
Norm = Literal['linf', 'l2']
NORMS: tuple[str, ...] = ('linf', 'l2')

# A step of 2.5 radius / num_steps lets an iterate cross the ball and still settle.
_RELATIVE_STEP = 2.5


@functools.partial(
  jax.jit,
  static_argnames=('objective', 'num_steps', 'norm', 'bounds', 'random_start', 'keep_best'),
)
def pgd(
  objective: Objective,
  key: jax.Array,
  x: jax.Array,
  *,
  radius: jax.typing.ArrayLike,
  num_steps: int,
  step_size: jax.typing.ArrayLike | None = None,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
  random_start: bool = True,
  keep_best: bool = False,
  args: tuple[Any, ...] = (),
  index: jax.Array | None = None,
) -> jax.Array:
  """Maximises `objective(x', *args)` over x' within `radius` of x and within `bounds`.

  Example:
    >>> move = lambda x_adv, x: jnp.sum((x_adv - x) ** 2, axis=-1)
    >>> x = jnp.full((2, 3), 0.5)
    >>> x_adv = pgd(move, jax.random.key(0), x, radius=0.1, num_steps=5, args=(x,))
    >>> print(jnp.abs(x_adv - x).max(axis=-1).round(3))
    [0.1 0.1]

  Args:
    objective: maps images `[B, ...]` (and `args`) to values `[B]`, one per example, each a function
      of its own example only. Compiled once per function object: define it once, and hand what
      varies over in `args`.
    key: one PRNG key. Example i draws from `fold_in(key, index[i])`, so its result depends neither
      on the batch size nor on its neighbours.
    x: clean images `[B, ...]`, inside `bounds`.
    radius: radius of the ball, a scalar >= 0, traced: one compilation serves a whole curve.
    num_steps: number of gradient steps L >= 1.
    step_size: length of a step in the ball's norm, a scalar; `2.5 * radius / num_steps` if None.
    norm: 'linf' (sign steps; the paper's) or 'l2' (normalised gradient steps).
    bounds: lowest and highest pixel value.
    random_start: start from a uniformly drawn point of the ball instead of x. An objective that is
      flat at x, as a distance from x's own encoding is, needs it.
    keep_best: return the best of all iterates rather than the last, for one more evaluation.
    args: further arguments of `objective`, traced.
    index: `[B]` integers that identify the examples; `arange(B)` if None.

  Returns:
    x_adv, of x's shape and dtype: inside `bounds` exactly, inside the linf ball to one unit in the
    last place, inside the l2 ball to rounding.

  Raises:
    AssertionError: if shapes do not fit.
    ValueError: for an unknown norm, num_steps < 1, or a radius that is known and negative.
  """
  _check(x, radius, num_steps, norm, bounds)
  radius = jnp.asarray(radius, x.dtype)
  step_size = _RELATIVE_STEP * radius / num_steps if step_size is None else step_size
  step_size = jnp.asarray(step_size, x.dtype)
  project = functools.partial(_project, x=x, radius=radius, norm=norm, bounds=bounds)

  def value_and_gradient(x_adv: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vjp = jax.vjp(lambda images: objective(images, *args), x_adv)
    if values.shape != x.shape[:1]:
      raise AssertionError(f'objective must return one value per example, got {values.shape}')
    return values, vjp(jnp.ones_like(values))[0]

  def step(x_adv: jax.Array, gradient: jax.Array) -> jax.Array:
    return project(x_adv + step_size * _direction(gradient, norm))

  start = x
  if random_start:
    index = jnp.arange(x.shape[0]) if index is None else index
    start = project(x + _random_offsets(key, x, index, radius, norm))

  if not keep_best:
    return jax.lax.fori_loop(
      0, num_steps, lambda _, x_adv: step(x_adv, value_and_gradient(x_adv)[1]), start
    )

  def step_and_compare(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    x_adv, best, best_value = carry
    values, gradient = value_and_gradient(x_adv)
    best, best_value = _better(x_adv, values, best, best_value)
    return step(x_adv, gradient), best, best_value

  lowest = jnp.full(x.shape[:1], -jnp.inf, x.dtype)
  last, best, best_value = jax.lax.fori_loop(0, num_steps, step_and_compare, (start, start, lowest))
  return _better(last, objective(last, *args), best, best_value)[0]


def example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
  """One key per example, `[B]`, from the example's identity alone."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def _random_offsets(
  key: jax.Array, x: jax.Array, index: jax.Array, radius: jax.Array, norm: Norm
) -> jax.Array:
  """Uniform draws from the ball of `norm`, `[B, ...]`."""

  def draw(example_key: jax.Array) -> jax.Array:
    if norm == 'linf':
      return jax.random.uniform(example_key, x.shape[1:], x.dtype, -1.0, 1.0)
    return jax.random.ball(example_key, math.prod(x.shape[1:]), dtype=x.dtype).reshape(x.shape[1:])

  return radius * jax.vmap(draw)(example_keys(key, index))


def _direction(gradient: jax.Array, norm: Norm) -> jax.Array:
  """The unit step of steepest ascent in `norm`; zero where the gradient is zero."""
  if norm == 'linf':
    return jnp.sign(gradient)
  # Scaled by the largest entry first: a tiny gradient must not underflow when it is squared.
  scale = jnp.max(jnp.abs(gradient), axis=_pixel_axes(gradient), keepdims=True)
  scaled = gradient / jnp.where(scale > 0.0, scale, 1.0)
  return scaled / jnp.maximum(_l2_norm(scaled), 1.0)


def _project(
  x_adv: jax.Array, *, x: jax.Array, radius: jax.Array, norm: Norm, bounds: tuple[float, float]
) -> jax.Array:
  """Into the ball around x, and into `bounds`."""
  if norm == 'linf':
    lowest = jnp.maximum(x - radius, bounds[0])
    highest = jnp.minimum(x + radius, bounds[1])
    return jnp.clip(x_adv, lowest, highest)
  offset = x_adv - x
  length = _l2_norm(offset)
  offset = offset * jnp.where(length > radius, radius / jnp.where(length > 0.0, length, 1.0), 1.0)
  # x is inside the bounds, so clipping moves every pixel towards x: the ball still holds.
  return jnp.clip(x + offset, *bounds)


def _better(
  x_adv: jax.Array, values: jax.Array, best: jax.Array, best_value: jax.Array
) -> tuple[jax.Array, jax.Array]:
  better = values > best_value
  chosen = better.reshape(better.shape + (1,) * (x_adv.ndim - 1))
  return jnp.where(chosen, x_adv, best), jnp.where(better, values, best_value)


def _pixel_axes(x: jax.Array) -> tuple[int, ...]:
  return tuple(range(1, x.ndim))


def _l2_norm(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(x**2, axis=_pixel_axes(x), keepdims=True))


def _check(
  x: jax.Array,
  radius: jax.typing.ArrayLike,
  num_steps: int,
  norm: str,
  bounds: tuple[float, float],
) -> None:
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
