"""Small networks, whose exact worst case is known: certified <= exact <= attacked."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from se_vae import attacks
from se_vae import certification as cert
from se_vae.attacks import losses
from se_vae.certification import certificates
from tests import oracles
from tests.certification import exact

# Two and three hidden layers of 3 to 6 units; 4 pixels, 3 classes.
WIDTHS = ((4, 6, 5, 3), (4, 5, 4, 3, 3))
OLD_HIGHS = tuple(map(int, scipy.__version__.split('.')[:2])) < (1, 15)
exact_solver = pytest.mark.skipif(
  OLD_HIGHS, reason='the HiGHS of SciPy 1.14 calls one in 300 of these problems infeasible'
)
by_widths = pytest.mark.parametrize(
  'widths', [pytest.param(WIDTHS[0], marks=pytest.mark.slow), WIDTHS[1]], ids=len
)
METHODS = (
  cert.Method('ibp'),
  cert.Method('crown_ibp'),
  cert.Method('crown'),
  cert.Method('crown', slope_steps=20),
)


@oracles.quick_jit
def bounds(layers, x, radius, labels):
  """The box of the inputs, and lower bounds of the margin by each method `[4]`."""
  region = cert.ball(x, radius)
  lower = [certificates.margins.__wrapped__(layers, region, labels, method) for method in METHODS]
  return region.box, jnp.concatenate(lower)


output_box = oracles.quick_jit(certificates.output_box.__wrapped__, static_argnames='method')


def minus_margin(x_adv, layers, labels):
  return losses.margin(cert.apply(layers, x_adv), labels)


@functools.cache
def cases(widths):
  """50 random networks with one input each: bounds of the margin, its least value, an attack's."""
  rng = np.random.default_rng(len(widths))
  certified, least, attacked, clean = [], [], [], []
  for _ in range(50):
    network = exact.random_network(rng, widths)
    x = np.float32(rng.uniform(size=(1, widths[0])))
    radius, layers = np.float32(rng.choice([0.02, 0.1, 0.3])), exact.layers_of(network)
    labels = exact.forward(network, np.float64(x)).argmax(axis=1).astype(np.int32)
    box, lower = bounds(layers, x, radius, labels)
    certified.append(lower)
    x_adv = attacks.pgd(
      minus_margin,
      jax.random.key(0),
      jnp.asarray(x),
      radius=radius,
      num_steps=10,
      keep_best=True,
      args=(layers, labels),
    )
    rows = np.delete(np.eye(3)[labels] - np.eye(3), labels[0], axis=0)
    attacked.append((exact.forward(network, np.float64(x_adv)) @ rows.T).min())
    clean.append((exact.forward(network, np.float64(x)) @ rows.T).min())
    low, high = (np.float64(ends[0]) for ends in (box.lower, box.upper))
    least.append(min(exact.minimum(network, low, high, row) for row in rows))
  return tuple(map(np.array, (certified, least, attacked, clean)))


@pytest.mark.long
@exact_solver
@by_widths
def test_certified_is_at_most_exact_is_at_most_attacked(widths):
  certified, least, attacked, clean = cases(widths)
  # The solver keeps its constraints to 1e-6.
  assert (certified <= least[:, None] + 1e-5).all()
  assert (least <= attacked + 1e-5).all()
  assert (least < clean - 1e-3).mean() > 0.8, 'the balls are large enough to matter'


@exact_solver
@by_widths
def test_each_method_is_tighter_than_the_one_before(widths):
  certified, least, _, clean = cases(widths)
  assert (np.diff(certified[:, 2:], axis=1) >= 0.0).all(), 'any slopes beside the first ones'
  # What a certificate adds to the exact loss of margin, as a share of it, at the median.
  moved = clean - least > 1e-3
  loss, excess = (clean - least)[moved, None], (least[:, None] - certified)[moved]
  excess = np.median(excess / loss, axis=0)
  print('median excess of', *METHODS, excess)
  assert (np.diff(excess) <= 0.0).all()
  assert excess[0] > 2.0 * excess[2]
  assert excess[3] < 0.1


@pytest.mark.long
@oracles.in_float64
def test_bounds_are_those_of_the_paper_of_crown():
  rng = np.random.default_rng(2)
  widths = WIDTHS[1]
  for _ in range(10):
    network = exact.random_network(rng, widths)
    region = cert.ball(jnp.asarray(rng.uniform(size=(1, 4))), 0.1)
    low, high = (np.float64(ends[0]) for ends in (region.box.lower, region.box.upper))
    for method, linear in ((METHODS[1], False), (METHODS[2], True)):
      box = output_box(exact.layers_of(network, np.float64), region, method)
      expected = exact.crown(network, low, high, linear=linear)
      np.testing.assert_allclose(box.lower[0], expected[0], rtol=1e-12, atol=1e-12)
      np.testing.assert_allclose(box.upper[0], expected[1], rtol=1e-12, atol=1e-12)
