"""Every attack test asserts the constraint: inside the ball, inside the bounds, per example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import attacks

SHAPE = (6, 5, 4, 2)
RADII = (0.0, 1e-6, 0.03, 0.2, 1.0)


def linear(x_adv, weights):
  return jnp.sum(x_adv * weights, axis=(1, 2, 3))


def squared_move(x_adv, x):
  return jnp.sum((x_adv - x) ** 2, axis=(1, 2, 3))


def flat(x_adv):
  return jnp.zeros(x_adv.shape[0])


def wavy(x_adv, weights):
  return jnp.sum(jnp.sin(9.0 * x_adv * weights), axis=(1, 2, 3))


@pytest.fixture
def images():
  x = np.array(jax.random.uniform(jax.random.key(7), SHAPE))
  x[0, 0, 0] = 0.0  # on the bounds
  x[1, 0, 0] = 1.0
  return jnp.asarray(x)


@pytest.fixture
def weights():
  return jax.random.normal(jax.random.key(8), SHAPE)


def assert_legal(x_adv, x, radius, norm):
  """In float64, with one unit in the last place of a pixel allowed in linf."""
  assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
  assert float(x_adv.min()) >= 0.0 and float(x_adv.max()) <= 1.0
  offset = np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)
  radius = float(np.float32(radius))
  if norm == 'linf':
    assert np.abs(offset).max() <= radius + np.spacing(np.float32(1.0))
  else:
    lengths = np.sqrt((offset**2).sum(axis=(1, 2, 3)))
    # Each of the n pixels is rounded by at most half a unit in the last place of 1.
    rounding = 0.5 * np.sqrt(offset[0].size) * np.spacing(np.float32(1.0))
    assert lengths.max() <= radius * (1.0 + 4e-7) + rounding


@pytest.mark.parametrize('norm', attacks.NORMS)
@pytest.mark.parametrize('radius', RADII)
@pytest.mark.parametrize('keep_best', [False, True])
@pytest.mark.parametrize('objective', [linear, wavy])
def test_result_is_legal_and_deterministic(images, weights, objective, norm, radius, keep_best):
  def attack():
    return attacks.pgd(
      objective,
      jax.random.key(0),
      images,
      radius=radius,
      num_steps=7,
      norm=norm,
      keep_best=keep_best,
      args=(weights,),
    )

  x_adv = attack()
  assert_legal(x_adv, images, radius, norm)
  np.testing.assert_array_equal(x_adv, attack())
  if radius == 0.0:
    np.testing.assert_array_equal(x_adv, images)
  else:
    assert np.all(objective(x_adv, weights) >= objective(images, weights) - 1e-5)


@pytest.mark.parametrize('norm', attacks.NORMS)
@pytest.mark.parametrize('step_size', [1e3, 1e30])
def test_result_is_legal_for_absurd_step_sizes(images, weights, norm, step_size):
  x_adv = attacks.pgd(
    linear,
    jax.random.key(0),
    images,
    radius=0.1,
    num_steps=3,
    step_size=step_size,
    norm=norm,
    args=(weights,),
  )
  assert_legal(x_adv, images, 0.1, norm)


def test_linf_reaches_the_exact_maximum_of_a_linear_objective(images, weights):
  radius = 0.15
  x_adv = attacks.pgd(
    linear, jax.random.key(3), images, radius=radius, num_steps=10, args=(weights,)
  )
  best = np.clip(np.asarray(images) + radius * np.sign(weights), 0.0, 1.0)
  np.testing.assert_allclose(x_adv, best, atol=1e-6)


def test_l2_reaches_the_maximum_of_a_linear_objective_away_from_the_bounds(weights):
  x = jnp.full(SHAPE, 0.5)
  radius = 0.3
  x_adv = attacks.pgd(
    linear,
    jax.random.key(3),
    x,
    radius=radius,
    num_steps=30,
    step_size=radius,  # each step halves what the random start had across the gradient
    norm='l2',
    args=(weights,),
  )
  gain = np.asarray(linear(x_adv, weights) - linear(x, weights))
  lengths = np.sqrt((np.asarray(weights) ** 2).sum(axis=(1, 2, 3)))
  np.testing.assert_allclose(gain, radius * lengths, rtol=1e-5)


def test_l2_direction_survives_gradients_whose_squares_underflow():
  tiny = lambda x_adv: 1e-25 * jnp.sum(x_adv, axis=(1, 2, 3))  # noqa: E731
  x = jnp.full(SHAPE, 0.5)
  x_adv = attacks.pgd(
    tiny, jax.random.key(0), x, radius=0.1, num_steps=30, norm='l2', random_start=False
  )
  moved = np.asarray(x_adv - x).reshape(SHAPE[0], -1)
  np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 0.1, rtol=1e-4)
  assert (moved > 0.0).all()


@pytest.mark.parametrize('norm', attacks.NORMS)
def test_a_random_start_leaves_a_flat_spot_and_a_fixed_one_cannot(images, norm):
  options = dict(radius=0.1, num_steps=5, norm=norm, args=(images,))
  stuck = attacks.pgd(squared_move, jax.random.key(0), images, random_start=False, **options)
  free = attacks.pgd(squared_move, jax.random.key(0), images, **options)
  np.testing.assert_array_equal(stuck, images)
  assert_legal(free, images, 0.1, norm)
  assert np.all(squared_move(free, images) > 1e-3)


@pytest.mark.parametrize('norm', attacks.NORMS)
def test_random_starts_fill_the_ball(norm):
  """With a flat objective the result is the start: its radial law is that of a uniform draw."""
  count, side = 4000, 3
  x = jnp.full((count, side), 0.5)
  x_adv = attacks.pgd(
    lambda z: jnp.zeros(z.shape[0]), jax.random.key(1), x, radius=0.2, num_steps=1, norm=norm
  )
  offset = np.asarray(x_adv - x)
  length = np.abs(offset).max(axis=1) if norm == 'linf' else np.linalg.norm(offset, axis=1)
  share = (length / 0.2) ** side  # uniform on [0, 1] for a uniform point of a ball in 3 dimensions
  standard_error = np.sqrt(1.0 / 12.0 / count)
  assert abs(share.mean() - 0.5) < 4.0 * standard_error
  assert np.abs(offset.mean(axis=0)).max() < 4.0 * 0.2 / np.sqrt(count)


def test_keep_best_never_returns_less_than_the_last_iterate(images, weights):
  options = dict(radius=0.2, num_steps=9, step_size=0.3, args=(weights,))
  last = attacks.pgd(wavy, jax.random.key(0), images, **options)
  best = attacks.pgd(wavy, jax.random.key(0), images, keep_best=True, **options)
  assert np.all(wavy(best, weights) >= wavy(last, weights))
  assert np.any(wavy(best, weights) > wavy(last, weights) + 1e-3)


def test_result_does_not_depend_on_the_batch(images, weights):
  index = jnp.arange(SHAPE[0])
  options = dict(radius=0.1, num_steps=4)
  whole = attacks.pgd(wavy, jax.random.key(5), images, args=(weights,), index=index, **options)
  for i in range(SHAPE[0]):
    rows = slice(i, i + 1)
    alone = attacks.pgd(
      wavy, jax.random.key(5), images[rows], args=(weights[rows],), index=index[rows], **options
    )
    np.testing.assert_array_equal(alone[0], whole[i])


def test_radius_and_step_size_do_not_recompile(images, weights):
  traces = []

  def objective(x_adv, w):
    traces.append(None)
    return linear(x_adv, w)

  for radius in (0.01, 0.1, 0.3):
    attacks.pgd(
      objective,
      jax.random.key(0),
      images,
      radius=radius,
      step_size=radius / 2,
      num_steps=3,
      args=(weights,),
    )
  first = len(traces)
  attacks.pgd(
    objective, jax.random.key(0), images, radius=0.7, step_size=0.1, num_steps=3, args=(weights,)
  )
  assert len(traces) == first > 0


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    ({'num_steps': 0}, ValueError, 'num_steps must be >= 1'),
    ({'norm': 'l1'}, ValueError, 'norm must be one of'),
    ({'bounds': (1.0, 0.0)}, ValueError, 'bounds'),
    ({'radius': jnp.ones(3)}, AssertionError, 'radius must be a scalar'),
    ({'x': jnp.zeros(SHAPE, jnp.uint8)}, AssertionError, 'floating point'),
    ({'x': jnp.zeros(3)}, AssertionError, r'\[B, \.\.\.\]'),
    ({'objective': jnp.sum}, AssertionError, 'one value per example'),
  ],
)
def test_wrong_arguments_raise(images, change, error, message):
  arguments = {'objective': flat, 'x': images, 'radius': 0.1, 'num_steps': 2} | change
  objective, x = arguments.pop('objective'), arguments.pop('x')
  with pytest.raises(error, match=message):
    attacks.pgd(objective, jax.random.key(0), x, **arguments)
