"""What the objectives accept and refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import objectives
from se_vae.gaussians import DiagonalGaussian, FullGaussian
from tests.oracles import in_float64

X = np.zeros((4, 3), np.float32)
Q = DiagonalGaussian(np.zeros((4, 2), np.float32), np.zeros((4, 2), np.float32))


def with_batch(num_examples, dim=2):
  zeros = np.zeros((num_examples, dim), np.float32)
  return DiagonalGaussian(zeros, zeros)


def test_numbers_out_of_range_are_refused():
  for obs_var in (0.0, -1.0, np.nan, np.inf, jnp.float32(0.0)):
    for function in (
      lambda v: objectives.gaussian_log_likelihood(X, X, v),
      lambda v: objectives.elbo(X, X, Q, obs_var=v),
      lambda v: objectives.se_elbo(X, X, Q, Q, gamma=1.0, obs_var=v),
    ):
      with pytest.raises(ValueError, match='obs_var must be finite and > 0'):
        function(obs_var)
  for gamma in (-1.0, np.nan, np.inf):
    with pytest.raises(ValueError, match='gamma must be finite and >= 0'):
      objectives.se_elbo(X, X, Q, Q, gamma=gamma, obs_var=1.0)
    with pytest.raises(ValueError, match='gamma must be finite and >= 0'):
      objectives.log_normalizer(gamma, 2)


def test_a_temperature_out_of_range_is_refused():
  for temperature in (0.0, -1.0, np.nan):
    with pytest.raises(ValueError, match='temperature must be finite and > 0'):
      objectives.info_nce(X, X, positives=np.arange(4), temperature=temperature)
  with pytest.raises(AssertionError, match='temperature must be a scalar'):
    objectives.info_nce(X, X, positives=np.arange(4), temperature=np.ones(4))


def test_the_squared_error_is_of_floats_of_one_shape():
  with pytest.raises(AssertionError, match='must have one shape'):
    objectives.squared_error(X, X.T)
  with pytest.raises(AssertionError, match='x must be floating point, got uint8'):
    objectives.squared_error(X.astype(np.uint8), X)


@pytest.mark.parametrize('jit', (False, True))
def test_shapes_that_do_not_fit_are_refused(jit):
  wrap = (lambda f: jax.jit(lambda *x: f(*x))) if jit else (lambda f: f)
  likelihood = wrap(functools.partial(objectives.gaussian_log_likelihood, obs_var=1.0))
  plain = wrap(functools.partial(objectives.elbo, obs_var=1.0))
  smooth = wrap(functools.partial(objectives.se_elbo, gamma=1.0, obs_var=1.0))
  for x_mean in (X[:1], X[:, :1], X[..., None], X[0]):
    with pytest.raises(AssertionError, match='x and x_mean must have one shape'):
      likelihood(X, x_mean)
    with pytest.raises(AssertionError, match='x and x_mean must have one shape'):
      plain(X, x_mean, Q)
    with pytest.raises(AssertionError, match='x and x_mean must have one shape'):
      smooth(X, x_mean, Q, Q)
  unbatched = DiagonalGaussian(np.zeros(4, np.float32), np.zeros(4, np.float32))
  for bad in (with_batch(1), with_batch(3), unbatched):
    with pytest.raises(AssertionError, match=r'^q(_a)? needs means \[\d+, D\]'):
      plain(X, X, bad)
    with pytest.raises(AssertionError, match=r'^q(_a)? needs means \[\d+, D\]'):
      smooth(X, X, bad, bad)
  for bad in (with_batch(1), with_batch(4, 3)):
    with pytest.raises(AssertionError, match='must have one shape'):
      smooth(X, X, Q, bad)
  dense = FullGaussian(np.zeros((4, 2), np.float32), np.zeros((4, 2, 2), np.float32))
  with pytest.raises(TypeError, match='must be of one family'):
    smooth(X, X, Q, dense)
  vector = np.ones(4, np.float32)
  with pytest.raises(AssertionError, match='obs_var must be a scalar'):
    wrap(lambda v: objectives.gaussian_log_likelihood(X, X, v))(vector)
  with pytest.raises(AssertionError, match='gamma must be a scalar'):
    wrap(lambda g: objectives.se_elbo(X, X, Q, Q, gamma=g, obs_var=1.0))(vector)
  with pytest.raises(AssertionError, match='gamma must be a scalar'):
    wrap(lambda g: objectives.log_normalizer(g, 2))(vector)
  with pytest.raises(AssertionError, match='Gaussian needs mean'):
    plain(X, X, DiagonalGaussian(Q.mean, Q.log_var[:, :1]))


def test_a_negative_dimension_is_refused():
  with pytest.raises(ValueError, match='dim must be >= 0, got -1'):
    objectives.log_normalizer(1.0, -1)
  assert objectives.log_normalizer(1.0, 0) == 0.0


def test_log_normalizer_has_a_gradient_at_gamma_zero():
  gradient = jax.grad(lambda g: objectives.log_normalizer(g, 3))(0.0)
  assert float(gradient) == -3.0  # minus half the expected squared distance, 2 D, of the priors


@in_float64
def test_float32_stays_float32_where_float64_is_the_default():
  x, q = jnp.zeros((2, 3), jnp.float32), DiagonalGaussian(*jnp.zeros((2, 2, 4), jnp.float32))
  for gamma in (1, 1.0, np.float64(1.0), jnp.float64(1.0)):
    terms = jax.eval_shape(lambda g=gamma: objectives.se_elbo(x, x, q, q, gamma=g, obs_var=0.1))
    assert {term.dtype for term in terms} == {jnp.dtype(jnp.float32)}


def test_observations_of_one_pixel_need_no_axis_of_their_own():
  x = jnp.asarray([0.0, 1.0])
  value = objectives.gaussian_log_likelihood(x, jnp.zeros(2), 1.0)
  np.testing.assert_allclose(value, -0.5 * (np.square(x) + np.log(2.0 * np.pi)), rtol=1e-6)
  with pytest.raises(AssertionError, match='one shape'):
    objectives.gaussian_log_likelihood(x[0], x[0], 1.0)


def test_encodings_are_a_batch_as_long_as_the_images():
  deep, long = (DiagonalGaussian(*jnp.zeros((2, *shape))) for shape in ((4, 1, 2), (5, 2)))
  for q in (deep, long):
    with pytest.raises(AssertionError, match='needs means'):
      objectives.elbo(X, X, q, obs_var=1.0)


def test_settings_are_given_by_name():
  with pytest.raises(TypeError):
    objectives.elbo(X, X, Q, 1.0)
  with pytest.raises(TypeError):
    objectives.se_elbo(X, X, Q, Q, 1.0, 1.0)
