"""Auto-PGD: projected gradient ascent that finds its own step size (Croce and Hein, 2020)."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from se_vae.attacks import columns, projected_gradient, projections
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


@projections.checked
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
    objective: maps images `[B, ...]` (and `args`) to values `[B]`, one per example, each a function
      of its own example only. Compiled once per function object.
    key: one PRNG key. Example i draws from `fold_in(key, index[i])`.
    x: clean images `[B, ...]`, inside `bounds`.
    radius: radius of the ball, a scalar >= 0, traced.
    num_steps: number of gradient steps >= 1.
    norm: 'linf' or 'l2'.
    bounds: lowest and highest pixel value.
    start: images to start from, projected; a uniform draw from the ball if None.
    args: further arguments of `objective`, traced.
    index: `[B]` integers that identify the examples; `arange(B)` if None.

  Returns:
    x_adv, of x's shape and dtype, inside the ball and `bounds`: the best of all iterates, or the
    start where no value is a number.

  Raises:
    AssertionError: if shapes do not fit, x is empty, or x is not of a float dtype.
    ValueError: for an unknown norm, num_steps < 1, or bounds that are not (lowest, highest). If x
      and the radius are not traced, also for images outside the bounds, or a radius that is not
      finite or < 0.
  """
  ball = projections.ball(x, radius, norm, bounds)
  first = projected_gradient.first_point(ball, key, start, index)
  evaluate = functools.partial(projected_gradient.values_and_gradients, objective, args=args)
  return columns.inside(functools.partial(_ascend, num_steps=num_steps), evaluate, ball, first)


def _ascend(
  evaluate: columns.Evaluate, ball: projections.Ball, first: jax.Array, *, num_steps: int
) -> jax.Array:
  """The best of all iterates."""
  value, gradient = evaluate(first)
  intervals = jnp.asarray(_intervals(num_steps))

  def step(i: jax.Array, state: _State) -> _State:
    ahead = ball.step(state.x_adv, state.gradient, step_size=state.step_size)
    share = jnp.where(i == 0, 1.0, _MOMENTUM).astype(first.dtype)
    inertia = (1.0 - share) * (state.x_adv - state.previous)
    x_adv = ball.project(state.x_adv + share * (ahead - state.x_adv) + inertia)
    value, gradient = evaluate(x_adv)
    best, best_value = ball.better(x_adv, value, state.best, state.best_value)
    state = state._replace(
      x_adv=x_adv,
      previous=state.x_adv,
      value=value,
      gradient=gradient,
      best=best,
      best_value=best_value,
      best_gradient=ball.where(value > state.best_value, gradient, state.best_gradient),
      rises=state.rises + (value > state.value).astype(jnp.int32),
    )
    return jax.lax.cond(intervals[i] > 0, at_checkpoint, lambda _, same: same, intervals[i], state)

  def at_checkpoint(interval: jax.Array, state: _State) -> _State:
    stagnates = state.rises.astype(first.dtype) < _RISING * interval.astype(first.dtype)
    stuck = ~state.halved & ~(state.best_value > state.checkpoint_value)
    halve = stagnates | stuck
    return state._replace(
      x_adv=ball.where(halve, state.best, state.x_adv),
      value=jnp.where(halve, state.best_value, state.value),
      gradient=ball.where(halve, state.best_gradient, state.gradient),
      step_size=jnp.where(halve, 0.5 * state.step_size, state.step_size),
      rises=jnp.zeros_like(state.rises),
      halved=halve,
      checkpoint_value=state.best_value,
    )

  # A first value that is not a number must lose to every later one.
  value = jnp.where(jnp.isnan(value), -jnp.inf, value)
  state = _State(
    x_adv=first,
    previous=first,
    value=value,
    gradient=gradient,
    best=first,
    best_value=value,
    best_gradient=gradient,
    step_size=jnp.full(ball.batch_size, 2.0 * ball.radius, first.dtype),
    rises=jnp.zeros(ball.batch_size, jnp.int32),
    halved=jnp.ones(ball.batch_size, bool),  # the first checkpoint has no unhalved one before it
    checkpoint_value=value,
  )
  return jax.lax.fori_loop(0, num_steps, step, state).best


def _intervals(num_steps: int) -> np.ndarray:
  """Steps since the last checkpoint for each step that ends at one, else 0, `[num_steps]`."""
  positions = [0.0, 0.22]
  while positions[-1] < 1.0:
    positions.append(positions[-1] + max(positions[-1] - positions[-2] - 0.03, 0.06))
  ends = [int(np.ceil(round(position * num_steps, 6))) for position in positions]
  intervals = np.zeros(num_steps, np.int32)
  for before, end in itertools.pairwise(ends):
    if before < end <= num_steps:
      intervals[end - 1] = end - before
  return intervals
