"""Independent references for small ReLU networks of dense layers, in float64 NumPy.

A network is a list of (weights `[K, N]`, bias `[N]`), with a ReLU between two of them.
"""

from __future__ import annotations

import itertools

import numpy as np
import scipy.optimize

from se_vae import certification as cert


def layers_of(network, dtype=np.float32):
  """The network as layers to be certified."""
  layers = ()
  for weights, bias in network:
    layers += (cert.Dense(weights.astype(dtype), bias.astype(dtype)), cert.ReLU())
  return layers[:-1]


def random_network(rng, widths):
  """Weights of about unit variance of outputs, in float32's numbers."""
  return [
    (
      np.float64(np.float32(rng.normal(size=(fan_in, fan_out)) * (2.0 / fan_in) ** 0.5)),
      np.float64(np.float32(0.3 * rng.normal(size=fan_out))),
    )
    for fan_in, fan_out in itertools.pairwise(widths)
  ]


def forward(network, x):
  """Outputs `[B, N]` for inputs `[B, K]`."""
  for i, (weights, bias) in enumerate(network):
    x = np.maximum(x, 0.0) if i else x
    x = x @ weights + bias
  return x


def minimum(network, lower, upper, row):
  """The exact least value of row . outputs over a box of inputs, by mixed-integer programming.

  Each unit is z = a - b with a, b >= 0 and a binary variable that lets only one of them be
  positive, so that its output max(z, 0) is a.
  """
  sizes = [len(lower), *(len(bias) for _, bias in network)]
  hidden = sum(sizes[1:-1])
  count = len(lower) + 3 * hidden  # inputs, then a, b and the binary of each unit
  lows, highs = np.zeros(count), np.full(count, np.inf)
  lows[: len(lower)], highs[: len(lower)] = lower, upper
  highs[len(lower) + 2 * hidden :] = 1.0
  equal, below = [], []
  inputs, start = np.arange(len(lower)), 0
  for weights, bias in network[:-1]:
    # How large |z| can be: the constraints of the binaries need a bound.
    large = np.maximum(np.abs(lows[inputs]), np.abs(highs[inputs])) @ np.abs(weights) + np.abs(bias)
    positive = len(lower) + start + np.arange(len(bias))
    for j in range(len(bias)):
      a = positive[j]
      b, binary = a + hidden, a + 2 * hidden
      highs[[a, b]] = large[j]
      constraint = np.zeros(count)
      constraint[inputs], constraint[a], constraint[b] = weights[:, j], -1.0, 1.0
      equal.append((constraint, -bias[j]))
      below.append((_entries(count, {a: 1.0, binary: -large[j]}), 0.0))
      below.append((_entries(count, {b: 1.0, binary: large[j]}), large[j]))
    inputs, start = positive, start + len(bias)
  weights, bias = network[-1]
  cost = np.zeros(count)
  cost[inputs] = weights @ row
  integrality = np.zeros(count)
  integrality[len(lower) + 2 * hidden :] = 1.0
  (equal_rows, values), (below_rows, most) = zip(*equal, strict=True), zip(*below, strict=True)
  solution = scipy.optimize.milp(
    cost,
    integrality=integrality,
    bounds=scipy.optimize.Bounds(lows, highs),
    constraints=[
      scipy.optimize.LinearConstraint(np.array(equal_rows), values, values),
      scipy.optimize.LinearConstraint(np.array(below_rows), -np.inf, most),
    ],
    options={'mip_rel_gap': 0.0},
  )
  assert solution.success, solution.message
  return solution.fun + bias @ row


def _entries(count, entries):
  vector = np.zeros(count)
  vector[list(entries)] = list(entries.values())
  return vector


def crown(network, lower, upper, *, linear):
  """Bounds of the outputs by CROWN as in its paper, with one product of matrices a layer.

  Args:
    network: the network.
    lower: of the inputs `[K]`.
    upper: of the inputs `[K]`.
    linear: whether the inputs of ReLUs are bounded in the same way, or else by intervals.
  """
  boxes = []
  low, high = lower, upper
  for i, (weights, bias) in enumerate(network):
    middle, half = (low + high) / 2.0 @ weights + bias, (high - low) / 2.0 @ np.abs(weights)
    interval = middle - half, middle + half
    backwards = _backwards(network[: i + 1], boxes, lower, upper)
    last = i + 1 == len(network)
    if linear or last:
      interval = np.maximum(interval[0], backwards[0]), np.minimum(interval[1], backwards[1])
    boxes.append(interval)
    low, high = (np.maximum(end, 0.0) for end in interval)
  return boxes[-1]


def _backwards(network, boxes, lower, upper):
  (weights, bias), results = network[-1], []
  for sign in (1.0, -1.0):
    rows, constant = sign * weights, sign * bias  # bounds sign * output from below
    for (before, offset), (low, high) in zip(network[-2::-1], boxes[::-1], strict=True):
      for unit in range(len(low)):
        if high[unit] <= 0.0:
          rows[unit] = 0.0
        elif low[unit] < 0.0:
          slope = high[unit] / (high[unit] - low[unit])
          under = 1.0 if high[unit] > -low[unit] else 0.0
          negative = np.minimum(rows[unit], 0.0)
          constant = constant - negative * slope * low[unit]
          rows[unit] = np.maximum(rows[unit], 0.0) * under + negative * slope
      rows, constant = before @ rows, constant + offset @ rows
    least = np.maximum(rows, 0.0).T @ lower + np.minimum(rows, 0.0).T @ upper + constant
    results.append(sign * least)
  return results
