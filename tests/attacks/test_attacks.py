"""Every attack test asserts the constraint: inside the ball, inside the bounds, per example."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import attacks
from se_vae.attacks import auto_pgd, square_attack
from tests import oracles

SHAPE = (6, 5, 4, 2)
RADII = (0.0, 1e-6, 0.03, 0.2, 1.0)
# Most tests use these options and one of two objectives. Radii, weights and step sizes are traced,
# so that the compilation cache has the program of one test for the next.
NUM_STEPS = 10
RELATIVE_STEP_SIZE = 0.25


def linear(x_adv, weights):
  return jnp.sum(x_adv * weights, axis=(1, 2, 3))


def squared_distance(x_adv, x):
  return jnp.sum((x_adv - x) ** 2, axis=(1, 2, 3))


def flat(x_adv):
  return jnp.zeros(x_adv.shape[0])


def wavy(x_adv, weights):
  return jnp.sum(jnp.sin(9.0 * x_adv * weights), axis=(1, 2, 3))


@pytest.fixture
def images():
  x = np.array(jax.random.uniform(jax.random.key(7), SHAPE, jnp.float32))
  x[0, 0, 0] = 0.0  # on the bounds
  x[1, 0, 0] = 1.0
  return jnp.asarray(x)


@pytest.fixture
def weights():
  return jax.random.normal(jax.random.key(8), SHAPE, jnp.float32)


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


def run_pgd(objective, x, *, key=0, **options):
  return attacks.pgd(objective, jax.random.key(key), x, num_steps=NUM_STEPS, **options)


@pytest.mark.parametrize('norm', attacks.NORMS)
@pytest.mark.parametrize('radius', RADII)
@pytest.mark.parametrize(('objective', 'keep_best'), [(linear, False), (wavy, True)])
def test_result_is_legal_and_deterministic(images, weights, objective, norm, radius, keep_best):
  def attack():
    options = dict(radius=radius, relative_step_size=RELATIVE_STEP_SIZE, norm=norm)
    return run_pgd(objective, images, keep_best=keep_best, args=(weights,), **options)

  x_adv = attack()
  assert_legal(x_adv, images, radius, norm)
  np.testing.assert_array_equal(x_adv, attack())
  if radius == 0.0:
    np.testing.assert_array_equal(x_adv, images)
  else:
    assert np.all(objective(x_adv, weights) >= objective(images, weights) - 1e-5)


@pytest.mark.parametrize('norm', attacks.NORMS)
@pytest.mark.parametrize('relative_step_size', [1e4, 1e31])
def test_result_is_legal_for_absurd_step_sizes(images, weights, norm, relative_step_size):
  options = dict(radius=0.1, relative_step_size=relative_step_size, norm=norm, args=(weights,))
  x_adv = run_pgd(linear, images, **options)
  assert_legal(x_adv, images, 0.1, norm)


def test_linf_reaches_the_exact_maximum_of_a_linear_objective(images, weights):
  radius = 0.15
  x_adv = run_pgd(linear, images, key=3, radius=radius, args=(weights,))
  best = np.clip(np.asarray(images) + radius * np.sign(weights), 0.0, 1.0)
  np.testing.assert_allclose(x_adv, best, atol=1e-6)


def test_l2_reaches_the_maximum_of_a_linear_objective_away_from_the_bounds(weights):
  x = jnp.full(SHAPE, 0.5, jnp.float32)
  radius = 0.3
  # Each step halves what the random start had across the gradient.
  options = dict(radius=radius, relative_step_size=1.0, norm='l2', args=(weights,))
  x_adv = run_pgd(linear, x, key=3, **options)
  gain = np.asarray(linear(x_adv, weights) - linear(x, weights))
  lengths = np.sqrt((np.asarray(weights) ** 2).sum(axis=(1, 2, 3)))
  np.testing.assert_allclose(gain, radius * lengths, rtol=1e-5)


def test_l2_direction_is_right_for_gradients_whose_squares_underflow():
  x = jnp.full(SHAPE, 0.5, jnp.float32)
  tiny = jnp.full(SHAPE, 1e-25, jnp.float32)
  x_adv = run_pgd(linear, x, radius=0.1, relative_step_size=1.0, norm='l2', args=(tiny,))
  moved = np.asarray(x_adv - x).reshape(SHAPE[0], -1)
  np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 0.1, rtol=1e-4)
  assert (moved > 0.0).all()


@pytest.mark.parametrize('norm', attacks.NORMS)
def test_a_random_start_leaves_a_flat_spot_and_a_fixed_one_cannot(images, norm):
  options = dict(radius=0.1, num_steps=5, norm=norm)

  @oracles.quick_jit
  def stuck_and_free(x):
    return [
      attacks.pgd(squared_distance, jax.random.key(0), x, start=start, args=(x,), **options)
      for start in (x, None)
    ]

  stuck, free = stuck_and_free(images)
  np.testing.assert_array_equal(stuck, images)
  assert_legal(free, images, 0.1, norm)
  assert np.all(squared_distance(free, images) > 1e-3)


@pytest.mark.parametrize('norm', attacks.NORMS)
def test_random_starts_fill_the_ball(norm):
  """With a flat objective the result is the start: its radial law is that of a uniform draw."""
  count, side = 4000, 3
  x = jnp.full((count, side), 0.5)
  options = dict(radius=0.2, num_steps=1, norm=norm)
  x_adv = oracles.quick_jit(lambda x: attacks.pgd(flat, jax.random.key(1), x, **options))(x)
  offset = np.asarray(x_adv - x)
  length = np.abs(offset).max(axis=1) if norm == 'linf' else np.linalg.norm(offset, axis=1)
  share = (length / 0.2) ** side  # uniform on [0, 1] for a uniform point of a ball in 3 dimensions
  standard_error = np.sqrt(1.0 / 12.0 / count)
  assert abs(share.mean() - 0.5) < 4.0 * standard_error
  assert np.abs(offset.mean(axis=0)).max() < 4.0 * 0.2 / np.sqrt(count)


def test_keep_best_never_returns_less_than_the_last_iterate(images, weights):
  options = dict(radius=0.2, relative_step_size=1.5, args=(weights,))
  last = run_pgd(wavy, images, **options)
  best = run_pgd(wavy, images, keep_best=True, **options)
  assert np.all(wavy(best, weights) >= wavy(last, weights))
  assert np.any(wavy(best, weights) > wavy(last, weights) + 1e-3)


def test_radius_and_relative_step_size_do_not_recompile(images, weights):
  traces = []

  def objective(x_adv, w):
    traces.append(None)
    return linear(x_adv, w)

  def attack(radius, relative_step_size):
    options = dict(relative_step_size=relative_step_size, args=(weights,))
    run_pgd(objective, images, radius=radius, **options)

  attack(0.01, 0.5)
  first = len(traces)
  for radius, relative_step_size in ((0.1, 0.2), (0.3, 2.0), (0.7, 0.1)):
    attack(radius, relative_step_size)
  assert len(traces) == first > 0


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    ({'num_steps': 0}, ValueError, 'num_steps must be an integer >= 1, got 0'),
    ({'num_steps': 2.5}, ValueError, 'num_steps must be an integer >= 1, got 2.5'),
    ({'norm': 'l1'}, ValueError, 'norm must be one of'),
    ({'bounds': (1.0, 0.0)}, ValueError, 'bounds'),
    ({'radius': jnp.ones(3)}, AssertionError, 'radius must be a scalar'),
    ({'radius': jnp.complex64(1)}, AssertionError, 'radius must be a scalar and real'),
    ({'start': jnp.zeros(SHAPE, jnp.complex64)}, AssertionError, 'start must .* be real'),
    ({'x': jnp.zeros(SHAPE, jnp.uint8)}, AssertionError, 'floating point'),
    ({'x': jnp.zeros(3)}, AssertionError, r'\[B, \.\.\.\]'),
    ({'objective': jnp.sum}, AssertionError, 'one value per example'),
    ({'objective': lambda x: x[:, 0, 0]}, AssertionError, 'one value per example'),
  ],
)
def test_wrong_arguments_raise(images, change, error, message):
  arguments = {'objective': flat, 'x': images, 'radius': 0.1, 'num_steps': 2} | change
  objective, x = arguments.pop('objective'), arguments.pop('x')
  with pytest.raises(error, match=message):
    attacks.pgd(objective, jax.random.key(0), x, **arguments)


def test_bounds_may_be_any_pair_of_numbers(images):
  expected, *results = (
    attacks.pgd(flat, jax.random.key(0), images, radius=0.1, num_steps=1, bounds=bounds)
    for bounds in ((0.0, 1.0), [0, 1], np.array([0.0, 1.0]), jnp.array([0.0, 1.0]))
  )
  for result in results:
    np.testing.assert_array_equal(result, expected)
  for bounds in (None, 1.0, (0.0,), 'ab'):
    with pytest.raises(ValueError, match='bounds: must be '):
      attacks.pgd(flat, jax.random.key(0), images, radius=0.1, num_steps=1, bounds=bounds)


# ---------------------------------------------------------------------------------------------
# The other attacks: one table, the same demands
# ---------------------------------------------------------------------------------------------


def run_apgd(objective, x, *, key=0, **options):
  return auto_pgd.apgd(objective, jax.random.key(key), x, num_steps=NUM_STEPS, **options)


def run_fgsm(objective, x, *, key=0, index=None, **options):
  return attacks.fgsm(objective, jax.random.key(key), x, **options)


def run_square(objective, x, *, key=0, norm='linf', **options):
  assert norm == 'linf'
  return square_attack.square(objective, jax.random.key(key), x, num_queries=60, **options)


noise = jax.jit(attacks.noise, static_argnames=('extreme', 'norm', 'bounds'))


def run_noise(objective, x, *, key=0, args=(), **options):
  return noise(jax.random.key(key), x, **options)


def run_signs(objective, x, *, key=0, args=(), **options):
  return noise(jax.random.key(key), x, extreme=True, **options)


def run_noise_at_once(objective, x, *, key=0, **options):
  """Operation by operation."""
  return attacks.noise(jax.random.key(key), x, **options)


TABLE = [
  (run, norm)
  for run in (run_apgd, run_fgsm, run_square, run_noise, run_signs)
  for norm in attacks.NORMS
  if not (run is run_square and norm == 'l2')
]


@pytest.mark.parametrize(('run', 'norm'), TABLE)
@pytest.mark.parametrize('radius', RADII)
def test_every_attack_is_legal_and_deterministic(images, weights, run, norm, radius):
  options = dict(radius=radius, norm=norm, args=(weights,), index=jnp.arange(SHAPE[0]))
  x_adv = run(wavy, images, **options)
  assert_legal(x_adv, images, radius, norm)
  np.testing.assert_array_equal(x_adv, run(wavy, images, **options))
  if radius >= 0.03:
    assert np.all(np.any(np.asarray(x_adv != images), axis=(1, 2, 3)))
    if run is not run_fgsm:  # which has no random start
      assert np.any(x_adv != run(wavy, images, key=1, **options))


@functools.cache
def quick(run, norm):
  """An attack on `wavy` whose arguments are all traced."""

  def attack(x, weights, radius, index):
    return run(wavy, x, radius=radius, norm=norm, args=(weights,), index=index)

  return oracles.quick_jit(attack)


@pytest.mark.parametrize('run', [run_pgd, run_apgd, run_square, run_noise, run_signs])
def test_no_attack_depends_on_the_batch(images, weights, run):
  attack, index = quick(run, 'linf'), np.arange(SHAPE[0])
  whole = attack(images, weights, 0.1, index)
  assert_legal(whole, images, 0.1, 'linf')
  for i in range(0, SHAPE[0], 2):
    rows = slice(i, i + 2)
    part = attack(images[rows], weights[rows], 0.1, index[rows])
    np.testing.assert_array_equal(part, whole[rows])


@pytest.mark.parametrize('run', [run_apgd, run_fgsm, run_square])
def test_a_radius_does_not_recompile(images, weights, run):
  traces = []

  def objective(x_adv, w):
    traces.append(None)
    return wavy(x_adv, w)

  options = dict(norm='linf', args=(weights,), index=jnp.arange(SHAPE[0]))
  run(objective, images, radius=0.01, **options)
  first = len(traces)
  run(objective, images, radius=0.3, **options)
  assert len(traces) == first > 0


@pytest.mark.parametrize('run', [run_apgd, run_fgsm])
def test_gradient_attacks_reach_the_exact_maximum_of_a_linear_objective(images, weights, run):
  x_adv = oracles.quick_jit(lambda x: run(linear, x, radius=0.15, args=(weights,)))(images)
  best = np.clip(np.asarray(images) + 0.15 * np.sign(weights), 0.0, 1.0)
  assert_legal(x_adv, images, 0.15, 'linf')
  np.testing.assert_allclose(x_adv, best, atol=1e-6)


def test_square_needs_no_gradient_and_nears_the_maximum(images, weights):
  @jax.custom_jvp
  def masked(x_adv, w):
    return linear(x_adv, w)

  masked.defjvps(None, None)  # no gradient at all
  options = dict(radius=0.1, num_queries=2000, args=(weights,))
  attack = oracles.quick_jit(
    lambda x: square_attack.square(masked, jax.random.key(0), x, **options)
  )
  x_adv = attack(images)
  assert_legal(x_adv, images, 0.1, 'linf')
  best = np.clip(np.asarray(images) + 0.1 * np.sign(weights), 0.0, 1.0)
  gain = np.asarray(linear(x_adv, weights) - linear(images, weights))
  most = np.asarray(linear(jnp.asarray(best), weights) - linear(images, weights))
  assert np.all(gain > 0.9 * most)


def test_apgd_halves_its_step_and_climbs_where_long_steps_overshoot(images):
  """The peak is inside the ball: PGD's last iterate swings about it, APGD settles."""
  peak = images + 0.01 * jnp.sign(0.5 - images)
  hill = lambda x_adv, peak: -jnp.sum((x_adv - peak) ** 2, axis=(1, 2, 3))  # noqa: E731

  @oracles.quick_jit
  def both(x):
    options = dict(radius=0.3, num_steps=60, args=(peak,))
    return [
      attack(hill, jax.random.key(0), x, **options) for attack in (auto_pgd.apgd, attacks.pgd)
    ]

  x_adv, fixed = both(images)
  assert_legal(x_adv, images, 0.3, 'linf')
  assert np.mean(hill(x_adv, peak)) > 0.5 * np.mean(hill(fixed, peak))  # both negative


