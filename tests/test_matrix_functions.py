"""Matrix functions against SciPy, and their derivatives against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from se_vae import matrix_functions
from tests import oracles
from tests.oracles import in_float64

# A symmetric eigenproblem of order 4 in float64: a few units of rounding times its size.
EXACT = {'rtol': 1e-11, 'atol': 1e-12}

sqrtm = oracles.quick_jit(matrix_functions.sqrtm)
polar_factor = oracles.quick_jit(matrix_functions.polar_factor)
hypotenuse = oracles.quick_jit(matrix_functions.hypotenuse)
solve_sylvester = oracles.quick_jit(matrix_functions.solve_sylvester)
sqrtm_jvp = oracles.quick_jit(lambda x, dx: jax.jvp(matrix_functions.sqrtm, (x,), (dx,)))


def covariances():
  """Positive definite matrices: generic, ill-conditioned, with equal eigenvalues, diagonal."""
  rng = np.random.default_rng(0)
  rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
  return {
    'generic': oracles.random_covariance(rng, 3),
    'condition 1e6': oracles.random_covariance(rng, 3, 1e6),
    'two equal eigenvalues': (rotation * [2.0, 2.0, 0.5]) @ rotation.T,
    'identity': np.eye(3),
    'diagonal': np.diag([0.1, 1.0, 4.0]),
  }


@pytest.mark.parametrize('name', covariances())
@in_float64
def test_square_root_is_scipys(name):
  matrix = covariances()[name]
  root = np.asarray(sqrtm(jnp.asarray(matrix)))
  np.testing.assert_allclose(root, scipy.linalg.sqrtm(matrix), **EXACT)
  np.testing.assert_allclose(root @ root, matrix, rtol=1e-11, atol=1e-11 * np.abs(matrix).max())
  np.testing.assert_allclose(root, root.T, **EXACT)
  assert np.linalg.eigvalsh(root).min() > 0.0


@in_float64
def test_square_root_derivative_solves_the_lyapunov_equation():
  rng = np.random.default_rng(1)
  matrix, tangent = oracles.random_covariance(rng, 4), rng.normal(size=(4, 4))
  tangent = tangent + tangent.T
  root = scipy.linalg.sqrtm(matrix)
  _, derivative = sqrtm_jvp(matrix, tangent)
  np.testing.assert_allclose(derivative, scipy.linalg.solve_sylvester(root, root, tangent), **EXACT)


@in_float64
def test_square_root_of_a_singular_matrix_is_right_and_its_gradient_finite():
  v = np.array([1.0, 2.0, 2.0])
  matrix = jnp.asarray(np.outer(v, v))
  # An eigenvalue that is zero up to rounding has a root of up to sqrt(9 eps) = 4e-8.
  np.testing.assert_allclose(sqrtm(matrix), np.outer(v, v) / 3.0, atol=1e-7)
  # Along the matrix itself, sqrt((1 + t) M) has derivative sqrt(M) / 2.
  _, derivative = sqrtm_jvp(matrix, matrix)
  np.testing.assert_allclose(derivative, np.outer(v, v) / 6.0, atol=1e-7)
  gradients = oracles.quick_jit(jax.grad(lambda m: jnp.sum(matrix_functions.sqrtm(m))))
  for psd in (matrix, jnp.zeros((3, 3))):
    gradient = gradients(psd)
    assert np.all(np.isfinite(gradient))
  np.testing.assert_array_equal(sqrtm(jnp.zeros((3, 3))), np.zeros((3, 3)))


@in_float64
def test_negative_eigenvalues_count_as_zero():
  root = sqrtm(jnp.asarray(np.diag([4.0, -1e-17])))
  np.testing.assert_allclose(root, np.diag([2.0, 0.0]), atol=1e-15)


@pytest.mark.parametrize('name', covariances())
@in_float64
def test_polar_factor_is_scipys(name):
  rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
  matrix = rotation @ covariances()[name]
  factor = np.asarray(polar_factor(jnp.asarray(matrix)))
  # 1e-10: a factor's error grows with the condition number, 1e6 at most here.
  np.testing.assert_allclose(factor, scipy.linalg.polar(matrix)[0], atol=1e-10)
  np.testing.assert_allclose(factor, rotation, atol=1e-10)


@in_float64
def test_polar_factor_of_a_singular_matrix_is_a_maximising_rotation():
  gradients = oracles.quick_jit(jax.grad(lambda m: jnp.sum(matrix_functions.polar_factor(m)[0])))
  for matrix in (np.outer([1.0, 2.0, 0.0], [0.0, 1.0, -1.0]), np.zeros((3, 3))):
    factor = np.asarray(polar_factor(jnp.asarray(matrix)))
    np.testing.assert_allclose(factor.T @ factor, np.eye(3), atol=1e-14)
    nuclear_norm = np.linalg.svd(matrix, compute_uv=False).sum()
    np.testing.assert_allclose(np.sum(factor * matrix), nuclear_norm, atol=1e-14)
    gradient = gradients(jnp.asarray(matrix))
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize('name', covariances())
@in_float64
def test_hypotenuse_is_scipys_root_of_one_plus_the_square(name):
  rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
  matrix = 3.0 * rotation @ covariances()[name]
  root = np.asarray(hypotenuse(jnp.asarray(matrix)))
  expected = scipy.linalg.sqrtm(np.eye(3) + matrix.T @ matrix)
  np.testing.assert_allclose(root, expected, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(root, root.T, **EXACT)
  identity = np.asarray(hypotenuse(jnp.zeros((3, 3))))
  np.testing.assert_allclose(identity, np.eye(3), **EXACT)


def test_hypotenuse_keeps_small_singular_values_in_float32():
  # Singular values 1e-2, 1 and 1e6: squared, the first two are lost against the last.
  rng = np.random.default_rng(7)
  left, right = (np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2))
  singular = np.array([1e6, 1.0, 1e-2])
  matrix = jnp.asarray((left * singular) @ right.T, jnp.float32)
  root = np.asarray(hypotenuse(matrix), float)
  assert np.linalg.eigvalsh(root).min() > 0.5  # 1 in truth, with an error of a few eps * 1e6


@in_float64
def test_sylvester_solution_is_scipys():
  rng = np.random.default_rng(3)
  psd, rhs = oracles.random_covariance(rng, 4), rng.normal(size=(4, 4))
  solution = solve_sylvester(jnp.asarray(psd), jnp.asarray(rhs))
  np.testing.assert_allclose(solution, scipy.linalg.solve_sylvester(psd, psd, rhs), **EXACT)


@in_float64
def test_sylvester_solution_of_a_singular_equation_has_the_least_norm():
  rng = np.random.default_rng(4)
  rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
  psd = (rotation * [2.0, 0.0, 0.0]) @ rotation.T
  rhs = rng.normal(size=(3, 3))
  operator = np.kron(psd, np.eye(3)) + np.kron(np.eye(3), psd)
  # The pseudo-inverse with our threshold: eigenvalues of the operator are 0, 2 and 4.
  expected = (np.linalg.pinv(operator, rcond=1e-10) @ rhs.ravel()).reshape(3, 3)
  solution = solve_sylvester(jnp.asarray(psd), jnp.asarray(rhs))
  np.testing.assert_allclose(solution, expected, atol=1e-12)
  zero = solve_sylvester(jnp.zeros((3, 3)), jnp.asarray(rhs))
  np.testing.assert_array_equal(zero, np.zeros((3, 3)))


@in_float64
def test_first_and_second_derivatives_match_finite_differences():
  rng = np.random.default_rng(5)
  rhs, rotation = rng.normal(size=(3, 3)), np.linalg.qr(rng.normal(size=(3, 3)))[0]

  def every_function(psd, rhs):
    symmetric = 0.5 * (psd + matrix_functions.transpose(psd))
    return (
      matrix_functions.sqrtm(psd),
      matrix_functions.polar_factor(rotation @ psd),
      matrix_functions.hypotenuse(rotation @ psd),
      matrix_functions.solve_sylvester(symmetric, rhs),  # in its domain: symmetric matrices
    )

  check = oracles.DerivativeCheck(every_function, (covariances()['generic'], rhs))
  for name in ('generic', 'two equal eigenvalues', 'identity', 'diagonal'):
    check(covariances()[name], rhs)


@in_float64
def test_third_derivatives_exist_at_equal_eigenvalues():
  # sqrt(1 + t) has derivatives 1/2, -1/4, 3/8 at t = 0; along the identity sqrtm is that, times I.
  def along_identity(t):
    return matrix_functions.sqrtm((1.0 + t) * jnp.eye(2))[0, 0]

  third = oracles.quick_jit(jax.jacfwd(jax.jacfwd(jax.grad(along_identity))))(0.0)
  np.testing.assert_allclose(third, 3.0 / 8.0, rtol=1e-12)


@in_float64
def test_batches_of_several_axes_are_loops():
  rng = np.random.default_rng(6)
  psd = oracles.batch_of([oracles.random_covariance(rng, 4) for _ in range(6)])
  rhs = rng.normal(size=(2, 3, 4, 4))

  def every_function(psd, rhs):
    return {
      'sqrtm': matrix_functions.sqrtm(psd),
      'polar_factor': matrix_functions.polar_factor(rhs),
      'hypotenuse': matrix_functions.hypotenuse(rhs),
      'solve_sylvester': matrix_functions.solve_sylvester(psd, rhs),
      'transpose': matrix_functions.transpose(rhs),
    }

  oracles.assert_batches_are_loops(every_function, psd, rhs)
  np.testing.assert_array_equal(matrix_functions.transpose(rhs)[1, 2], rhs[1, 2].T)


def test_non_square_matrices_are_refused():
  for jit in (False, True):
    wrap = jax.jit if jit else lambda function: function
    with pytest.raises((ValueError, TypeError)):
      wrap(matrix_functions.sqrtm)(np.zeros((2, 3), np.float32))
