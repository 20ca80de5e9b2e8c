"""Attacks are the algorithms of their papers: Auto-PGD in NumPy, and the schedule of Square."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import attacks
from se_vae.attacks import auto_pgd, square_attack
from tests import oracles

RADIUS = 0.3


def reference_apgd(
  value: Callable[[np.ndarray], float],
  gradient: Callable[[np.ndarray], np.ndarray],
  start: np.ndarray,
  x: np.ndarray,
  num_steps: int,
  norm: str = 'linf',
) -> np.ndarray:
  """Algorithm 1 of Croce and Hein (2020) for one example, with pixels in [0, 1]."""

  def project(z):
    if norm == 'linf':
      return np.clip(np.clip(z, x - RADIUS, x + RADIUS), 0.0, 1.0)
    shrunk = RADIUS / max(np.linalg.norm(z - x), RADIUS)
    return np.clip(x + shrunk * (z - x), 0.0, 1.0)

  def direction(slope):
    return np.sign(slope) if norm == 'linf' else slope / np.linalg.norm(slope)

  shares = [0.0, 0.22]
  while shares[-1] < 1.0:
    shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
  ends = {int(np.ceil(round(share * num_steps, 6))) for share in shares[1:]}
  previous = z = best = start = project(start)
  best_value = z_value = checkpoint_value = value(start)
  step_size, rises, last, halved = 2.0 * RADIUS, 0, 0, True
  for k in range(1, num_steps + 1):
    share = 1.0 if k == 1 else 0.75
    ahead = project(z + step_size * direction(gradient(z)))
    new = project(z + share * (ahead - z) + (1.0 - share) * (z - previous))
    previous, z = z, new
    new_value = value(z)
    rises += new_value > z_value
    z_value = new_value
    if new_value > best_value:
      best, best_value = z, new_value
    if k in ends:
      stagnates, stuck = rises < 0.75 * (k - last), best_value <= checkpoint_value
      halved = stagnates or (not halved and stuck)
      if halved:
        z, z_value, step_size = best, best_value, step_size / 2.0
      rises, last, checkpoint_value = 0, k, best_value
  return best


@pytest.mark.parametrize('norm', ('linf', 'l2'))
@oracles.in_float64
def test_apgd_is_algorithm_1(norm):
  rng = np.random.default_rng(0)
  x = rng.uniform(size=(40, 6))
  start = np.clip(x + rng.uniform(-RADIUS, RADIUS, x.shape), 0.0, 1.0)
  weights = rng.normal(size=x.shape)

  def objective(z, w):
    return jnp.sum(jnp.sin(9.0 * z * w) + z * w, axis=1)

  found = auto_pgd.apgd(
    objective,
    jax.random.key(0),
    jnp.asarray(x),
    radius=RADIUS,
    num_steps=30,
    norm=norm,
    start=jnp.asarray(start),
    args=(jnp.asarray(weights),),
  )
  for i, w in enumerate(weights):
    expected = reference_apgd(
      lambda z, w=w: np.sum(np.sin(9.0 * z * w) + z * w),
      lambda z, w=w: 9.0 * w * np.cos(9.0 * z * w) + w,
      start[i],
      x[i],
      num_steps=30,
      norm=norm,
    )
    np.testing.assert_allclose(found[i], expected, atol=1e-9)


@pytest.mark.parametrize(
  'until_13', [np.linspace(1.0, 9.0, 13), [10.0] + [5.0] * 12], ids=('rising', 'equal')
)
@oracles.in_float64
def test_apgd_goes_back_where_no_value_is_the_best(until_13):
  """The values are given for the places that are visited, and lead to the middle.

  They fall at the first step and then rise, but not above that of the start, until the second
  checkpoint, after 13 of 30 steps. Or one is that of the start, and others are equal, which is no
  rise. The step after the checkpoint finds the best image of all.
  """
  x = np.array([0.5])
  script, values = iter([10.0, *until_13, 20.0, *np.linspace(0.0, 5.0, 30)]), {}

  def to_the_middle(z):
    return np.where(z <= 0.5, 1.0, -1.0)

  def value(z):
    return values.setdefault(z.item(), next(script))

  expected = reference_apgd(value, to_the_middle, x, x, num_steps=30)
  assert values[expected.item()] == 20.0
  places = np.sort(np.array([*values]))
  heights = np.array([values[place] for place in places])

  def objective(z):  # the given values, and a gradient that leads to the middle
    fixed = jax.lax.stop_gradient(z)
    towards = jnp.where(fixed <= 0.5, 1.0, -1.0)
    return (jnp.interp(fixed, places, heights) + towards * (z - fixed))[:, 0]

  found = auto_pgd.apgd(
    objective,
    jax.random.key(0),
    jnp.asarray(x)[None],
    radius=RADIUS,
    num_steps=30,
    start=jnp.asarray(x)[None],
  )
  np.testing.assert_allclose(found[0], expected, atol=1e-9)


def test_apgd_leaves_a_start_whose_value_is_no_number():
  def objective(z):
    return (z + jnp.where(z == 0.5, jnp.nan, 0.0))[:, 0]

  start = jnp.full((1, 1), 0.5)
  options = {'radius': RADIUS, 'num_steps': 3, 'start': start}
  found = auto_pgd.apgd(objective, jax.random.key(0), start, **options)
  # The gradient at the start is 1, so the first step leads to the edge of the ball.
  np.testing.assert_allclose(found, 0.5 + RADIUS, rtol=1e-6)


def test_square_has_the_schedule_of_its_paper():
  """The square covers 0.8 of the image at first, and half as much after each given query."""
  sides = square_attack._sides(10_000, 28, 28)
  ends = [0, 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000, 10_000]
  for i, (first, last) in enumerate(itertools.pairwise(ends)):
    side = max(1, round((0.8 / 2.0**i * 28 * 28) ** 0.5))
    np.testing.assert_array_equal(sides[first:last], side)


@pytest.mark.parametrize('shape', [(5, 4, 2), (5, 4), (5,)])
def test_square_starts_with_vertical_stripes(shape):
  x = jnp.full((3, *shape), 0.5)
  x_adv = square_attack.square(
    lambda x_adv: jnp.zeros(len(x_adv)), jax.random.key(0), x, radius=0.1, num_queries=1
  )
  offset = np.asarray(x_adv - x)
  np.testing.assert_allclose(np.abs(offset), 0.1, rtol=1e-5)
  if len(shape) > 1:  # the first axis has the rows of the image
    assert (offset == offset[:, :1]).all()
  assert len(np.unique(offset)) == 2


@pytest.mark.parametrize('norm', attacks.NORMS)
def test_extreme_noise_is_at_the_very_edge(norm):
  x = jnp.full((50, 3, 4), 0.5)
  x_adv = attacks.noise(jax.random.key(0), x, radius=0.2, extreme=True, norm=norm)
  offset = np.asarray(x_adv - x).reshape(50, -1)
  length = np.abs(offset) if norm == 'linf' else np.linalg.norm(offset, axis=1)
  np.testing.assert_allclose(length, 0.2, rtol=1e-5)
  assert abs((offset > 0.0).mean() - 0.5) < 4.0 * 0.5 / offset.size**0.5


@pytest.mark.parametrize('attack', [attacks.pgd, auto_pgd.apgd, square_attack.square])
def test_other_bounds_of_pixels_are_kept_to(attack):
  x = jnp.array([[1.5, 0.3, 0.9]])
  count = {'num_queries' if attack is square_attack.square else 'num_steps': 50}
  for sign, expected in ((1.0, [[1.55, 0.4, 1.0]]), (-1.0, [[1.4, 0.25, 0.8]])):
    x_adv = attack(
      lambda x_adv, sign: sign * jnp.sum(x_adv, axis=1),
      jax.random.key(0),
      x,
      radius=0.1,
      bounds=(0.25, 1.55),
      args=(sign,),
      **count,
    )
    np.testing.assert_allclose(x_adv, expected, rtol=1e-6)