def test_apgd_keeps_the_best_of_its_start_and_its_steps(images, weights):
  start = jnp.clip(images + 0.05 * jnp.sign(weights), 0.0, 1.0)

  @oracles.quick_jit
  def attack(start, weights):
    options = dict(radius=0.05, num_steps=1, start=start, args=(weights,))
    return auto_pgd.apgd(linear, jax.random.key(0), images, **options)

  x_adv = attack(start, weights)
  assert_legal(x_adv, images, 0.05, 'linf')
  np.testing.assert_allclose(x_adv, start, atol=1e-6)
  # A start outside the ball is projected, and a flat objective keeps it.
  outside = attack(1.0 - images, jnp.zeros(SHAPE, jnp.float32))
  assert_legal(outside, images, 0.05, 'linf')


@pytest.mark.parametrize('attack', [attacks.pgd, auto_pgd.apgd])
@pytest.mark.parametrize('jit', [False, True])
def test_starts_and_indices_of_other_shapes_are_refused(images, attack, jit):
  wrap = jax.jit if jit else (lambda function: function)
  attacked = wrap(functools.partial(attack, flat, jax.random.key(0), radius=0.1, num_steps=1))
  for start in (images.swapaxes(0, 1), jnp.concatenate([images, images])):
    with pytest.raises(AssertionError, match='start must have the shape'):
      attacked(images, start=start)
  for count in (1, SHAPE[0] - 1, SHAPE[0] + 1):
    with pytest.raises(AssertionError, match='index must have the shape'):
      attacked(images, index=jnp.arange(count))


