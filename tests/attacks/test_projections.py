"""The ball of an attack, image by image in NumPy, for images in rows and in columns."""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import attacks
from se_vae.attacks import projections
from tests import oracles
from tests.attacks.test_algorithms import RADIUS, direction, project

COUNT, SIZE = 30, 5
AXES = pytest.mark.parametrize('batch_axis', [0, 1])
NORMS = pytest.mark.parametrize('norm', attacks.NORMS)


def laid_out(images: np.ndarray, batch_axis: int) -> jax.Array:
  return jnp.asarray(images if batch_axis == 0 else images.T)


def ball_about(x: np.ndarray, norm: str, batch_axis: int) -> projections.Ball:
  radius = jnp.asarray(RADIUS)
  return projections.Ball(laid_out(x, batch_axis), radius, norm, (0.0, 1.0), batch_axis)


def pairs(scale: float) -> tuple[np.ndarray, np.ndarray]:
  """Images of which some lie at the bounds, and points about them, the first at its image."""
  rng = np.random.default_rng(0)
  x = np.clip(rng.uniform(-0.3, 1.3, (COUNT, SIZE)), 0.0, 1.0)
  z = x + scale * rng.normal(size=x.shape)
  z[0] = x[0]
  return x, z


@AXES
@NORMS
@oracles.in_float64
def test_points_inside_stay_and_others_come_to_the_edge(norm, batch_axis):
  for scale in (0.05, 1.0):
    x, z = pairs(scale)
    found = ball_about(x, norm, batch_axis).project(laid_out(z, batch_axis))
    expected = np.stack([project(*each, norm) for each in zip(z, x, strict=True)])
    np.testing.assert_allclose(laid_out(np.asarray(found), batch_axis), expected, rtol=1e-12)


@AXES
@NORMS
@oracles.in_float64
def test_a_step_has_its_length_and_the_direction_of_steepest_ascent(norm, batch_axis):
  rng = np.random.default_rng(1)
  x, z = pairs(0.1)
  gradient = rng.normal(size=x.shape) * 10.0 ** rng.integers(-30, 30, (COUNT, 1))
  gradient[:, 3] = 0.0
  gradient[1] = 0.0
  gradient[2, 0], gradient[2, 1:] = np.nan, 1.0
  clean = np.where(np.isnan(gradient), 0.0, gradient)
  lengths = rng.uniform(0.0, 0.4, COUNT)
  ball, start = ball_about(x, norm, batch_axis), laid_out(z, batch_axis)
  for step_size in (np.float64(0.2), lengths):
    found = ball.step(start, laid_out(gradient, batch_axis), step_size=jnp.asarray(step_size))
    for i, length in enumerate(np.broadcast_to(step_size, COUNT)):
      expected = project(z[i] + length * direction(clean[i], norm), x[i], norm)
      own = found[i] if batch_axis == 0 else found[:, i]
      np.testing.assert_allclose(own, expected, rtol=1e-12, atol=1e-15)


@AXES
def test_the_better_image_is_the_one_of_the_larger_value_and_the_old_one_where_they_tie(batch_axis):
  ball = ball_about(np.zeros((4, 3), np.float32), 'linf', batch_axis)
  assert ball.batch_size == 4
  new, old = (laid_out(np.full((4, 3), value, np.float32), batch_axis) for value in (1.0, 2.0))
  values, before = jnp.array([1.0, 0.5, 0.5, jnp.nan]), jnp.array([0.0, 0.5, 1.0, 0.0])
  images, best = ball.better(new, values, old, before)
  np.testing.assert_array_equal(
    laid_out(np.asarray(images), batch_axis)[:, 0], [1.0, 2.0, 2.0, 2.0]
  )
  np.testing.assert_array_equal(best, [1.0, 0.5, 1.0, 0.0])
  chosen = ball.where(jnp.array([True, False, True, False]), new, old)
  np.testing.assert_array_equal(
    laid_out(np.asarray(chosen), batch_axis)[:, 2], [1.0, 2.0, 1.0, 2.0]
  )


@pytest.mark.parametrize('extreme', [False, True])
@NORMS
@oracles.in_float64
def test_draws_have_the_moments_of_a_uniform_draw(norm, extreme):
  """About zero, with pixels that are not correlated, whose mean square is known."""
  count = 20_000
  ball = projections.ball(jnp.full((count, SIZE), 0.5), RADIUS, norm, (0.0, 1.0))
  draw = ball.extreme_points if extreme else ball.random_points
  offset = (np.asarray(draw(jax.random.split(jax.random.key(0), count))) - 0.5) / RADIUS
  squares = {
    ('linf', False): 1.0 / 3.0,
    ('linf', True): 1.0,
    ('l2', False): 1.0 / (SIZE + 2),
    ('l2', True): 1.0 / SIZE,
  }[norm, extreme]
  # Of products of two pixels, which are at most 1, the standard deviation is at most this.
  tolerance = 4.5 * squares**0.5 / count**0.5
  assert np.abs(offset.mean(axis=0)).max() < tolerance
  np.testing.assert_allclose(offset.T @ offset / count, squares * np.eye(SIZE), atol=tolerance)
  fourth_powers = {
    ('linf', False): 1.0 / 5.0,
    ('linf', True): 1.0,
    ('l2', False): 3.0 / (SIZE + 2) / (SIZE + 4),
    ('l2', True): 3.0 / SIZE / (SIZE + 2),
  }[norm, extreme]
  np.testing.assert_allclose((offset**4).mean(axis=0), fourth_powers, atol=tolerance)


@pytest.mark.parametrize('bounds', [(0.5, 0.5), (1.0, 0.0), (0.0, np.nan), (0.0, 0.5, 1.0), 'ab'])
def test_bounds_are_two_numbers_the_smaller_one_first(bounds):
  with pytest.raises(ValueError, match=r'bounds: must be \(lowest, highest\), got'):
    projections.as_bounds(bounds)
  with pytest.raises(ValueError, match='bounds'):
    projections.check_norm_and_bounds('l2', bounds)


def test_a_ball_cannot_be_changed():
  with pytest.raises(dataclasses.FrozenInstanceError):
    ball_about(np.zeros((1, 1)), 'l2', 0).radius = 1.0


def test_bounds_become_numbers_of_python():
  found = projections.as_bounds(np.float32([0.25, 2.0]))
  assert found == (0.25, 2.0) and [type(each) for each in found] == [float, float]
  projections.check_norm_and_bounds('l2', found)
  with pytest.raises(ValueError, match="norm must be one of linf, l2, got 'l1'"):
    projections.check_norm_and_bounds('l1', found)


def test_pixels_may_lie_at_the_bounds_and_not_beyond():
  def attacked(*pixels):
    x = jnp.asarray([pixels], jnp.float32)
    return attacks.fgsm(jnp.sum, jax.random.key(0), x, radius=0.1, bounds=(0.25, 0.5))

  for pixels in ((0.25, 0.3), (0.3, 0.5)):
    with pytest.raises(AssertionError, match='one value per example'):  # nothing else is wrong
      attacked(*pixels)
  for pixels in ((0.2, 0.3), (0.3, 0.6)):
    with pytest.raises(
      ValueError, match=r'x must lie in the bounds \(0.25, 0.5\), got values from'
    ):
      attacked(*pixels)


@pytest.mark.parametrize('name', ['pgd', 'apgd', 'fgsm', 'noise', 'square'])
def test_a_checked_attack_shows_its_own_name_arguments_and_documentation(name):
  attack = getattr(attacks, name)
  assert attack.__name__ == name and attack.__doc__
  assert 'radius' in inspect.signature(attack).parameters
