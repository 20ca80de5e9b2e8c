"""Slow float64 references for the mathematics tests, and the inputs they share.

Nothing here repeats the library's formulas: the references integrate, sample, minimise or run a
general solver, or evaluate the paper's own expression in extended precision.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import ot
import scipy.linalg
import scipy.optimize
import scipy.special
import scipy.stats

from se_vae import gaussians

# x86's long double carries 19 digits, enough for the cancellations in the paper's expressions.
LONG = np.longdouble


def in_float64(test):
  """Runs a test with 64-bit types enabled; put it innermost, under `given` and `parametrize`."""

  @functools.wraps(test)
  def wrapper(*args, **kwargs):
    with jax.enable_x64(True):
      return test(*args, **kwargs)

  return wrapper


def quick_jit(function, **options):
  """`jax.jit` without LLVM's optimisations: a third less to compile, which is most of a test."""
  return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0}, **options)


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


class Moments(NamedTuple):
  """A Gaussian by its moments, float64 NumPy: mean `[D]`, cov `[D, D]`."""

  mean: np.ndarray
  cov: np.ndarray


def random_covariance(rng, dim: int, condition: float = 10.0) -> np.ndarray:
  """A dense covariance of a given condition number and unit geometric-mean eigenvalue."""
  if dim == 1:
    return np.exp(rng.normal(size=(1, 1)))
  rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
  return (rotation * condition ** np.linspace(-0.5, 0.5, dim)) @ rotation.T


def random_moments(rng, dim: int, condition: float = 10.0) -> Moments:
  return Moments(rng.normal(size=dim), random_covariance(rng, dim, condition))


def random_diagonal_moments(rng, dim: int) -> Moments:
  return Moments(rng.normal(size=dim), np.diag(np.exp(rng.normal(size=dim))))


def diagonal(p: Moments, dtype=jnp.float64) -> gaussians.DiagonalGaussian:
  """The library's factorised Gaussian with these moments (off-diagonal covariances ignored)."""
  return gaussians.DiagonalGaussian(
    jnp.asarray(p.mean, dtype), jnp.asarray(np.log(np.diagonal(p.cov, axis1=-2, axis2=-1)), dtype)
  )


def full(p: Moments, dtype=jnp.float64) -> gaussians.FullGaussian:
  """The library's full-covariance Gaussian with these moments."""
  return gaussians.FullGaussian(
    jnp.asarray(p.mean, dtype), jnp.asarray(np.linalg.cholesky(p.cov), dtype)
  )


def family(name: str, rng, dim: int):
  """Moments and the library's Gaussian of the named family."""
  if name == 'diagonal':
    p = random_diagonal_moments(rng, dim)
    return p, diagonal(p)
  p = random_moments(rng, dim)
  return p, full(p)


def batch_of(items, shape=(2, 3)):
  """Pytrees of one structure as a single one with several batch axes."""
  return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(*shape, *leaves[0].shape), *items)


def assert_batches_are_loops(function, *batches):
  """Asserts that `function` does to batches `[2, 3, ...]`, whole and mapped, what a loop does.

  The last axes should have other lengths than the batch axes, so that none passes for another.
  """

  def three_ways(*batches):
    flat = jax.tree.map(lambda leaf: leaf.reshape(6, *leaf.shape[2:]), batches)
    loop = jax.lax.map(lambda one: function(*one), flat)
    loop = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), loop)
    return loop, function(*batches), jax.vmap(jax.vmap(function))(*batches)

  loop, *others = quick_jit(three_ways)(*batches)
  for other in others:
    # Rounding: batched or not, LAPACK sees one matrix at a time, but products are summed otherwise.
    jax.tree_util.tree_map_with_path(
      lambda path, expected, actual: np.testing.assert_allclose(
        actual, expected, rtol=1e-11, atol=1e-11, err_msg=jax.tree_util.keystr(path)
      ),
      loop,
      other,
    )


# ---------------------------------------------------------------------------------------------
# Derivatives
# ---------------------------------------------------------------------------------------------


