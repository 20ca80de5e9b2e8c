"""Optimal and entropic transport between Gaussians (paper Sec. 5, Eq. 10-24 and Sec. 6).

`squared_w2`, `entropic_squared_w2`, `entropic_transport_cost` and `optimal_map` take two Gaussians
of one family. The functions whose names end in `_full` take means and covariance matrices instead;
`optimal_coupling` and `entropic_coupling` take the variances of factorised Gaussians.

One form covers both families. With square roots S_a = A A^T and S_b = B B^T of the covariances, let
g_1..g_D be the singular values of B^T A (for factorised Gaussians g is sd_a sd_b, elementwise), and
let t = 2 gamma g and u = sqrt(1 + t^2). Then::

    squared_w2             = ||m_a - m_b||^2 + min_O ||A - B O||_F^2                 (Eq. 12)
    entropic_squared_w2    = squared_w2 + 2 sum_k g_k (1 + 1/(u_k + t_k)) / (u_k + 1)   (Eq. 19)
    entropic_transport_cost = gamma/2 squared_w2
        + 1/2 sum_k (1 - 1/(u_k + t_k) + log((u_k + 1) / 2))
        - 1/2 log|S_a| - 1/2 log|S_b| - D (log(2 pi) + 1)                         (Eq. 20-24)

with the minimum over orthogonal matrices O. These are the paper's expressions, rearranged so that
none of them subtracts two large numbers: `(u - 1) / (2 gamma)` of Eq. 24 loses every digit for
small gamma, and `gamma/2 (S_a + S_b) - (u - 1)/2` of Sec. 6 loses them for large gamma.

Distances are in squared latent units and costs in nats, one value for each pair of Gaussians, of
shape `[...]`. gamma >= 0 is a scalar, in inverse squared latent units; it may be traced. The
entropic transport cost contains the negative entropy of the coupling (Eq. 20-21): it is not zero at
q_a = q_b, and it may be negative. At gamma = 0 it is -H[q_a] - H[q_b]. As gamma grows, the cost
grows without bound and `entropic_squared_w2` decreases to `squared_w2`. In float32 all this holds
while t^2 does not overflow, which is for gamma g below 9e18.

Shapes that do not fit raise AssertionError, also under `jit`; nothing is broadcast. A gamma whose
value is known must be finite and >= 0, or ValueError is raised.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from se_vae import gaussians
from se_vae.gaussians import LOG_2PI, DiagonalGaussian, FullGaussian, Gaussian
from se_vae.matrix_functions import hypotenuse, polar_factor, sqrtm, transpose


def squared_w2(q_a: Gaussian, q_b: Gaussian) -> jax.Array:
  """Returns the squared l2-Wasserstein distance of two Gaussians of one family (Eq. 12).

  Example:
    >>> q_a = DiagonalGaussian(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    >>> q_b = DiagonalGaussian(jnp.full((1, 2), 3.0), jnp.zeros((1, 2)))
    >>> print(squared_w2(q_a, q_b))
    [18.]

  Args:
    q_a: Gaussians with means `[..., D]`.
    q_b: Gaussians of the same family and shape.

  Returns:
    Distances `[...]`, >= 0, in squared latent units. For factorised Gaussians the value and the
    gradient are exactly zero at q_a = q_b, so an attack that maximises this distance needs a random
    start. The error in float32 is at most 3e-6 of the value for factorised Gaussians, and 5e-7 of
    `||m_a - m_b||^2 + Tr S_a + Tr S_b` for full covariance.

  Raises:
    AssertionError: if shapes differ.
    TypeError: if the families differ.
  """
  gaussians.check_pair(q_a, q_b)
  shift = jnp.sum((q_a.mean - q_b.mean) ** 2, axis=-1)
  if isinstance(q_a, DiagonalGaussian) and isinstance(q_b, DiagonalGaussian):
    return shift + jnp.sum(_spread(q_a, q_b)[1], axis=-1)
  return shift + _spread_full(*_roots(q_a, q_b))[2]


def entropic_squared_w2(q_a: Gaussian, q_b: Gaussian, gamma: ArrayLike) -> jax.Array:
  """Returns E||z_a - z_b||^2 under the entropic coupling, W^2_{2,gamma} (Eq. 19).

  It does not increase with gamma. At gamma = 0, where z_a and z_b are independent, it is
  ||m_a - m_b||^2 + Tr S_a + Tr S_b; as gamma grows it decreases to `squared_w2`. It contains no
  entropy.

  Example:
    >>> q = DiagonalGaussian(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    >>> print(entropic_squared_w2(q, q, gamma=0.0))  # of independent z_a and z_b
    [4.]

  Args:
    q_a: Gaussians with means `[..., D]`.
    q_b: Gaussians of the same family and shape.
    gamma: coupling strength, a scalar >= 0.

  Returns:
    Expected squared distances `[...]`, >= 0, in squared latent units. The error in float32 is at
    most 3e-6 of the value for factorised Gaussians, and 1.5e-6 of the value at gamma = 0 for full
    covariance.

  Raises:
    AssertionError: if shapes differ or gamma is not a scalar.
    TypeError: if the families differ.
    ValueError: if the value of gamma is known, and it is negative or not finite.
  """
  gaussians.check_pair(q_a, q_b)
  check_gamma(gamma)
  shift = jnp.sum((q_a.mean - q_b.mean) ** 2, axis=-1)
  if isinstance(q_a, DiagonalGaussian) and isinstance(q_b, DiagonalGaussian):
    g, spread = _spread(q_a, q_b)
    return shift + jnp.sum(spread + _excess_squared_distance(g, gamma), axis=-1)
  return shift + _entropic_spread_full(*_roots(q_a, q_b), gamma)


def entropic_transport_cost(q_a: Gaussian, q_b: Gaussian, gamma: ArrayLike) -> jax.Array:
  """Returns the entropic transport cost WD = gamma/2 E||z_a - z_b||^2 - H[Q*] (Eq. 20-24, Sec. 6).

  It is the minimum of Eq. 13 over all joint distributions Q with marginals q_a and q_b; Q* is the
  minimiser.

  Example:
    >>> q = DiagonalGaussian(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    >>> cost = entropic_transport_cost(q, q, gamma=0.0)
    >>> print(cost + 2.0 * gaussians.entropy(q))  # independent: minus both entropies
    [0.]

  Args:
    q_a: Gaussians with means `[..., D]`.
    q_b: Gaussians of the same family and shape.
    gamma: coupling strength, a scalar >= 0.

  Returns:
    Costs `[...]`, in nats, of either sign. They are symmetric in (q_a, q_b) and do not decrease
    with gamma. For factorised Gaussians the error in float32 is at most `2e-6 + 1e-5 |cost|` for
    each dimension, for gamma in [1e-6, 1e6] and variances in [1e-8, 1e4]. For full covariance it is
    the error of a float32 singular value decomposition, which is relative to the largest g: use
    float64 for gradients where condition numbers exceed 1e3.

  Raises:
    AssertionError: if shapes differ or gamma is not a scalar.
    TypeError: if the families differ.
    ValueError: if the value of gamma is known, and it is negative or not finite.
  """
  gaussians.check_pair(q_a, q_b)
  check_gamma(gamma)
  gamma = jnp.asarray(gamma, q_a.mean.dtype)
  shift = jnp.sum((q_a.mean - q_b.mean) ** 2, axis=-1)
  if isinstance(q_a, DiagonalGaussian) and isinstance(q_b, DiagonalGaussian):
    g, spread = _spread(q_a, q_b)
    # These two terms may be large and of opposite sign, so they are added first.
    cost = 0.5 * gamma * spread - 0.5 * (q_a.log_var + q_b.log_var)
    cost = jnp.sum(cost + (_excess_cost(g, gamma) - (LOG_2PI + 1.0)), axis=-1)
  else:
    cross, rotation, spread = _spread_full(*_roots(q_a, q_b))
    entropies = 0.5 * (q_a.log_det() + q_b.log_det()) + q_a.dim * (LOG_2PI + 1.0)
    cost = 0.5 * gamma * spread + _excess_cost_full(cross, rotation, gamma) - entropies
  return 0.5 * gamma * shift + cost


def optimal_coupling(var_a: jax.Array, var_b: jax.Array) -> jax.Array:
  """Returns the cross-covariance psi = sd_a sd_b of the optimal plan, elementwise (Eq. 11).

  var_a and var_b are variances of one shape `[...]`, as is the result. Eq. 11 has the general case.

  Example:
    >>> print(optimal_coupling(jnp.array([4.0]), jnp.array([9.0])))
    [6.]
  """
  _check_same_shape('var_a', var_a, 'var_b', var_b)
  return jnp.sqrt(var_a) * jnp.sqrt(var_b)


def entropic_coupling(var_a: jax.Array, var_b: jax.Array, gamma: ArrayLike) -> jax.Array:
  """Returns the cross-covariance psi of the entropic plan, elementwise (Eq. 22-24).

  Args:
    var_a: variances, `[...]`, positive.
    var_b: variances, the same shape.
    gamma: coupling strength, a scalar >= 0.

  Returns:
    psi `[...]` in [0, sd_a sd_b), the feasible root of psi^2 + psi / gamma - var_a var_b = 0. It is
    0 at gamma = 0, where z_a and z_b are independent.

  Raises:
    AssertionError: if shapes differ or gamma is not a scalar.
    ValueError: if the value of gamma is known, and it is negative or not finite.

  Example:
    >>> print(entropic_coupling(jnp.array([1.5]), jnp.array([1.0]), gamma=2.0).round(3))
    [1.]
  """
  _check_same_shape('var_a', var_a, 'var_b', var_b)
  check_gamma(gamma)
  g = jnp.sqrt(var_a) * jnp.sqrt(var_b)
  t, u = _t_and_u(g, gamma)
  return g * (t / (u + 1.0))


def optimal_coupling_full(cov_a: jax.Array, cov_b: jax.Array) -> jax.Array:
  """Returns the cross-covariance Psi = Cov(z_a, z_b) of the optimal plan, `[..., D, D]` (Eq. 11).

  cov_a and cov_b are covariances `[..., D, D]` of one shape; they may be singular.
  """
  _check_covariances(cov_a, cov_b)
  a, b = sqrtm(cov_a), sqrtm(cov_b)
  return a @ transpose(polar_factor(b @ a)) @ b


def entropic_coupling_full(cov_a: jax.Array, cov_b: jax.Array, gamma: ArrayLike) -> jax.Array:
  """Returns the cross-covariance Psi = Cov(z_a, z_b) of the entropic plan, `[..., D, D]` (Eq. 18).

  It is Psi = A (I + (I + N^T N)^(1/2))^(-1) N^T B with A = S_a^(1/2), B = S_b^(1/2) and
  N = 2 gamma B A. This form of the solution of the Riccati equation inverts no covariance, and it
  is 0 at gamma = 0.

  Args:
    cov_a: covariances `[..., D, D]`, which may be singular.
    cov_b: covariances, the same shape.
    gamma: coupling strength, a scalar >= 0.

  Raises:
    AssertionError: if shapes do not fit or gamma is not a scalar.
    ValueError: if the value of gamma is known, and it is negative or not finite.
  """
  _check_covariances(cov_a, cov_b)
  check_gamma(gamma)
  a, b = sqrtm(cov_a), sqrtm(cov_b)
  identity = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
  cross = 2.0 * jnp.asarray(gamma, cov_a.dtype) * (b @ a)
  return a @ jnp.linalg.solve(hypotenuse(cross) + identity, transpose(cross)) @ b


def optimal_map(q_a: Gaussian, q_b: Gaussian, z_b: jax.Array) -> jax.Array:
  """Returns the z_a `[..., D]` to which the optimal plan sends `z_b` `[..., D]` (Sec. 5.1).

  It is m_a + (sd_a / sd_b) (z_b - m_b) for factorised Gaussians, and m_a + A O^T B^-1 (z_b - m_b)
  for full covariance, with the minimising O of the module's docstring.

  Example:
    >>> q_a = DiagonalGaussian(jnp.full((1, 2), 3.0), jnp.zeros((1, 2)))
    >>> q_b = DiagonalGaussian(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    >>> print(optimal_map(q_a, q_b, jnp.ones((1, 2))))
    [[4. 4.]]
  """
  gaussians.check_pair(q_a, q_b)
  _check_same_shape('z_b', z_b, 'mean_b', q_b.mean)
  shift = z_b - q_b.mean
  if isinstance(q_a, DiagonalGaussian) and isinstance(q_b, DiagonalGaussian):
    return q_a.mean + jnp.exp(0.5 * (q_a.log_var - q_b.log_var)) * shift
  root_a, root_b = _roots(q_a, q_b)
  whitened = jax.scipy.linalg.solve_triangular(root_b, shift[..., None], lower=True)
  rotation = polar_factor(transpose(root_b) @ root_a)
  return q_a.mean + (root_a @ (transpose(rotation) @ whitened))[..., 0]


def optimal_map_full(
  mean_a: jax.Array, cov_a: jax.Array, mean_b: jax.Array, cov_b: jax.Array, z_b: jax.Array
) -> jax.Array:
  """Returns the z_a `[..., D]` to which the optimal plan sends `z_b` `[..., D]` (Sec. 5.1).

  It is m_a + Psi S_b^-1 (z_b - m_b), for means `[..., D]` and covariances `[..., D, D]`. `cov_b`
  must be positive definite; `cov_a` may be singular.
  """
  _check_moments(mean_a, cov_a, mean_b, cov_b)
  _check_same_shape('z_b', z_b, 'mean_b', mean_b)
  psi = optimal_coupling_full(cov_a, cov_b)
  shift = jnp.linalg.solve(cov_b, (z_b - mean_b)[..., None])
  return mean_a + (psi @ shift)[..., 0]


def squared_w2_full(
  mean_a: jax.Array, cov_a: jax.Array, mean_b: jax.Array, cov_b: jax.Array
) -> jax.Array:
  """Returns the squared W2 of Gaussians with means `[..., D]`, covariances `[..., D, D]` (Eq. 12).

  The covariances may be singular. The value is right there, to three digits in float32: the square
  root of an eigenvalue of the size of the rounding error is far larger than that error. The true
  gradient is unbounded along the null space of a singular covariance; zero is returned for that
  part, and the rest is finite.

  Example:
    >>> mean, cov = jnp.zeros((1, 2)), jnp.eye(2)[None]
    >>> print(squared_w2_full(mean, 4.0 * cov, mean, cov).round(3))  # 2 (sd_a - sd_b)^2
    [2.]
  """
  _check_moments(mean_a, cov_a, mean_b, cov_b)
  shift = jnp.sum((mean_a - mean_b) ** 2, axis=-1)
  return shift + _spread_full(sqrtm(cov_a), sqrtm(cov_b))[2]


def entropic_squared_w2_full(
  mean_a: jax.Array, cov_a: jax.Array, mean_b: jax.Array, cov_b: jax.Array, gamma: ArrayLike
) -> jax.Array:
  """Returns W^2_{2,gamma} of Gaussians with means `[..., D]`, covariances `[..., D, D]` (Eq. 19).

  This is `entropic_squared_w2`, `[...]`, in squared latent units. The covariances may be singular.
  """
  _check_moments(mean_a, cov_a, mean_b, cov_b)
  check_gamma(gamma)
  shift = jnp.sum((mean_a - mean_b) ** 2, axis=-1)
  return shift + _entropic_spread_full(sqrtm(cov_a), sqrtm(cov_b), gamma)


def entropic_transport_cost_full(
  mean_a: jax.Array, cov_a: jax.Array, mean_b: jax.Array, cov_b: jax.Array, gamma: ArrayLike
) -> jax.Array:
  """Returns WD of Gaussians with means `[..., D]` and covariances `[..., D, D]` (Eq. 20-21).

  This is `entropic_transport_cost`, `[...]`, in nats. The covariances must be positive definite: a
  Gaussian with a singular covariance has no density, and the cost is +inf or NaN then.
  """
  _check_moments(mean_a, cov_a, mean_b, cov_b)
  return entropic_transport_cost(
    FullGaussian.from_covariance(mean_a, cov_a), FullGaussian.from_covariance(mean_b, cov_b), gamma
  )


def check_gamma(gamma: ArrayLike) -> None:
  """Raises an error unless `gamma` is a scalar and, if its value is known, finite and >= 0."""
  gaussians.check_scalar('gamma', gamma)


def _spread(q_a: DiagonalGaussian, q_b: DiagonalGaussian) -> tuple[jax.Array, jax.Array]:
  """Returns g = sd_a sd_b and (sd_a - sd_b)^2, both `[..., D]`."""
  return q_a.stddev * q_b.stddev, _squared_difference(q_a.log_var, q_b.log_var)


@jax.custom_jvp
def _squared_difference(log_var_a: jax.Array, log_var_b: jax.Array) -> jax.Array:
  """Returns (sd_a - sd_b)^2 `[..., D]`, accurate also where the two deviations are nearly equal."""
  near, ratio_less_1, log_ratio = _ratio_less_1(log_var_a, log_var_b)
  far_value = jnp.exp(jnp.maximum(log_var_a, log_var_b)) * (1.0 - jnp.exp(-jnp.abs(log_ratio))) ** 2
  return jnp.where(near, jnp.exp(log_var_b) * ratio_less_1**2, far_value)


@_squared_difference.defjvp
def _squared_difference_jvp(
  primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  # An attack needs the derivative and not the value. This form of it takes two exponentials only.
  sd_a, sd_b = (jnp.exp(0.5 * log_var) for log_var in primals)
  near, ratio_less_1, _ = _ratio_less_1(*primals)
  difference = jnp.where(near, sd_b * ratio_less_1, sd_a - sd_b)
  return _squared_difference(*primals), difference * (sd_a * tangents[0] - sd_b * tangents[1])


def _ratio_less_1(
  log_var_a: jax.Array, log_var_b: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns where sd_a - sd_b cancels, sd_a / sd_b - 1 there (else 0), and log(sd_a / sd_b)."""
  log_ratio = 0.5 * (log_var_a - log_var_b)
  near = jnp.abs(log_ratio) < 0.5
  small = jnp.where(near, log_ratio, 0.0)
  # The series is more accurate than XLA's expm1.
  return near, small + gaussians.exp_remainder_near_zero(small), log_ratio


def _roots(q_a: Gaussian, q_b: Gaussian) -> tuple[jax.Array, jax.Array]:
  """Returns square roots A and B of the covariances, `[..., D, D]`."""
  assert isinstance(q_a, FullGaussian) and isinstance(q_b, FullGaussian)
  return q_a.scale_tril, q_b.scale_tril


def _spread_full(root_a: jax.Array, root_b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns N = B^T A, its polar factor O, and ||A - B O||_F^2, the covariance part of Eq. 12."""
  cross = transpose(root_b) @ root_a
  rotation = polar_factor(cross)
  return cross, rotation, jnp.sum((root_a - root_b @ rotation) ** 2, axis=(-2, -1))


def _t_and_u(g: jax.Array, gamma: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Returns t = 2 gamma g and u = sqrt(1 + t^2), both of the shape of g."""
  t = 2.0 * jnp.asarray(gamma, g.dtype) * g
  if t.dtype == jnp.float16:  # in which t^2 would overflow from t = 256 on
    return t, jnp.hypot(jnp.ones_like(t), t)
  return t, jnp.sqrt(1.0 + t**2)


def _excess_squared_distance(g: jax.Array, gamma: ArrayLike) -> jax.Array:
  """Returns 2 (g - psi) >= 0, the difference of Eq. 19 and Eq. 12 in one dimension."""
  t, u = _t_and_u(g, gamma)
  return 2.0 * g * (1.0 + 1.0 / (u + t)) / (u + 1.0)


def _excess_cost(g: jax.Array, gamma: ArrayLike) -> jax.Array:
  """Returns 1/2 (1 - 1/(u + t) + log((u + 1) / 2)) >= 0, using u - 1 = t^2 / (u + 1)."""
  t, u = _t_and_u(g, gamma)
  u_minus_1 = t * (t / (u + 1.0))
  return 0.5 * ((t + u_minus_1) / (u + t) + jnp.log1p(0.5 * u_minus_1))


def _entropic_spread_full(root_a: jax.Array, root_b: jax.Array, gamma: ArrayLike) -> jax.Array:
  """Returns Tr(S_a + S_b - 2 Psi) `[...]`, the covariance part of Eq. 19."""
  cross, rotation, spread = _spread_full(root_a, root_b)
  gradient = _excess_gradient(cross, rotation, gamma)
  return spread + 2.0 * jnp.sum(gradient * cross, axis=(-2, -1))


def _excess_gradient(cross: jax.Array, rotation: jax.Array, gamma: ArrayLike) -> jax.Array:
  """Returns G = O - 2 gamma N (I + U)^(-1) with U = (I + 4 gamma^2 N^T N)^(1/2), `[..., D, D]`.

  The derivative of sum_k `_excess_cost(g_k)` in N is gamma G, and its derivative in gamma is the
  inner product of G and N.
  """
  gamma = jnp.asarray(gamma, cross.dtype)
  identity = jnp.broadcast_to(jnp.eye(cross.shape[-1], dtype=cross.dtype), cross.shape)
  u = hypotenuse(2.0 * gamma * cross)
  return rotation - 2.0 * gamma * transpose(jnp.linalg.solve(u + identity, transpose(cross)))


@jax.custom_jvp
def _excess_cost_full(cross: jax.Array, rotation: jax.Array, gamma: jax.Array) -> jax.Array:
  """Returns sum_k `_excess_cost(g_k)` `[...]` over the singular values g of N = `cross`."""
  g = jnp.linalg.svd(cross, compute_uv=False)
  return jnp.sum(_excess_cost(g, gamma), axis=-1)


@_excess_cost_full.defjvp
def _excess_cost_full_jvp(
  primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  # Derivatives of single singular values divide by differences of them. That of the sum need not.
  (cross, rotation, gamma), (d_cross, _, d_gamma) = primals, tangents
  gradient = _excess_gradient(cross, rotation, gamma)
  d_scaled = gamma * d_cross + d_gamma * cross
  return _excess_cost_full(cross, rotation, gamma), jnp.sum(gradient * d_scaled, axis=(-2, -1))


def _check_same_shape(name_a: str, a: jax.Array, name_b: str, b: jax.Array) -> None:
  if jnp.shape(a) != jnp.shape(b):
    raise AssertionError(
      f'{name_a} and {name_b} must have one shape, got {jnp.shape(a)} and {jnp.shape(b)}'
    )


def _check_covariances(cov_a: jax.Array, cov_b: jax.Array) -> None:
  _check_same_shape('cov_a', cov_a, 'cov_b', cov_b)
  if cov_a.ndim < 2 or cov_a.shape[-1] != cov_a.shape[-2]:
    raise AssertionError(f'covariances must be square, [..., D, D], got {cov_a.shape}')


def _check_moments(
  mean_a: jax.Array, cov_a: jax.Array, mean_b: jax.Array, cov_b: jax.Array
) -> None:
  gaussians.check_moments(mean_a, cov_a)
  gaussians.check_moments(mean_b, cov_b)
  _check_same_shape('mean_a', mean_a, 'mean_b', mean_b)
