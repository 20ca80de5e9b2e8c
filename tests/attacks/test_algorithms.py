"""Attacks are the algorithms of their papers: PGD and Auto-PGD in NumPy, and Square's queries."""

from __future__ import annotations

import functools
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


def project(z: np.ndarray, x: np.ndarray, norm: str) -> np.ndarray:
  """One image into the ball about x, with pixels in [0, 1]."""
  if norm == 'linf':
    return np.clip(np.clip(z, x - RADIUS, x + RADIUS), 0.0, 1.0)
  shrunk = RADIUS / max(np.linalg.norm(z - x), RADIUS)
  return np.clip(x + shrunk * (z - x), 0.0, 1.0)


def direction(slope: np.ndarray, norm: str) -> np.ndarray:
  """The unit step of steepest ascent; zero where there is no slope."""
  return np.sign(slope) if norm == 'linf' else slope / (np.linalg.norm(slope) or 1.0)


def reference_pgd(
  gradient: Callable[[np.ndarray], np.ndarray],
  start: np.ndarray,
  x: np.ndarray,
  num_steps: int,
  relative_step_size: float,
  norm: str,
) -> list[np.ndarray]:
  """All iterates of projected gradient ascent for one example, the projected start first."""
  iterates = [project(start, x, norm)]
  for _ in range(num_steps):
    step = relative_step_size * RADIUS * direction(gradient(iterates[-1]), norm)
    iterates.append(project(iterates[-1] + step, x, norm))
  return iterates


def reference_apgd(
  value: Callable[[np.ndarray], float],
  gradient: Callable[[np.ndarray], np.ndarray],
  start: np.ndarray,
  x: np.ndarray,
  num_steps: int,
  norm: str = 'linf',
) -> np.ndarray:
  """Algorithm 1 of Croce and Hein (2020) for one example, with pixels in [0, 1]."""

  shares = [0.0, 0.22]
  while shares[-1] < 1.0:
    shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
  ends = {int(np.ceil(round(share * num_steps, 6))) for share in shares[1:]}
  previous = z = best = project(start, x, norm)
  best_value = z_value = checkpoint_value = value(best)
  step_size, rises, last, halved = 2.0 * RADIUS, 0, 0, True
  for k in range(1, num_steps + 1):
    share = 1.0 if k == 1 else 0.75
    ahead = project(z + step_size * direction(gradient(z), norm), x, norm)
    new = project(z + share * (ahead - z) + (1.0 - share) * (z - previous), x, norm)
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


def objective(z, w):
  """Many peaks."""
  return jnp.sum(jnp.sin(9.0 * z * w) + z * w, axis=1)


def value(z, w):
  return np.sum(np.sin(9.0 * z * w) + z * w)


def gradient(z, w):
  return 9.0 * w * np.cos(9.0 * z * w) + w