class DerivativeCheck:
  """First and second derivatives of a function, in both modes, against finite differences.

  What `jax.test_util.check_grads` does along one random direction, this does for the whole
  gradient and Hessian of a random projection of the outputs, and compiles once for many points.
  """

  def __init__(self, function, example):
    """Compiles for `function(*arguments)` with arguments like `example`, a tuple of pytrees."""
    flat, self._unravel = jax.flatten_util.ravel_pytree(example)
    shape = jax.eval_shape(lambda x: jax.flatten_util.ravel_pytree(function(*x))[0], example).shape
    weights = jnp.asarray(np.random.default_rng(0).uniform(1.0, 2.0, shape), flat.dtype)

    def projected(x):
      return weights @ jax.flatten_util.ravel_pytree(function(*self._unravel(x)))[0]

    # Along a direction: the value's tangent is its derivative by forward mode, the gradient's is
    # the Hessian's column. All from one program, since compiling is most of the check.
    value_and_grad = jax.value_and_grad(projected)
    self._at = quick_jit(lambda x, along: jax.jvp(value_and_grad, (x,), (along,)))

  def __call__(self, *arguments, step: float = 3e-4, rtol: float = 1e-6):
    """Asserts agreement to `rtol` of the largest entry.

    The fourth-order stencil errs by step^4 (1e-14) times a fifth derivative, plus 1e-16 / step
    (1e-12) times the value: `rtol` leaves room for derivatives that grow by 10 from one order to
    the next, and a wrong factor or sign is off by one.
    """
    x = np.asarray(jax.flatten_util.ravel_pytree(arguments)[0])
    forward, hessian, first, second = [], [], [], []
    for along in np.eye(len(x)):
      (_, gradient), (slope, column) = self._at(x, along)
      forward.append(slope)
      hessian.append(column)
      stencil = [self._at(x + k * step * along, along)[0] for k in (-2, -1, 1, 2)]
      weights = np.array([1.0, -8.0, 8.0, -1.0]) / (12.0 * step)
      first.append(weights @ np.stack([value for value, _ in stencil]))
      second.append(weights @ np.stack([gradient for _, gradient in stencil]))
    for actual, expected in ((gradient, first), (forward, first), (hessian, second)):
      scale = max(1.0, np.abs(expected).max())
      np.testing.assert_allclose(actual, expected, rtol=0.0, atol=rtol * scale)


# ---------------------------------------------------------------------------------------------
# Densities
# ---------------------------------------------------------------------------------------------


def log_density(p: Moments, z: np.ndarray) -> np.ndarray:
  return scipy.stats.multivariate_normal(p.mean, p.cov).logpdf(z)


def gauss_hermite(dim: int, order: int) -> tuple[np.ndarray, np.ndarray]:
  """Points `[order**dim, dim]` and weights for expectations under N(0, I)."""
  points, weights = np.polynomial.hermite_e.hermegauss(order)
  weights = weights / weights.sum()
  points = np.stack(np.meshgrid(*[points] * dim, indexing='ij'), -1).reshape(-1, dim)
  weights = functools.reduce(np.multiply.outer, [weights] * dim).reshape(-1)
  return points, weights


def expectation(p: Moments, function, order: int = 20) -> float:
  """E_{z ~ p} function(z) by Gauss-Hermite quadrature; exact for polynomials below 2 * order."""
  points, weights = gauss_hermite(len(p.mean), order)
  return weights @ function(p.mean + points @ np.linalg.cholesky(p.cov).T)


def entropy(p: Moments) -> float:
  return -expectation(p, lambda z: log_density(p, z))


def kl_divergence(p: Moments, q: Moments) -> float:
  return expectation(p, lambda z: log_density(p, z) - log_density(q, z))


def standard_normal(dim: int) -> Moments:
  return Moments(np.zeros(dim), np.eye(dim))


# ---------------------------------------------------------------------------------------------
# Entropic transport
# ---------------------------------------------------------------------------------------------


class EntropicPlan(NamedTuple):
  """What minimises Eq. 13: its value, E||z_a - z_b||^2 and Cov(z_a, z_b)."""

  cost: float
  squared_distance: float
  cross_covariance: np.ndarray


def _grid(p: Moments, spacing: float) -> tuple[np.ndarray, np.ndarray, float]:
  """Points, masses and the volume of a cell of a regular grid that covers p to 7 deviations."""
  axes = []
  for mean, var in zip(p.mean, np.diag(p.cov), strict=True):
    half = np.ceil(7.0 * np.sqrt(var) / spacing)
    axes.append(mean + spacing * np.arange(-half, half + 1))
  points = np.stack(np.meshgrid(*axes, indexing='ij'), -1).reshape(-1, len(p.mean))
  cell = spacing ** len(p.mean)
  masses = cell * np.exp(log_density(p, points))
  return points, masses / masses.sum(), cell


