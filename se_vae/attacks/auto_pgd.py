"""Auto-PGD: projected gradient ascent that finds its own step size (Croce and Hein, 2020)."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from se_vae.attacks import projected_gradient, projections
from se_vae.attacks.projections import Norm

# The paper's constants: momentum, and the share of rising steps below which the step is halved.
_MOMENTUM = 0.75
_RISING = 0.75


class _State(NamedTuple):
  x_adv: jax.Array
  previous: jax.Array
  value: jax.Array
  gradient: jax.Array
  best: jax.Array
  best_value: jax.Array
  best_gradient: jax.Array
  step_size: jax.Array  # [B]
  rises: jax.Array  # [B], steps since the checkpoint that raised the value
  halved: jax.Array  # [B], at the last checkpoint
  checkpoint_value: jax.Array  # [B], best value at the last checkpoint


@functools.partial(jax.jit, static_argnames=('objective', 'num_steps', 'norm', 'bounds'))
def apgd(
  objective: projected_gradient.Objective,
  key: jax.Array,
  x: jax.Array,
  *,
  radius: jax.typing.ArrayLike,
  num_steps: int,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
  start: jax.Array | None = None,
  args: tuple[Any, ...] = (),
  index: jax.Array | None = None,
) -> jax.Array:
  """Maximises `objective(x', *args)` with momentum and a step that halves when progress stops.

  Steps begin at twice the radius. At checkpoints that come ever more often, an example whose value
  rose in fewer than three of four steps, or not at all since an unhalved checkpoint, goes back to
  its best image with half the step.

  Args:
    objective: as for `projected_gradient.pgd`.
    key: as for `projected_gradient.pgd`.
    x: as for `projected_gradient.pgd`.
    radius: as for `projected_gradient.pgd`.
    num_steps: gradient steps >= 1.
    norm: as for `projected_gradient.pgd`.
    bounds: as for `projected_gradient.pgd`.
    start: images to start from, projected; a uniform draw from the ball if None.
    args: as for `projected_gradient.pgd`.
    index: as for `projected_gradient.pgd`.

  Returns:
    The best of all iterates, as legal as `pgd`'s; the start where no value is a number.

  Raises:
    AssertionError, ValueError: as for `projected_gradient.pgd`.
  """
  projections.check(x, radius, num_steps, norm, bounds)
  radius = jnp.asarray(radius, x.dtype)
  shape, (objective, x) = x.shape, projected_gradient.on_columns(objective, x)
  project = functools.partial(projections.project, x=x, radius=radius, norm=norm, bounds=bounds)
  start = project(projected_gradient.first_columns(key, x, shape, start, index, radius, norm))
  value, gradient = projected_gradient.values_and_gradients(objective, start, args)
  batch = x.shape[1:]
  intervals = jnp.asarray(_intervals(num_steps))

  def step(i: jax.Array, state: _State) -> _State:
    length = state.step_size[None]
    ahead = project(state.x_adv + length * projections.direction(state.gradient, norm))
    share = jnp.where(i == 0, 1.0, _MOMENTUM).astype(x.dtype)
    inertia = (1.0 - share) * (state.x_adv - state.previous)
    x_adv = project(state.x_adv + share * (ahead - state.x_adv) + inertia)
    value, gradient = projected_gradient.values_and_gradients(objective, x_adv, args)
    improved = value > state.best_value
    state = _State(
      x_adv=x_adv,
      previous=state.x_adv,
      value=value,
      gradient=gradient,
      best=projections.where(improved, x_adv, state.best),
      best_value=jnp.where(improved, value, state.best_value),
      best_gradient=projections.where(improved, gradient, state.best_gradient),
      step_size=state.step_size,
      rises=state.rises + (value > state.value).astype(jnp.int32),
      halved=state.halved,
      checkpoint_value=state.checkpoint_value,
    )
    return jax.lax.cond(intervals[i] > 0, functools.partial(look, i), lambda same: same, state)

  def look(i: jax.Array, state: _State) -> _State:
    stagnates = state.rises.astype(x.dtype) < _RISING * intervals[i].astype(x.dtype)
    stuck = ~state.halved & ~(state.best_value > state.checkpoint_value)
    halve = stagnates | stuck
    return state._replace(
      x_adv=projections.where(halve, state.best, state.x_adv),
      value=jnp.where(halve, state.best_value, state.value),
      gradient=projections.where(halve, state.best_gradient, state.gradient),
      step_size=jnp.where(halve, 0.5 * state.step_size, state.step_size),
      rises=jnp.zeros_like(state.rises),
      halved=halve,
      checkpoint_value=state.best_value,
    )

  # A first value that is not a number must lose to every later one.
  value = jnp.where(jnp.isnan(value), -jnp.inf, value)
  first = _State(
    x_adv=start,
    previous=start,
    value=value,
    gradient=gradient,
    best=start,
    best_value=value,
    best_gradient=gradient,
    step_size=jnp.full(batch, 2.0 * radius, x.dtype),
    rises=jnp.zeros(batch, jnp.int32),
    halved=jnp.ones(batch, bool),  # the first checkpoint has none before it to be stuck since
    checkpoint_value=value,
  )
  return projections.images(jax.lax.fori_loop(0, num_steps, step, first).best, shape)


def _intervals(num_steps: int) -> np.ndarray:
  """`[num_steps]`: after a step that ends at a checkpoint the steps since the last, else 0."""
  positions = [0.0, 0.22]
  while positions[-1] < 1.0:
    positions.append(positions[-1] + max(positions[-1] - positions[-2] - 0.03, 0.06))
  ends = [int(np.ceil(round(position * num_steps, 6))) for position in positions]
  intervals = np.zeros(num_steps, np.int32)
  for before, end in itertools.pairwise(ends):
    if before < end <= num_steps:
      intervals[end - 1] = end - before
  return intervals
