"""What the formulas accept and refuse at the edges of their shapes."""

import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import gaussians, objectives, wasserstein
from se_vae.gaussians import DiagonalGaussian

X = jnp.zeros((2, 3))
Q = DiagonalGaussian(jnp.zeros((2, 4)), jnp.zeros((2, 4)))


def test_observations_of_one_pixel_need_no_axis_of_their_own():
  x = jnp.asarray([0.0, 1.0])
  value = objectives.gaussian_log_likelihood(x, jnp.zeros(2), 1.0)
  np.testing.assert_allclose(value, -0.5 * (np.square(x) + np.log(2.0 * np.pi)), rtol=1e-6)
  with pytest.raises(AssertionError, match='one shape'):
    objectives.gaussian_log_likelihood(x[0], x[0], 1.0)


def test_encodings_are_a_batch_as_long_as_the_images():
  deep, long = (DiagonalGaussian(*jnp.zeros((2, *shape))) for shape in ((2, 1, 4), (3, 4)))
  for q in (deep, long):
    with pytest.raises(AssertionError, match='needs means'):
      objectives.elbo(X, X, q, obs_var=1.0)


def test_settings_are_given_by_name():
  with pytest.raises(TypeError):
    objectives.elbo(X, X, Q, 1.0)
  with pytest.raises(TypeError):
    objectives.se_elbo(X, X, Q, Q, 1.0, 1.0)


def test_a_scalar_mean_is_refused():
  with pytest.raises(AssertionError):
    gaussians.check_moments(jnp.zeros(()), jnp.zeros((1, 1)))


@pytest.mark.parametrize('shape', [(2, 3), (3, 2)])
def test_covariances_that_are_not_square_are_refused(shape):
  with pytest.raises(AssertionError, match='square'):
    wasserstein.optimal_coupling_full(jnp.ones(shape), jnp.ones(shape))