def sinkhorn(p_a: Moments, p_b: Moments, gamma: float, spacing: float) -> EntropicPlan:
  """Minimises Eq. 13 over *all* couplings of two gridded Gaussians with POT's Sinkhorn solver.

  POT minimises <P, C> + reg sum P log P, so Eq. 13 has C the squared distance and reg = 2 / gamma;
  a density is a mass over its cell, which shifts the entropy by the log-volumes of the cells.
  The rectangle rule is exponentially accurate for Gaussians: the error is about
  exp(-2 pi^2 s^2 / spacing^2) with s^2 the least conditional variance of the plan.
  """
  z_a, mass_a, cell_a = _grid(p_a, spacing)
  z_b, mass_b, cell_b = _grid(p_b, spacing)
  distance = ot.dist(z_a, z_b, metric='sqeuclidean')
  plan = ot.sinkhorn(mass_a, mass_b, distance, reg=2.0 / gamma, numItermax=5000, stopThr=1e-13)
  squared_distance = np.sum(plan * distance)
  entropy = np.sum(scipy.special.entr(plan)) + np.log(cell_a) + np.log(cell_b)
  cross = (z_a - mass_a @ z_a).T @ plan @ (z_b - mass_b @ z_b)
  return EntropicPlan(0.5 * gamma * squared_distance - entropy, squared_distance, cross)


def joint_covariance(p_a: Moments, p_b: Moments, cross: np.ndarray) -> np.ndarray:
  return np.block([[p_a.cov, cross], [cross.T, p_b.cov]])


def coupling_cost(p_a: Moments, p_b: Moments, cross: np.ndarray, gamma: float) -> EntropicPlan:
  """Eq. 13 at the Gaussian coupling with this cross-covariance, from the joint distribution."""
  joint = joint_covariance(p_a, p_b, cross)
  mean = np.concatenate([p_a.mean, p_b.mean])
  dim = len(p_a.mean)
  difference = np.hstack([np.eye(dim), -np.eye(dim)])  # z_a - z_b, as a linear map
  squared = np.trace(difference @ (joint + np.outer(mean, mean)) @ difference.T)
  entropy = scipy.stats.multivariate_normal(mean, joint).entropy()
  return EntropicPlan(0.5 * gamma * squared - entropy, squared, cross)


def feasible_cross_covariance(p_a: Moments, p_b: Moments, free: np.ndarray) -> np.ndarray:
  """A K B^T with K of spectral norm < 1, for any real `free`: every strictly feasible Psi."""
  left, singular, right = np.linalg.svd(free)
  contraction = (left * (singular / np.sqrt(1.0 + singular**2))) @ right
  return np.linalg.cholesky(p_a.cov) @ contraction @ np.linalg.cholesky(p_b.cov).T


def minimise_coupling(p_a: Moments, p_b: Moments, gamma: float) -> EntropicPlan:
  """Minimises Eq. 13 over all Gaussian couplings with a general-purpose optimiser."""
  dim = len(p_a.mean)

  def cross(free):
    return feasible_cross_covariance(p_a, p_b, free.reshape(dim, dim))

  def objective(free):
    return coupling_cost(p_a, p_b, cross(free), gamma).cost

  start = 0.1 * np.eye(dim).ravel()
  found = scipy.optimize.minimize(
    objective, start, jac='3-point', method='BFGS', options={'gtol': 1e-8}
  )
  return coupling_cost(p_a, p_b, cross(found.x), gamma)


def paper_scalar_cost(mean_a, log_var_a, mean_b, log_var_b, gamma) -> np.ndarray:
  """Sec. 6's WD for one dimension, as printed, elementwise in extended precision."""
  mean_a, log_var_a, mean_b, log_var_b, gamma = (
    np.asarray(x, LONG) for x in (mean_a, log_var_a, mean_b, log_var_b, gamma)
  )
  var_a, var_b = np.exp(log_var_a), np.exp(log_var_b)
  u = np.sqrt(1 + 4 * gamma**2 * var_b * var_a)
  return (
    gamma / 2 * ((mean_a - mean_b) ** 2 + var_a + var_b)
    - ((u - 1) - np.log(u + 1) + np.log(2 * var_b * var_a)) / 2
    - np.log(2 * LONG(np.pi))
    - 1
  )


def cost_of_half_a_unit(log_var_a, log_var_b, gamma) -> np.ndarray:
  """What half a unit in the last place of a float32 log-variance changes the scalar cost by."""
  cost = paper_scalar_cost(0.0, log_var_a, 0.0, log_var_b, gamma)
  half_a, half_b = (np.spacing(np.abs(v)).astype(LONG) / 2 for v in (log_var_a, log_var_b))
  moved = (
    paper_scalar_cost(0.0, log_var_a + half_a, 0.0, log_var_b, gamma),
    paper_scalar_cost(0.0, log_var_a, 0.0, log_var_b + half_b, gamma),
  )
  return np.max(np.abs(np.stack(moved) - cost), axis=0)


def paper_scalar_coupling(var_a, var_b, gamma) -> np.ndarray:
  """Eq. 24's psi, elementwise in extended precision."""
  var_a, var_b, gamma = (np.asarray(x, LONG) for x in (var_a, var_b, gamma))
  return (np.sqrt(1 + 4 * gamma**2 * var_a * var_b) - 1) / (2 * gamma)


