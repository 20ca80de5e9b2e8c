"""The slopes of linear bounds against the best there are, which a linear program finds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from se_vae import certification as cert
from se_vae.certification import interval, linear_relaxation
from tests import oracles
from tests.certification.test_bounds import dense

INPUTS, HIDDEN, OUTPUTS = 6, 8, 3


def best_bound(first, last, row, hidden, inputs):
  """The largest lower bound of row . outputs for any lower slopes in [0, 1]."""
  lower, upper = np.minimum(hidden.lower, 0.0), np.maximum(hidden.upper, 0.0)
  slope = upper / (upper - lower)
  rows = last.weights @ row
  positive, negative = np.maximum(rows, 0.0), np.minimum(rows, 0.0)
  center, half = 0.5 * (inputs.lower + inputs.upper), 0.5 * (inputs.upper - inputs.lower)
  # The coefficients of the inputs are `fixed + free @ slopes`. The program maximises what is linear
  # in them, less half . sizes, where the sizes are at least their absolute values.
  fixed, free = first.weights @ (negative * slope), first.weights * positive
  gain = positive * (first.weights.T @ center + first.bias)
  identity = np.eye(INPUTS)
  found = scipy.optimize.linprog(
    np.concatenate([-gain, half]),
    A_ub=np.block([[free, -identity], [-free, -identity]]),
    b_ub=np.concatenate([-fixed, fixed]),
    bounds=[(0.0, 1.0)] * HIDDEN + [(0.0, None)] * INPUTS,
  )
  constant = last.bias @ row + negative @ (-slope * lower + slope * first.bias) + fixed @ center
  return constant - found.fun


def problem():
  """Lower bounds after so many steps on the slopes, and the best there are, both `[B, R]`."""
  rng = np.random.default_rng(2)
  first, last = (dense(rng, *sizes, np.float64) for sizes in ((INPUTS, HIDDEN), (HIDDEN, OUTPUTS)))
  layers = (first, cert.ReLU(), last)
  region = cert.ball(jnp.asarray(rng.uniform(0.2, 0.8, size=(4, INPUTS))), 0.2)
  rows = jnp.asarray(rng.normal(size=(4, 5, OUTPUTS)))
  known = jax.jit(lambda: interval.boxes(layers, region))()
  pairs = [
    [cert.Box(np.asarray(box.lower[i]), np.asarray(box.upper[i])) for box in known[1::-1]]
    for i in range(4)
  ]
  best = [[best_bound(first, last, row, *pairs[i]) for row in rows[i]] for i in range(4)]

  def bounds(slope_steps):
    return jax.jit(
      lambda: linear_relaxation.lower_bounds(layers, known, region, rows, slope_steps=slope_steps)
    )()

  return bounds, np.array(best)


@oracles.in_float64
def test_steps_on_the_slopes_near_the_best_bounds():
  bounds, best = problem()
  found = [bounds(slope_steps) for slope_steps in (0, 1, 5, 20)]
  left = [np.mean(best - lower) for lower in found]
  print('left of the distance to the best bounds', np.array(left) / left[0])
  assert left[0] > 0.05
  for more, less in zip(left[1:], left, strict=False):
    assert 0.0 < more < less
  assert left[-1] < 0.01 * left[0]
  assert np.all(found[-1] <= best + 1e-9)