def examples() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Images, starts of which some are outside the ball, and weights, `[40, 6]`, float64."""
  rng = np.random.default_rng(0)
  x = rng.uniform(size=(40, 6))
  start = np.clip(x + 1.2 * rng.uniform(-RADIUS, RADIUS, x.shape), 0.0, 1.0)
  return x, start, rng.normal(size=x.shape)


@pytest.mark.parametrize('num_steps', [1, 2, 5])
@pytest.mark.parametrize('relative_step_size', [None, 0.4])
@pytest.mark.parametrize('norm', attacks.NORMS)
@oracles.in_float64
def test_pgd_steps_projects_and_repeats(norm, relative_step_size, num_steps):
  x, start, weights = examples()
  last, best = (
    attacks.pgd(
      objective,
      jax.random.key(0),
      jnp.asarray(x),
      radius=RADIUS,
      num_steps=num_steps,
      relative_step_size=relative_step_size,
      norm=norm,
      start=jnp.asarray(start),
      keep_best=keep_best,
      args=(jnp.asarray(weights),),
    )
    for keep_best in (False, True)
  )
  share = 2.5 / num_steps if relative_step_size is None else relative_step_size
  for i, w in enumerate(weights):
    slope = functools.partial(gradient, w=w)
    iterates = reference_pgd(slope, start[i], x[i], num_steps, share, norm)
    np.testing.assert_allclose(last[i], iterates[-1], atol=1e-12)
    highest = max(iterates, key=functools.partial(value, w=w))
    np.testing.assert_allclose(best[i], highest, atol=1e-12)


@pytest.mark.parametrize('norm', attacks.NORMS)
@oracles.in_float64
def test_fgsm_is_one_step_from_the_image_to_the_edge(norm):
  x, _, weights = examples()
  options = {'radius': RADIUS, 'norm': norm, 'args': (jnp.asarray(weights),)}
  found = attacks.fgsm(objective, jax.random.key(0), jnp.asarray(x), **options)
  for i, w in enumerate(weights):
    expected = reference_pgd(functools.partial(gradient, w=w), x[i], x[i], 1, 1.0, norm)[-1]
    np.testing.assert_allclose(found[i], expected, atol=1e-12)


@pytest.mark.parametrize('norm', attacks.NORMS)
@oracles.in_float64
def test_apgd_is_algorithm_1(norm):
  x, start, weights = examples()
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
      functools.partial(value, w=w),
      functools.partial(gradient, w=w),
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


@pytest.mark.parametrize(('height', 'width'), [(28, 28), (90, 70)])
def test_square_has_the_schedule_of_its_paper(height, width):
  """The square covers 0.8 of the image at first, and half as much after each given query."""
  sides = square_attack._sides(10_000, height, width)
  ends = [0, 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000, 10_000]
  for i, (first, last) in enumerate(itertools.pairwise(ends)):
    side = max(1, round((0.8 / 2.0**i * height * width) ** 0.5))
    np.testing.assert_array_equal(sides[first:last], side)


def stripes_and_squares(height: int, width: int) -> list[np.ndarray]:
  """Results of one and of two queries, `[B, height, width, 8]`, as shares of the radius.

  Every change by the second query is an improvement: the value is the distance from the first.
  """

  def distance(x_adv, before):
    return jnp.sum(jnp.abs(x_adv - before), axis=(1, 2, 3))

  x = jnp.full((2000, height, width, 8), 0.5)
  results = [x]
  for count in (1, 2):
    options = {'radius': 0.25, 'num_queries': count, 'args': (results[-1],)}
    results.append(square_attack.square(distance, jax.random.key(0), x, **options))
  return [(np.asarray(result) - 0.5) / 0.25 for result in results[1:]]


@pytest.mark.parametrize(('height', 'width', 'side'), [(24, 27, 2), (3, 90, 1)])
def test_square_changes_a_random_square_to_a_random_corner(height, width, side):
  """At the second of two queries 0.8 / 2^7 of the image."""
  assert max(1, round((0.8 / 2**7 * height * width) ** 0.5)) == side
  stripes, found = stripes_and_squares(height, width)
  changed = (found != stripes).any(axis=-1)
  np.testing.assert_array_equal(np.abs(found), 1.0)
  # Where all 8 channels of a stripe have the signs of the square nothing changes: one in 256.
  complete = changed.sum(axis=(1, 2)) == side**2
  assert abs(complete.mean() - (1.0 - 1.0 / 256) ** side) < 4.0 / 2000**0.5 * (side / 256) ** 0.5
  rows, columns = changed[complete].any(axis=2), changed[complete].any(axis=1)
  for occupied, length in ((rows, height), (columns, width)):
    np.testing.assert_array_equal(occupied.sum(axis=1), side)
    first = occupied.argmax(axis=1)
    last = length - 1 - occupied[:, ::-1].argmax(axis=1)
    np.testing.assert_array_equal(last - first, side - 1)
    # Uniform over all places: each is taken, and the mean is in the middle.
    places = length - side + 1
    assert set(first) == set(range(places))
    standard_error = ((places**2 - 1) / 12.0 / len(first)) ** 0.5
    assert abs(first.mean() - (places - 1) / 2.0) < 4.0 * standard_error
  # One sign for each channel in all of a square, and both signs as often.
  corner = np.where(changed[..., None], found, np.nan)[complete]
  low, high = np.nanmin(corner, axis=(1, 2)), np.nanmax(corner, axis=(1, 2))
  np.testing.assert_array_equal(low, high)
  assert abs(low.mean()) < 4.0 / low.size**0.5
  signs = stripes[:, 0]
  assert abs(signs.mean()) < 4.0 / signs.size**0.5
  # Neither places nor signs have to do with each other.
  drawn = rows.argmax(axis=1), columns.argmax(axis=1), *low.T
  correlation = np.corrcoef(drawn) - np.eye(10)
  assert np.abs(correlation).max() < 4.5 / len(low) ** 0.5


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
  default = attacks.noise(jax.random.key(0), x, radius=0.2, norm=norm)
  np.testing.assert_array_equal(
    default, attacks.noise(jax.random.key(0), x, radius=0.2, extreme=False, norm=norm)
  )
  assert (default != x_adv).any()
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
