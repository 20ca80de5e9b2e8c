"""Gaussian encodings: densities, entropies, divergences and samples (paper Sec. 1 and Eq. 8).

Two families share one interface. `DiagonalGaussian` is the factorised encoder of the paper's
Sec. 6. `FullGaussian` has a dense covariance, stored as a Cholesky factor. The last axis of a mean
is the latent dimension D and all axes before it are batch axes: functions return one value for each
Gaussian of the batch, of shape `[...]`. Densities, entropies and divergences are in nats.

All functions raise AssertionError where shapes do not fit or arrays are not floating point, also
under `jit`; nothing is broadcast.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import chex
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

LOG_2PI = math.log(2.0 * math.pi)
_SERIES_ORDER = 18  # 1/18! is below the resolution of float64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalGaussian:
  """The factorised Gaussian N(mean, diag(exp(log_var))), batched over the leading axes.

  Example:
    >>> q = DiagonalGaussian(jnp.zeros((4, 2)), jnp.zeros((4, 2)))
    >>> q.dim, q.sample(jax.random.key(0)).shape, float(q.log_det()[0])
    (2, (4, 2), 0.0)

  Attributes:
    mean: `[..., D]`, in latent units.
    log_var: `[..., D]`, logarithms of the variances.
  """

  mean: jax.Array
  log_var: jax.Array

  @property
  def dim(self) -> int:
    """The latent dimension D."""
    return self.mean.shape[-1]

  @property
  def var(self) -> jax.Array:
    """The variances, `[..., D]`."""
    return jnp.exp(self.log_var)

  @property
  def stddev(self) -> jax.Array:
    """The standard deviations, `[..., D]`."""
    return jnp.exp(0.5 * self.log_var)

  def sample(self, key: jax.Array) -> jax.Array:
    """Draws the reparameterised sample `mean + stddev * noise`, `[..., D]`."""
    check_gaussian(self)
    return self.mean + self.stddev * jax.random.normal(key, self.mean.shape, self.mean.dtype)

  def log_prob(self, z: jax.Array) -> jax.Array:
    """Returns the log-density at `z` `[..., D]`, in nats, `[...]`."""
    check_gaussian(self)
    chex.assert_equal_shape([self.mean, z])
    check_floating(z=z)
    whitened = (z - self.mean) * jnp.exp(-0.5 * self.log_var)
    return -0.5 * jnp.sum(whitened**2 + self.log_var + LOG_2PI, axis=-1)

  def log_det(self) -> jax.Array:
    """Returns the log-determinant of the covariance, `[...]`."""
    return jnp.sum(self.log_var, axis=-1)

  def trace(self) -> jax.Array:
    """Returns the trace of the covariance, `[...]`."""
    return jnp.sum(self.var, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullGaussian:
  """The Gaussian N(mean, scale_tril @ scale_tril^T), batched over the leading axes.

  Attributes:
    mean: `[..., D]`, in latent units.
    scale_tril: `[..., D, D]`, Cholesky factor of the covariance: lower triangular with a positive
      diagonal. The entries above the diagonal must be zero; this is not checked.
  """

  mean: jax.Array
  scale_tril: jax.Array

  @classmethod
  def from_covariance(cls, mean: jax.Array, cov: jax.Array) -> FullGaussian:
    """Returns the Gaussian with mean `[..., D]` and positive definite covariance `[..., D, D]`."""
    check_moments(mean, cov)
    return cls(mean, jnp.linalg.cholesky(cov))

  @property
  def dim(self) -> int:
    """The latent dimension D."""
    return self.mean.shape[-1]

  @property
  def cov(self) -> jax.Array:
    """The covariances, `[..., D, D]`."""
    return self.scale_tril @ jnp.swapaxes(self.scale_tril, -1, -2)

  def sample(self, key: jax.Array) -> jax.Array:
    """Draws the reparameterised sample `mean + scale_tril @ noise`, `[..., D]`."""
    check_gaussian(self)
    noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
    return self.mean + (self.scale_tril @ noise[..., None])[..., 0]

  def log_prob(self, z: jax.Array) -> jax.Array:
    """Returns the log-density at `z` `[..., D]`, in nats, `[...]`."""
    check_gaussian(self)
    chex.assert_equal_shape([self.mean, z])
    check_floating(z=z)
    whitened = _solve_tril(self.scale_tril, (z - self.mean)[..., None])[..., 0]
    return -0.5 * (jnp.sum(whitened**2, axis=-1) + self.log_det() + self.dim * LOG_2PI)

  def log_det(self) -> jax.Array:
    """Returns the log-determinant of the covariance, `[...]`."""
    diagonal = jnp.diagonal(self.scale_tril, axis1=-2, axis2=-1)
    return 2.0 * jnp.sum(jnp.log(diagonal), axis=-1)

  def trace(self) -> jax.Array:
    """Returns the trace of the covariance, `[...]`."""
    return jnp.sum(self.scale_tril**2, axis=(-2, -1))


Gaussian: TypeAlias = DiagonalGaussian | FullGaussian


def sample_each(q: Gaussian, keys: jax.Array) -> jax.Array:
  """Draws one sample `[B, D]` for a batch of B Gaussians, each with its own key.

  Each sample depends on its own key and Gaussian only. In `q.sample(key)`, which draws for the
  whole batch at once, it depends on the batch size too.

  Args:
    q: Gaussians with means `[B, D]`.
    keys: PRNG keys `[B]`.
  """
  return jax.vmap(lambda one, key: one.sample(key))(q, keys)


def entropy(q: Gaussian) -> jax.Array:
  """Returns the differential entropy H[q], in nats, `[...]` (the Gaussian case of Eq. 15).

  Example:
    >>> print(entropy(DiagonalGaussian(jnp.zeros((1, 2)), jnp.full((1, 2), -LOG_2PI - 1.0))))
    [0.]
  """
  check_gaussian(q)
  return 0.5 * (q.log_det() + q.dim * (LOG_2PI + 1.0))


def kl_divergence(q_a: Gaussian, q_b: Gaussian) -> jax.Array:
  """Returns KL(q_a || q_b) >= 0 of two Gaussians of one family, in nats, `[...]` (Eq. 8).

  Example:
    >>> q_a = DiagonalGaussian(jnp.full((1, 2), 3.0), jnp.zeros((1, 2)))
    >>> q_b = DiagonalGaussian(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    >>> print(kl_divergence(q_a, q_b))  # half the squared distance of the means
    [9.]

  Raises:
    AssertionError: if shapes differ.
    TypeError: if the families differ.
  """
  check_pair(q_a, q_b)
  if isinstance(q_a, DiagonalGaussian) and isinstance(q_b, DiagonalGaussian):
    log_ratio = q_a.log_var - q_b.log_var
    mahalanobis = ((q_a.mean - q_b.mean) * jnp.exp(-0.5 * q_b.log_var)) ** 2
    return 0.5 * jnp.sum(exp_remainder(log_ratio) + mahalanobis, axis=-1)
  assert isinstance(q_a, FullGaussian) and isinstance(q_b, FullGaussian)
  whitened = _solve_tril(q_b.scale_tril, q_a.scale_tril)
  shift = _solve_tril(q_b.scale_tril, (q_a.mean - q_b.mean)[..., None])[..., 0]
  # The covariance part is split, so that its diagonal loses no digits where q_a is near q_b.
  log_ratio = 2.0 * jnp.log(jnp.diagonal(whitened, axis1=-2, axis2=-1))
  off_diagonal = jnp.tril(whitened, -1)
  return 0.5 * (
    jnp.sum(exp_remainder(log_ratio) + shift**2, axis=-1) + jnp.sum(off_diagonal**2, axis=(-2, -1))
  )


def kl_to_standard_normal(q: Gaussian) -> jax.Array:
  """Returns KL(q || N(0, I)) >= 0, in nats, `[...]`: the KL term of the VAE's ELBO (Eq. 8).

  Example:
    >>> print(kl_to_standard_normal(DiagonalGaussian(jnp.full((1, 2), 3.0), jnp.zeros((1, 2)))))
    [9.]
  """
  check_gaussian(q)
  if isinstance(q, DiagonalGaussian):
    return 0.5 * jnp.sum(exp_remainder(q.log_var) + q.mean**2, axis=-1)
  identity = jnp.broadcast_to(jnp.eye(q.dim, dtype=q.mean.dtype), q.scale_tril.shape)
  return kl_divergence(q, FullGaussian(jnp.zeros_like(q.mean), identity))


def expected_log_standard_normal(q: Gaussian) -> jax.Array:
  """Returns E_{z ~ q} log N(z; 0, I), in nats, `[...]` (the prior terms of Eq. 6 and Sec. 6)."""
  return -0.5 * (expected_squared_norm(q) + q.dim * LOG_2PI)


def expected_squared_norm(q: Gaussian) -> jax.Array:
  """Returns E_{z ~ q} ||z||^2, in squared latent units, `[...]`."""
  check_gaussian(q)
  return jnp.sum(q.mean**2, axis=-1) + q.trace()


def symmetric_kl(q_a: Gaussian, q_b: Gaussian) -> jax.Array:
  """Returns KL(q_a || q_b) + KL(q_b || q_a), in nats, `[...]` (Kuzina et al., 2022).

  The two are of one family and one shape; the errors are those of `kl_divergence`.
  """
  return kl_divergence(q_a, q_b) + kl_divergence(q_b, q_a)


def check_gaussian(q: Gaussian) -> None:
  """Raises AssertionError unless the parameters of `q` are floating point, and fit each other."""
  check_floating(**vars(q))
  if isinstance(q, DiagonalGaussian):
    if q.mean.ndim < 1 or q.mean.shape != q.log_var.shape:
      raise AssertionError(
        'DiagonalGaussian needs mean and log_var of one shape [..., D], '
        f'got mean {q.mean.shape} and log_var {q.log_var.shape}'
      )
  else:
    _check_square('FullGaussian', 'scale_tril', q.mean, q.scale_tril)


def check_floating(**arrays: jax.Array) -> None:
  """Raises AssertionError, naming the argument, unless all arrays are floating point."""
  for name, array in arrays.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise AssertionError(f'{name} must be floating point, got {array.dtype}')


def check_scalar(name: str, value: jax.typing.ArrayLike, *, positive: bool = False) -> None:
  """Raises AssertionError unless the value is a scalar and real.

  Raises ValueError if it is known, and not finite, not >= 0, or not > 0 where it must be positive.
  """
  if jnp.ndim(value) != 0 or jnp.iscomplexobj(value):
    raise AssertionError(f'{name} must be a scalar and real, got {value}')
  if isinstance(value, jax.core.Tracer):
    return
  known = float(np.asarray(value))
  if not 0.0 <= known < math.inf or (positive and known == 0.0):
    raise ValueError(f'{name} must be finite and {">" if positive else ">="} 0, got {value}')


def check_pair(q_a: Gaussian, q_b: Gaussian) -> None:
  """Raises TypeError unless both have one family, and AssertionError unless both have one shape."""
  if type(q_a) is not type(q_b):
    raise TypeError(
      f'q_a and q_b must be of one family, got {type(q_a).__name__} and {type(q_b).__name__}'
    )
  check_gaussian(q_a)
  check_gaussian(q_b)
  if q_a.mean.shape != q_b.mean.shape:
    raise AssertionError(
      f'q_a and q_b must have one shape, got means {q_a.mean.shape} and {q_b.mean.shape}'
    )


def check_moments(mean: jax.Array, cov: jax.Array) -> None:
  """Raises AssertionError unless `cov` is `[..., D, D]` for a mean of `[..., D]`."""
  _check_square('a full covariance', 'cov', mean, cov)


def _check_square(what: str, name: str, mean: jax.Array, matrix: jax.Array) -> None:
  if mean.ndim < 1 or matrix.shape != (*mean.shape, mean.shape[-1]):
    raise AssertionError(
      f'{what} needs mean [..., D] and {name} [..., D, D], '
      f'got mean {mean.shape} and {name} {matrix.shape}'
    )


def exp_remainder(t: jax.Array) -> jax.Array:
  """Returns exp(t) - 1 - t >= 0, elementwise, accurate to float resolution for every t.

  For t = log r this is r - log r - 1, twice the KL divergence (Eq. 8) of two centred Gaussians of
  one dimension whose variances have the ratio r.
  """
  near_zero = jnp.abs(t) < 1.0
  # `where` evaluates both branches, and the gradient of the unused one must not be 0 * inf.
  small = jnp.where(near_zero, t, 0.0)
  return jnp.where(near_zero, exp_remainder_near_zero(small), jnp.expm1(t) - t)


def exp_remainder_near_zero(t: jax.Array) -> jax.Array:
  """Returns exp(t) - 1 - t for -1 < t < 1 by a power series, without an exponential."""
  series = jnp.zeros_like(t)
  for k in range(_SERIES_ORDER, 1, -1):  # Horner: t^2/2! (1 + t/3 (1 + t/4 (...)))
    series = (1.0 + series) * t / k
  return series * t


def _solve_tril(tril: jax.Array, rhs: jax.Array) -> jax.Array:
  return jax.scipy.linalg.solve_triangular(tril, rhs, lower=True)