def riccati_solution(cov_a: np.ndarray, cov_b: np.ndarray, gamma: float) -> np.ndarray:
  """Eq. 18's solution 1/2 A (4 A S_b A + gamma^-2 I)^(1/2) A^-1 - I / (2 gamma), A = S_a^(1/2)."""
  a = scipy.linalg.sqrtm(cov_a)
  identity = np.eye(len(cov_a))
  root = scipy.linalg.sqrtm(4.0 * a @ cov_b @ a + identity / gamma**2)
  return 0.5 * a @ root @ np.linalg.inv(a) - identity / (2.0 * gamma)


# ---------------------------------------------------------------------------------------------
# Optimal transport
# ---------------------------------------------------------------------------------------------


def squared_w2(p_a: Moments, p_b: Moments) -> float:
  """POT's formula for two Gaussians."""
  return ot.gaussian.bures_wasserstein_distance(p_a.mean, p_b.mean, p_a.cov, p_b.cov) ** 2


def squared_w2_by_quantiles(p_a: Moments, p_b: Moments) -> float:
  """One dimension: the integral of the squared difference of the two quantile functions."""

  def squared_difference(z):
    u = scipy.stats.norm.cdf(z[:, 0])
    quantiles = [scipy.stats.norm.ppf(u, p.mean[0], np.sqrt(p.cov[0, 0])) for p in (p_a, p_b)]
    return (quantiles[0] - quantiles[1]) ** 2

  return expectation(standard_normal(1), squared_difference, order=20)


def discrete_w2(samples_a: np.ndarray, samples_b: np.ndarray) -> float:
  """W2 (not squared) between two clouds of points, by linear programming."""
  return np.sqrt(ot.emd2([], [], ot.dist(samples_a, samples_b, metric='sqeuclidean')))


def paper_optimal_cross_covariance(cov_a: np.ndarray, cov_b: np.ndarray) -> np.ndarray:
  """Eq. 11's Psi, as printed."""
  b = scipy.linalg.sqrtm(cov_b)
  return cov_a @ b @ np.linalg.inv(scipy.linalg.sqrtm(b @ cov_a @ b)) @ b


# ---------------------------------------------------------------------------------------------
# The linear-Gaussian model x = W z_a + noise, where the bound of Eq. 5-7 can be exact
# ---------------------------------------------------------------------------------------------


class LinearModel(NamedTuple):
  """p(x | z_a) = N(W z_a, v I) under the paired prior of Eq. 2-3, or the balanced one."""

  weights: np.ndarray
  obs_var: float
  gamma: float
  coupling: str = 'paper'

  def prior(self) -> Moments:
    """The paired prior of (z_a, z_b): two standard normals and exp(-gamma/2 ||z_a - z_b||^2).

    The balanced one has the standard normal as marginals, and the correlation that is the root of
    gamma (1 - rho^2) = rho.
    """
    dim = self.weights.shape[1]
    if self.coupling == 'balanced':
      rho = max(np.roots([self.gamma, 1.0, -self.gamma])) if self.gamma else 0.0
      return Moments(np.zeros(2 * dim), np.kron([[1.0, rho], [rho, 1.0]], np.eye(dim)))
    coupling = self.gamma * np.kron([[1.0, -1.0], [-1.0, 1.0]], np.eye(dim))
    return Moments(np.zeros(2 * dim), np.linalg.inv(np.eye(2 * dim) + coupling))

  def log_marginal(self, x: np.ndarray) -> float:
    """log p~(x)."""
    dim = self.weights.shape[1]
    cov = self.weights @ self.prior().cov[:dim, :dim] @ self.weights.T
    return log_density(Moments(np.zeros(len(x)), cov + self.obs_var * np.eye(len(x))), x)

  def posterior(self, x: np.ndarray) -> Moments:
    """p~(z_a, z_b | x)."""
    dim = self.weights.shape[1]
    lift = np.hstack([self.weights, np.zeros_like(self.weights)])
    cov = np.linalg.inv(np.linalg.inv(self.prior().cov) + lift.T @ lift / self.obs_var)
    cov = 0.5 * (cov + cov.T)
    assert cov.shape == (2 * dim, 2 * dim)
    return Moments(cov @ lift.T @ x / self.obs_var, cov)

  def expected_log_likelihood(self, p_a: Moments, x: np.ndarray) -> float:
    """E_{z ~ p_a} log p(x | z): a quadratic in z, so quadrature of order 2 is exact."""
    noise = Moments(np.zeros(len(x)), self.obs_var * np.eye(len(x)))
    return expectation(p_a, lambda z: log_density(noise, x - z @ self.weights.T), order=2)
