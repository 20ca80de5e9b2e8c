"""Projected gradient ascent on any per-example objective (paper Sec. 2.1: how x' is selected).

An attack is a random start, a step of steepest ascent and a projection, repeated. It takes the
objective as a callable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from se_vae.attacks import columns, projections
from se_vae.attacks.projections import Norm

Objective = Callable[..., jax.Array]

# A step of 2.5 radius / num_steps lets an iterate cross the ball and still settle.
_STEPS_ACROSS = 2.5


@projections.checked
@functools.partial(
  jax.jit, static_argnames=('objective', 'num_steps', 'norm', 'bounds', 'keep_best')
)
def pgd(
  objective: Objective,
  key: jax.Array,
  x: jax.Array,
  *,
  radius: jax.typing.ArrayLike,
  num_steps: int,
  relative_step_size: jax.typing.ArrayLike | None = None,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
  start: jax.Array | None = None,
  keep_best: bool = False,
  args: tuple[Any, ...] = (),
  index: jax.Array | None = None,
) -> jax.Array:
  """Maximises `objective(x', *args)` over x' within `radius` of x and within `bounds`.

  Example:
    >>> distance = lambda x_adv, x: jnp.sum((x_adv - x) ** 2, axis=-1)
    >>> x = jnp.full((2, 3), 0.5)
    >>> x_adv = pgd(distance, jax.random.key(0), x, radius=0.1, num_steps=5, args=(x,))
    >>> print(jnp.abs(x_adv - x).max(axis=-1).round(3))
    [0.1 0.1]

  Args:
    objective: maps images `[B, ...]` (and `args`) to values `[B]`, one per example, each a function
      of its own example only. Compiled once per function object: define it once, and pass what
      varies in `args`.
    key: one PRNG key. Example i draws from `fold_in(key, index[i])`, so its result depends neither
      on the batch size nor on its neighbours.
    x: clean images `[B, ...]`, inside `bounds`.
    radius: radius of the ball, a scalar >= 0, traced: one compilation serves a whole curve. All
      results are NaN if it is traced in another function and is not finite or not >= 0.
    num_steps: number of gradient steps L >= 1.
    relative_step_size: length of a step in the ball's norm, as a share of the radius: a scalar,
      traced; `2.5 / num_steps` if None.
    norm: 'linf' (sign steps; the paper's) or 'l2' (normalised gradient steps).
    bounds: lowest and highest pixel value.
    start: images to start from, projected; a uniform draw from the ball if None. An objective that
      is flat at x, as a distance from x's own encoding is, must not start there.
    keep_best: return the best of all iterates rather than the last, for one more evaluation.
    args: further arguments of `objective`, traced.
    index: `[B]` integers that identify the examples; `arange(B)` if None.

  Returns:
    x_adv of x's shape and dtype, inside `bounds` exactly, inside the linf ball to one unit in the
    last place, inside the l2 ball to rounding.

  Raises:
    AssertionError: if shapes do not fit, x is empty, or x is not of a float dtype.
    ValueError: for an unknown norm, num_steps < 1, or bounds that are not (lowest, highest). If x
      and the radius are not traced, also for images outside the bounds, or a radius that is not
      finite or < 0.
  """
  ball = projections.ball(x, radius, norm, bounds)
  if relative_step_size is None:
    relative_step_size = _STEPS_ACROSS / num_steps
  step_size = jnp.asarray(relative_step_size, x.dtype) * ball.radius
  first = first_point(ball, key, start, index)
  evaluate = functools.partial(values_and_gradients, objective, args=args)
  ascend = functools.partial(_ascend, num_steps=num_steps, step_size=step_size, keep_best=keep_best)
  return columns.inside(ascend, evaluate, ball, first)


def _ascend(
  evaluate: columns.Evaluate,
  ball: projections.Ball,
  first: jax.Array,
  *,
  num_steps: int,
  step_size: jax.Array,
  keep_best: bool,
) -> jax.Array:
  """The last or the best iterate of step, project, repeat."""

  def step(_: int, x_adv: jax.Array) -> jax.Array:
    return ball.step(x_adv, evaluate(x_adv)[1], step_size=step_size)

  if not keep_best:
    return jax.lax.fori_loop(0, num_steps, step, first)

  def step_and_compare(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    x_adv, best, best_value = carry
    values, gradient = evaluate(x_adv)
    best, best_value = ball.better(x_adv, values, best, best_value)
    return ball.step(x_adv, gradient, step_size=step_size), best, best_value

  lowest = jnp.full(ball.batch_size, -jnp.inf, first.dtype)
  last, best, best_value = jax.lax.fori_loop(0, num_steps, step_and_compare, (first, first, lowest))
  return ball.better(last, evaluate(last)[0], best, best_value)[0]


def fgsm(
  objective: Objective,
  key: jax.Array,
  x: jax.Array,
  *,
  radius: jax.typing.ArrayLike,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
  args: tuple[Any, ...] = (),
) -> jax.Array:
  """One step of `pgd` from x to the edge of the ball (Goodfellow et al., 2015).

  Args:
    objective: maps images `[B, ...]` (and `args`) to values `[B]`.
    key: not used; it makes the signature that of the other attacks.
    x: clean images `[B, ...]`, inside `bounds`.
    radius: radius of the ball and length of the step, a scalar >= 0, traced.
    norm: 'linf' or 'l2'.
    bounds: lowest and highest pixel value.
    args: further arguments of `objective`, traced.

  Returns:
    x_adv, of x's shape and dtype, inside the ball and `bounds`.

  Raises:
    AssertionError: if shapes do not fit, x is empty, or x is not of a float dtype.
    ValueError: for an unknown norm, or bounds that are not (lowest, highest). If x and
      the radius are not traced, also for images outside the bounds, or a radius that is not finite
      or < 0.
  """
  return pgd(
    objective,
    key,
    x,
    radius=radius,
    num_steps=1,
    relative_step_size=1.0,
    norm=norm,
    bounds=bounds,
    start=x,
    args=args,
  )


@projections.checked
def noise(
  key: jax.Array,
  x: jax.Array,
  *,
  radius: jax.typing.ArrayLike,
  extreme: bool = False,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
  index: jax.Array | None = None,
) -> jax.Array:
  """Random images in the ball: the baseline of every attack.

  Args:
    key: one PRNG key. Example i draws from `fold_in(key, index[i])`.
    x: clean images `[B, ...]`, inside `bounds`.
    radius: radius of the ball, a scalar >= 0.
    extreme: draw from the corners of the box (random signs) or from the sphere, and not from the
      whole ball.
    norm: 'linf' or 'l2'.
    bounds: lowest and highest pixel value.
    index: `[B]` integers that identify the examples; `arange(B)` if None.

  Returns:
    x_adv, of x's shape and dtype, inside the ball and `bounds`.

  Raises:
    AssertionError: if shapes do not fit, x is empty, or x is not of a float dtype.
    ValueError: for an unknown norm, or bounds that are not (lowest, highest). If x and
      the radius are not traced, also for images outside the bounds, or a radius that is not finite
      or < 0.
  """
  ball = projections.ball(x, radius, norm, bounds)
  keys = batch_keys(key, index, x.shape[0])
  return ball.extreme_points(keys) if extreme else ball.random_points(keys)


def first_point(
  ball: projections.Ball, key: jax.Array, start: jax.Array | None, index: jax.Array | None
) -> jax.Array:
  """The projected start `[B, ...]`, or a uniform draw from the ball if it is None."""
  if start is None:
    return ball.random_points(batch_keys(key, index, ball.x.shape[0]))
  if start.shape != ball.x.shape or not jnp.issubdtype(start.dtype, jnp.floating):
    message = f'start must have the shape {ball.x.shape} of x, and be real, got {start.dtype}'
    raise AssertionError(f'{message} {start.shape}')
  return ball.project(start)


def batch_keys(key: jax.Array, index: jax.Array | None, batch_size: int) -> jax.Array:
  """The `example_keys` of a batch, with `arange(B)` for an index of None."""
  index = jnp.arange(batch_size, dtype=jnp.int32) if index is None else index
  if index.shape != (batch_size,):
    raise AssertionError(f'index must have the shape {(batch_size,)}, got {index.shape}')
  return example_keys(key, index)


def example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
  """One key per example, `[B]`, from the integers `[B]` that identify the examples."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def values(objective: Objective, x_adv: jax.Array, args: tuple[Any, ...]) -> jax.Array:
  """The objective `[B]`, in the dtype of the images.

  Raises:
    AssertionError: if the objective does not return one value per example.
  """
  found = objective(x_adv, *args)
  if found.shape != x_adv.shape[:1]:
    raise AssertionError(f'objective must return one value per example, got {found.shape}')
  return found.astype(x_adv.dtype)


def values_and_gradients(
  objective: Objective, x_adv: jax.Array, args: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
  """The `values` `[B]`, and the gradient `[B, ...]` of each in its own image."""
  found, vjp = jax.vjp(lambda x_adv: values(objective, x_adv, args), x_adv)
  return found, vjp(jnp.ones_like(found))[0]