def test_apgd_looks_ever_more_often():
  """The checkpoints of the paper for 100 steps: 22, 41, 57, 70, 80, 87, 93, 99."""
  intervals = auto_pgd._intervals(100)
  ends = np.flatnonzero(intervals) + 1
  np.testing.assert_array_equal(ends, [22, 41, 57, 70, 80, 87, 93, 99])
  np.testing.assert_array_equal(np.cumsum(intervals[ends - 1]), ends)


@pytest.mark.parametrize('run', [run_apgd, run_fgsm, run_square, run_noise_at_once])
def test_every_attack_refuses_wrong_arguments(images, run):
  with pytest.raises(ValueError, match='bounds'):
    run(flat, images, radius=0.1, bounds=(1.0, 0.0))
  with pytest.raises(AssertionError, match='radius must be a scalar'):
    run(flat, images, radius=jnp.ones(3))


@pytest.mark.parametrize('run', [run_apgd, run_fgsm, run_square, run_noise_at_once])
def test_every_attack_refuses_values_that_are_known_to_be_wrong(images, run):
  for x, radius, message in (
    (255.0 * images, 0.1, r'x must lie in the bounds \(0.0, 1.0\)'),
    (images.at[0, 0].set(jnp.nan), 0.1, 'x must lie in the bounds'),
    (images, jnp.nan, 'radius must be finite and >= 0'),
    (images, jnp.inf, 'radius must be finite and >= 0'),
    (images, -0.1, 'radius must be finite and >= 0'),
  ):
    with pytest.raises(ValueError, match=message):
      run(flat, x, radius=radius)
  with pytest.raises(AssertionError, match='not empty'):
    run(flat, images[:0], radius=0.1)


