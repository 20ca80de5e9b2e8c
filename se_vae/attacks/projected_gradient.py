"""Projected gradient ascent on any per-example objective (paper Sec. 2.1: how x' is selected).

An attack is a step rule, a random start and a projection. It sees only a callable, and knows
nothing of encoders, labels or losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from se_vae.attacks import projections
from se_vae.attacks.projections import Norm

Objective = Callable[..., jax.Array]
NORMS = projections.NORMS

# A step of 2.5 radius / num_steps lets an iterate cross the ball and still settle.
_RELATIVE_STEP = 2.5


@functools.partial(
  jax.jit,
  static_argnames=('objective', 'num_steps', 'norm', 'bounds', 'keep_best'),
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
    relative_step_size: length of a step as a share of the radius, a scalar; `2.5 / num_steps` if
      None.
    norm: 'linf' (sign steps; the paper's) or 'l2' (normalised gradient steps).
    bounds: lowest and highest pixel value.
    start: images to start from, projected; a uniform draw from the ball if None. An objective that
      is flat at x, as a distance from x's own encoding is, must not start there.
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
  projections.check(x, radius, num_steps, norm, bounds)
  radius = jnp.asarray(radius, x.dtype)
  share = _RELATIVE_STEP / num_steps if relative_step_size is None else relative_step_size
  step_size = radius * jnp.asarray(share, x.dtype)
  shape, (objective, x) = x.shape, on_columns(objective, x)
  project = functools.partial(projections.project, x=x, radius=radius, norm=norm, bounds=bounds)

  def value_and_gradient(x_adv: jax.Array) -> tuple[jax.Array, jax.Array]:
    return values_and_gradients(objective, x_adv, args)

  def step(x_adv: jax.Array, gradient: jax.Array) -> jax.Array:
    return project(x_adv + step_size * projections.direction(gradient, norm))

  start = project(first_columns(key, x, shape, start, index, radius, norm))

  if not keep_best:
    last = jax.lax.fori_loop(
      0, num_steps, lambda _, x_adv: step(x_adv, value_and_gradient(x_adv)[1]), start
    )
    return projections.images(last, shape)

  def step_and_compare(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    x_adv, best, best_value = carry
    values, gradient = value_and_gradient(x_adv)
    best, best_value = projections.better(x_adv, values, best, best_value)
    return step(x_adv, gradient), best, best_value

  lowest = jnp.full(x.shape[1:], -jnp.inf, x.dtype)
  last, best, best_value = jax.lax.fori_loop(0, num_steps, step_and_compare, (start, start, lowest))
  best = projections.better(last, objective(last, *args), best, best_value)[0]
  return projections.images(best, shape)


def on_columns(objective: Objective, x: jax.Array) -> tuple[Objective, jax.Array]:
  """The same objective of images as columns `[P, B]`, and x as such."""
  shape = x.shape
  return lambda columns, *args: objective(
    projections.images(columns, shape), *args
  ), projections.columns(x)


def first_columns(
  key: jax.Array,
  x: jax.Array,
  shape: tuple[int, ...],
  start: jax.Array | None,
  index: jax.Array | None,
  radius: jax.Array,
  norm: Norm,
) -> jax.Array:
  """Where `pgd` starts from columns x of images of this shape, before it is projected."""
  if start is None:
    return x + projections.random_offsets(
      example_keys(key, identities(index, shape)), x, radius, norm
    )
  if start.shape != shape:
    raise AssertionError(f'start must have the shape {shape} of x, got {start.shape}')
  return projections.columns(start)


def identities(index: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
  """`pgd`'s index `[B]` for images of this shape, checked, or its default."""
  index = jnp.arange(shape[0]) if index is None else index
  if index.shape != shape[:1]:
    raise AssertionError(f'index must have the shape {shape[:1]}, got {index.shape}')
  return index


def example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
  """One key per example, `[B]`, from the example's identity alone."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def values_and_gradients(
  objective: Objective, x_adv: jax.Array, args: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
  """The objective `[B]`, and the gradient of each example's value in its own image, as columns."""
  values, vjp = jax.vjp(lambda x_adv: objective(x_adv, *args), x_adv)
  if values.shape != x_adv.shape[1:]:
    raise AssertionError(f'objective must return one value per example, got {values.shape}')
  return values, vjp(jnp.ones_like(values))[0]


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
  """One step from x to the edge of the ball (Goodfellow et al., 2015); arguments as for `pgd`."""
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
  """Random noise: what any attack must beat.

  Args:
    key: as for `pgd`.
    x: as for `pgd`.
    radius: as for `pgd`.
    extreme: draw from the corners of the box (random signs) or from the sphere, and not from the
      whole ball.
    norm: as for `pgd`.
    bounds: as for `pgd`.
    index: as for `pgd`.

  Returns:
    x_adv, as legal as `pgd`'s.

  Raises:
    AssertionError, ValueError: as for `pgd`.
  """
  projections.check(x, radius, 1, norm, bounds)
  radius = jnp.asarray(radius, x.dtype)
  keys = example_keys(key, identities(index, x.shape))
  draw = projections.extreme_offsets if extreme else projections.random_offsets
  columns = projections.columns(x)
  x_adv = columns + draw(keys, columns, radius, norm)
  x_adv = projections.project(x_adv, x=columns, radius=radius, norm=norm, bounds=bounds)
  return projections.images(x_adv, x.shape)
