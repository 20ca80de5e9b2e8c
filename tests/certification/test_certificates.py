"""Values of certificates where they are known, and their gradients against finite differences."""

from __future__ import annotations

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import certification as cert
from tests import oracles
from tests.certification.test_bounds import METHODS, dense


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


def test_balls_are_cut_at_the_bounds_that_are_given():
  box = cert.ball(jnp.array([[1.5, 0.3]]), 0.1, bounds=(0.25, 1.55)).box
  np.testing.assert_allclose(box.lower, [[1.4, 0.25]], rtol=1e-6)
  np.testing.assert_allclose(box.upper, [[1.55, 0.4]], rtol=1e-6)


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
