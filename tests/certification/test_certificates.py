"""Values of certificates where they are known, and their gradients against finite differences."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import certification as cert
from se_vae.certification import linear_relaxation, rounding
from tests import oracles
from tests.certification.test_bounds import METHODS, dense


def test_interval_bounds_of_all_relus_need_no_coefficients():
  first, second = (
    cert.Dense(jnp.ones((7, 3)), jnp.ones(3)),
    cert.Dense(jnp.ones((3, 2)), jnp.ones(2)),
  )
  layers = (first, cert.ReLU(), second)
  assert linear_relaxation.num_coefficients(layers, (7,)) == 1
  # Two bounds of each of two outputs, whose coefficients are most at the inputs of the network.
  assert linear_relaxation.num_coefficients((*layers, cert.ReLU()), (7,)) == 2 * 2 * 7


def test_nothing_can_be_changed():
  """All of them are parts of programs, or keys of such."""
  layer = dense(np.random.default_rng(0), 2, 2)
  region = cert.ball(jnp.zeros((1, 2)), 0.1)
  encoder, box = cert.Encoder((layer,), layer, layer), cert.LatentBox(region.box, region.box)
  convolution = cert.Conv(jnp.zeros((3, 3, 1, 1)), jnp.zeros(1), (1, 1))
  linear = (layer, convolution, cert.ReLU(), cert.Flatten())
  for value in (*linear, encoder, box, region, region.box, cert.Method()):
    with pytest.raises(dataclasses.FrozenInstanceError):
      value.name = 1


def test_methods_are_named_as_they_are_shown():
  assert str(cert.Method('ibp')) == 'ibp'
  assert str(cert.Method('crown', slope_steps=5)) == 'crown, 5 slope steps'
  assert cert.Method().slope_steps == 0
  with pytest.raises(ValueError, match='name must be one of ibp, crown_ibp, crown'):
    cert.Method('alpha')
  for steps in (-1, 0.5):
    with pytest.raises(ValueError, match='slope_steps must be an integer >= 0'):
      cert.Method(slope_steps=steps)


@pytest.mark.parametrize('method', METHODS, ids=str)
@oracles.in_float64
def test_the_box_of_an_encoding_is_that_of_its_two_heads(method):
  rng = np.random.default_rng(1)
  first, mean, log_var = (dense(rng, *sizes, np.float64) for sizes in ((4, 6), (6, 2), (6, 2)))
  encoder = cert.Encoder((first, cert.ReLU()), mean, log_var)
  region = cert.ball(jnp.asarray(rng.uniform(size=(3, 4))), 0.1)
  found = jax.jit(lambda encoder: cert.latent_box(encoder, region, method))(encoder)
  for box, head in ((found.mean, mean), (found.log_var, log_var)):
    alone = cert.output_box((*encoder.trunk, head), region, method)
    np.testing.assert_allclose(box.lower, alone.lower, rtol=1e-12)
    np.testing.assert_allclose(box.upper, alone.upper, rtol=1e-12)
  probe = dense(rng, 2, 5, np.float64)
  assert encoder.means(probe) == (*encoder.trunk, mean, probe)


@oracles.in_float64
def test_the_latent_shift_of_a_box_is_that_of_its_worst_corner():
  box = cert.LatentBox(
    cert.Box(jnp.array([[-1.0, 2.0]]), jnp.array([[0.5, 4.0]])),
    cert.Box(jnp.array([[-3.0, -1.0]]), jnp.array([[0.2, 2.0]])),
  )
  found = cert.latent_shift(box, jnp.array([[0.0, 2.5]]), jnp.zeros((1, 2)))
  # The lower ends of the first mean and log-variance, and the upper ends of the second.
  expected = 1.0**2 + 1.5**2 + (1.0 - np.exp(-1.5)) ** 2 + (np.exp(1.0) - 1.0) ** 2
  assert expected <= found[0] < expected * (1.0 + 1e-10)


@oracles.in_float64
def test_the_latent_shift_has_room_for_its_rounding_and_for_little_more():
  unit = 1.12 * 2.0**-53  # of rounding in float64, with the margin of `rounding.gamma`

  def shift(mean, log_var):
    values = tuple(jnp.array([[value, value, value]]) for value in (mean, log_var))
    box = cert.LatentBox(*(cert.Box(value, value) for value in values))
    return float(cert.latent_shift(box, jnp.zeros((1, 3)), values[1])[0])

  # A shift of the means alone: 2 roundings for each latent, and 16.
  np.testing.assert_allclose((shift(2.0, -200.0) - 12.0) / 12.0, (2 * 3 + 16) * unit, rtol=0.05)
  # No shift at all, but two deviations of e, each of which may be wrong by 64 roundings.
  np.testing.assert_allclose(shift(0.0, 2.0), 3 * (64 * unit * 2 * np.e) ** 2, rtol=1e-9)


def test_balls_are_cut_at_the_bounds_that_are_given():
  box = cert.ball(jnp.array([[1.5, 0.3]]), 0.1, bounds=(0.25, 1.55)).box
  np.testing.assert_allclose(box.lower, [[1.4, 0.25]], rtol=1e-6)
  np.testing.assert_allclose(box.upper, [[1.55, 0.4]], rtol=1e-6)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_a_radius_that_is_wrong_makes_every_bound_nan(norm):
  radii = jnp.array([jnp.nan, jnp.inf, -0.1, 0.0])
  box = cert.ball(jnp.full((4, 2), 0.5), radii, norm=norm).box
  for ends in (box.lower, box.upper):
    np.testing.assert_array_equal(np.isnan(ends).all(axis=1), [True, True, True, False])


@pytest.mark.parametrize('x', [np.zeros((2, 3), np.int32), np.zeros((0, 3), np.float32)])
def test_inputs_that_are_no_floats_or_none_at_all_are_refused(x):
  with pytest.raises(AssertionError, match='x must be floats'):
    cert.ball(jnp.asarray(x), 0.1)


def test_the_error_of_a_long_sum_is_its_theorem_s():
  """n u / (1 - n u), and 12 percent."""
  errors = 800_000 * 2.0**-24
  found = rounding.gamma(800_000, jnp.float32)
  np.testing.assert_allclose(found, 1.12 * errors / (1.0 - errors), rtol=1e-12)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('method', METHODS, ids=str)
def test_nothing_is_certified_about_an_input_outside_the_bounds(method, norm):
  layers = (cert.Dense(jnp.array([[1.0, -1.0]]), jnp.array([0.3, 0.0])),)
  region = cert.ball(jnp.array([[0.5], [-0.5], [1.5], [jnp.nan]]), 0.1, norm=norm)
  found = cert.margins(layers, region, jnp.zeros(4, jnp.int32), method)
  np.testing.assert_allclose(found[0], 1.1, rtol=1e-5)  # 2 * 0.4 + 0.3, at the lower end
  assert np.isnan(found[1:]).all()


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.int8, jnp.uint8])
def test_labels_of_any_width_and_none_outside_the_classes(dtype):
  logits = np.arange(300.0, dtype=np.float32)[::-1].copy()
  logits[256] = 500.0
  layers = (cert.Dense(jnp.zeros((1, 300), jnp.float32), jnp.asarray(logits)),)
  region = cert.ball(jnp.full((2, 1), 0.5, jnp.float32), 0.1)
  found = cert.margins(layers, region, jnp.array([0, 100], dtype), cert.Method('ibp'))
  np.testing.assert_allclose(found, [299.0 - 500.0, 199.0 - 500.0], rtol=1e-3)
  layers = (cert.Dense(jnp.zeros((1, 3), jnp.float32), jnp.float32([-1.0, -2.0, -3.0])),)
  found = cert.margins(layers, region, jnp.array([3, 0], dtype), cert.Method('ibp'))
  assert np.isnan(found[0]) and 0.99 < found[1] <= 1.0
  with pytest.raises(TypeError, match='labels must be integers, got float32'):
    cert.margins(layers, region, jnp.zeros(2, jnp.float32))


def test_layers_of_another_dtype_are_refused():
  """The slack for rounding would be that of one of the two."""
  region = cert.ball(jnp.full((1, 2), 0.5, jnp.float32), 0.1)
  layers = (cert.Dense(jnp.eye(2, dtype=jnp.float16), jnp.zeros(2, jnp.float16)),)
  for bound in (cert.output_box, functools.partial(cert.margins, labels=jnp.zeros(1, jnp.int32))):
    with pytest.raises(TypeError, match='layers must have the dtype of the region, float32, got'):
      bound(layers, region)


@pytest.mark.parametrize('method', METHODS, ids=str)
@oracles.in_float64
def test_gradients_of_bounds_match_finite_differences(method):
  rng = np.random.default_rng(0)
  sizes = ((4, 6), (6, 5), (5, 3))
  first, second, third = (dense(rng, *size, np.float64) for size in sizes)
  region = cert.ball(jnp.asarray(rng.uniform(size=(2, 4))), 0.1)
  layers = (first, cert.ReLU(), second, cert.ReLU(), third)
  weights, unravel = jax.flatten_util.ravel_pytree(layers)

  def width(weights):
    box = cert.output_box(unravel(weights), region, method)
    return jnp.sum(box.upper - box.lower)

  along = rng.normal(size=weights.shape)
  slope = (width(weights + 1e-6 * along) - width(weights - 1e-6 * along)) / 2e-6
  np.testing.assert_allclose(jax.grad(width)(weights) @ along, slope, rtol=1e-6)
