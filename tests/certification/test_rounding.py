"""The room for rounding that bounds leave, against a second account of it in NumPy.

Real rounding is much smaller than what is allowed for, so samples cannot tell whether a term of the
allowance is missing. Here a rounding error is made large enough to be seen.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import certification as cert
from se_vae.certification import interval, linear_relaxation, rounding
from tests import oracles
from tests.certification.test_bounds import conv, dense

UNIT, FLOOR = 1e-4, 1e-3
INPUTS, HIDDEN, OUTPUTS = 5, 4, 3
RADIUS = 0.2


@pytest.fixture(autouse=True)
def coarse_rounding(monkeypatch):
  """Each operation has a relative error of up to UNIT, and products underflow below FLOOR."""
  monkeypatch.setattr(rounding, 'gamma', lambda num_terms, dtype: UNIT * num_terms)
  monkeypatch.setattr(rounding, 'FLOOR', FLOOR)


def problem(norm):
  rng = np.random.default_rng(11)
  first, last = (dense(rng, *sizes, np.float64) for sizes in ((INPUTS, HIDDEN), (HIDDEN, OUTPUTS)))
  x = jnp.asarray(rng.uniform(size=(6, INPUTS)))  # some are within RADIUS of 0 or 1
  rows = rng.normal(size=(6, 7, OUTPUTS))
  return (first, cert.ReLU(), last), cert.ball(x, RADIUS, norm=norm), rows


class NumPyBox:
  """An interval for each number."""

  def __init__(self, lower, upper):
    self.lower, self.upper = np.asarray(lower), np.asarray(upper)
    self.center, self.half = 0.5 * (self.lower + self.upper), 0.5 * (self.upper - self.lower)
    self.size = np.maximum(abs(self.lower), abs(self.upper))


def sizes_of(layer, box):
  """What the rounding errors of a layer's outputs are relative to."""
  return box.size @ abs(layer.weights) + abs(layer.bias) + FLOOR


def through_dense(layer, box, region):
  """The outputs of a linear layer, whose sums are rounded here and in the network."""
  num_roundings = 2 * layer.weights.shape[0] + 16
  balls = [(box.center, box.half @ abs(layer.weights))]
  if region is not None and region.x is not None:
    squares = np.sum(RADIUS**2 * layer.weights**2, axis=0)
    balls.append((np.asarray(region.x), np.sqrt(squares + FLOOR)))
  ends = []
  for center, half in balls:
    room = half + UNIT * num_roundings * (sizes_of(layer, box) + half)
    output = center @ layer.weights + layer.bias
    ends.append((output - room, output + room))
  lower, upper = zip(*ends, strict=True)
  return NumPyBox(np.max(lower, axis=0), np.min(upper, axis=0))


def dots(rows, values):
  return np.einsum('brf,bf->br', rows, np.broadcast_to(values, (len(rows), values.shape[-1])))


def total(sizes):
  return sizes.sum(axis=1, keepdims=True)


def through_dense_backwards(layer, box, rows, extra):
  """The coefficients of a linear layer's inputs, a constant, and the error of both."""
  inputs, outputs = layer.weights.shape
  sizes = sizes_of(layer, box)
  underflow = FLOOR * (total(sizes) + total(box.size))
  error = UNIT * (inputs + outputs + extra) * (dots(abs(rows), sizes) + underflow)
  error += UNIT * (outputs + extra) * dots(abs(rows), abs(layer.bias))
  return rows @ layer.weights.T, dots(rows, layer.bias), error


def through_relu_backwards(box, rows, extra):
  lower, upper = np.minimum(box.lower, 0.0), np.maximum(box.upper, 0.0)
  slope = upper / np.where(upper > lower, upper - lower, 1.0)
  intercept = np.maximum(-slope * lower, (1.0 - slope) * upper)
  negative = np.minimum(rows, 0.0)
  constant = dots(negative, intercept)
  sizes = box.size + FLOOR
  error = UNIT * extra * (dots(abs(rows), sizes) + FLOOR * total(sizes))
  error += UNIT * (rows.shape[2] + extra) * abs(constant)
  adaptive = np.float64(box.upper > -box.lower)
  return np.maximum(rows, 0.0) * adaptive[:, None] + negative * slope[:, None], constant, error


def least_over(region, box, rows, extra):
  """The least value of a linear function of the inputs."""
  sizes = box.size + FLOOR
  room = UNIT * (rows.shape[2] + extra + 16)
  lower = dots(rows, box.center) - dots(abs(rows), box.half)
  if region.x is not None:
    norm = RADIUS * np.sqrt(np.sum(rows**2 + FLOOR, axis=2))
    lower = np.maximum(lower, dots(rows, np.asarray(region.x)) - norm * (1.0 + room))
  return lower - room * (dots(abs(rows), sizes) + FLOOR * total(sizes))


@pytest.mark.parametrize('norm', ('linf', 'l2'))
@oracles.in_float64
def test_bounds_leave_the_room_that_is_counted(norm):
  layers, region, rows = problem(norm)
  first, last = (
    cert.Dense(np.asarray(layer.weights), np.asarray(layer.bias)) for layer in layers[::2]
  )
  inputs = NumPyBox(region.box.lower, region.box.upper)
  hidden = through_dense(first, inputs, region)
  rectified = NumPyBox(np.maximum(hidden.lower, 0.0), np.maximum(hidden.upper, 0.0))
  assert (hidden.lower > 0.0).any() and (hidden.upper < 0.0).any()
  assert ((hidden.lower < 0.0) & (hidden.upper > 0.0)).any()
  outputs = through_dense(last, rectified, None)

  boxes = jax.jit(functools.partial(interval.boxes, layers))(region)
  for found, box in zip(boxes, (inputs, hidden, rectified, outputs), strict=True):
    np.testing.assert_allclose(found.lower, box.lower, rtol=1e-12)
    np.testing.assert_allclose(found.upper, box.upper, rtol=1e-12)

  extra = 16 + 2 * 3  # of 3 layers
  steps = (
    functools.partial(through_dense_backwards, last, rectified),
    functools.partial(through_relu_backwards, hidden),
    functools.partial(through_dense_backwards, first, inputs),
  )
  coefficients, expected = rows, 0.0
  for step in steps:
    coefficients, constant, error = step(coefficients, extra)
    expected = expected + constant - error
  expected += least_over(region, inputs, coefficients, extra)
  bound = jax.jit(lambda rows: linear_relaxation.lower_bounds(layers, boxes, region, rows))
  np.testing.assert_allclose(bound(jnp.asarray(rows)), expected, rtol=1e-12)


def test_the_products_of_a_convolution_are_counted():
  layer = conv(np.random.default_rng(0), 2, 5, (2, 1))
  assert layer.fans == (3 * 3 * 2, 3 * 3 * 5)