@pytest.mark.parametrize(('run', 'norm'), TABLE)
def test_a_traced_radius_that_is_wrong_gives_nan_and_no_image_that_looks_attacked(
  images, weights, run, norm
):
  """With a radius that is right, images stay legal even where gradients are not numbers."""
  attack, index = quick(run, norm), np.arange(SHAPE[0])
  no_numbers = jnp.full(SHAPE, jnp.nan, jnp.float32)  # nor are values and gradients with them
  for each in (weights, no_numbers):
    for radius in (np.nan, np.inf, -0.1):
      assert np.isnan(attack(images, each, radius, index)).all()
    assert_legal(attack(images, each, 0.1, index), images, 0.1, norm)


@pytest.mark.parametrize(
  ('run', 'norm'),
  [
    *(row for row in TABLE if row[0] is not run_square),
    pytest.param(run_square, 'linf', marks=pytest.mark.slow),  # ends as APGD does
  ],
)
@oracles.in_float64
def test_images_in_float64_stay_in_the_ball_to_a_unit_in_the_last_place(run, norm):
  rng = np.random.default_rng(0)
  x, weights = (jnp.asarray(rng.uniform(size=SHAPE)) for _ in range(2))
  options = dict(radius=0.1, norm=norm)
  x_adv = oracles.quick_jit(lambda x, weights: run(wavy, x, args=(weights,), **options))(x, weights)
  assert x_adv.dtype == jnp.float64 and x_adv.min() >= 0.0 and x_adv.max() <= 1.0
  offset = np.asarray(x_adv - x).reshape(SHAPE[0], -1)
  length = np.linalg.norm(offset, np.inf if norm == 'linf' else 2, axis=1)
  units = 1 if norm == 'linf' else np.sqrt(offset[0].size)
  assert length.max() <= 0.1 + units * np.spacing(1.0)


@pytest.mark.parametrize('run', [functools.partial(run_pgd, keep_best=True), run_apgd, run_square])
def test_an_objective_may_be_of_another_precision_than_the_images(images, run):
  with jax.enable_x64(True):
    # Types are known without compiling: tracing fails where one does not fit.
    wide = lambda x_adv: jnp.sum(x_adv.astype(jnp.float64), axis=(1, 2, 3))  # noqa: E731
    x_adv = jax.eval_shape(lambda x: run(wide, x, radius=0.1), images)
    assert x_adv.shape == images.shape and x_adv.dtype == jnp.float32


def test_square_names_the_count_that_it_refuses(images):
  with pytest.raises(ValueError, match='num_queries must be an integer >= 1, got 0'):
    square_attack.square(flat, jax.random.key(0), images, radius=0.1, num_queries=0)
