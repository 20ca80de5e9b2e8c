"""Linear probes: multinomial logistic regression on frozen encoder means (paper Sec. 3 and 7)."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae.attacks.losses import is_correct
from se_vae.config import ArgumentError, check_counts
from se_vae.data.transforms import pixels
from se_vae.gaussians import DiagonalGaussian
from se_vae.models.vae import VAE, Params
from se_vae.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearProbe:
  """A linear classifier of encoder means: logits = mean @ weights + bias.

  Example:
    >>> probe = LinearProbe(jnp.eye(2), jnp.zeros(2))
    >>> print(probe.logits(jnp.array([[3.0, 1.0]])))
    [[3. 1.]]

  Attributes:
    weights: `[D, K]`.
    bias: `[K]`.
  """

  weights: jax.Array
  bias: jax.Array

  def logits(self, mean: jax.Array) -> jax.Array:
    """Unnormalised log-probabilities `[B, K]` of encoder means `[B, D]`.

    Raises:
      AssertionError: if `mean` does not have the D columns that the probe was fitted to.
    """
    if mean.ndim != 2 or mean.shape[1] != len(self.weights):
      raise AssertionError(f'mean must be [B, {len(self.weights)}], got {mean.shape}')
    return mean @ self.weights + self.bias[None]


@dataclasses.dataclass(frozen=True)
class ProbedEncoder:
  """A classifier of images: a linear probe on the encoder's mean.

  Example:
    >>> from se_vae import make_vae
    >>> model = make_vae((2, 2, 1), latent_dim=3, num_layers=1)
    >>> params, probe = model.init(jax.random.key(0)), LinearProbe(jnp.eye(3), jnp.zeros(3))
    >>> ProbedEncoder(model)(jnp.zeros((5, 2, 2, 1)), params, probe).shape
    (5, 3)
  """

  model: VAE

  def __call__(self, x: jax.Array, params: Params, probe: LinearProbe) -> jax.Array:
    """Logits `[B, K]` of images `[B, H, W, C]` in [0, 1]."""
    return probe.logits(self.model.encode(params, x).mean)


@dataclasses.dataclass(frozen=True)
class GaussianLatents:
  """Coordinates of encodings in which the Euclidean distance is W2 (Eq. 12).

  These are the means and standard deviations, side by side. Gaussians with full covariance have no
  such coordinates: for them the means alone, whose distance is a lower bound of W2.
  """

  model: VAE

  def __call__(self, x: jax.Array, params: Params, *_: Any) -> jax.Array:
    """Coordinates `[B, 2 D]`, or `[B, D]` for full covariance, of images `[B, H, W, C]`."""
    q = self.model.encode(params, x)
    if isinstance(q, DiagonalGaussian):
      return jnp.concatenate([q.mean, q.stddev], axis=-1)
    return q.mean


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """Reconstructions: the decoder's mean at the encoder's mean."""

  model: VAE

  def __call__(self, x: jax.Array, params: Params, *_: Any) -> jax.Array:
    """Reconstructions `[B, H, W, C]` of images `[B, H, W, C]`."""
    return self.model.decode(params, self.model.encode(params, x).mean)


@functools.partial(jax.jit, static_argnames='model')
def _encode_means(model: VAE, params: Params, images: jax.Array) -> jax.Array:
  return model.encode(params, pixels(images)).mean


def encoder_means(
  model: VAE, params: Params, images: np.ndarray, *, mesh: Mesh | None = None, batch_size: int = 512
) -> np.ndarray:
  """Means of q(z | x), float32 `[N, D]`, for uint8 images `[N, H, W, C]`.

  Encodes `batch_size` images at a time, or fewer if they are large, on all devices or on those of
  `mesh`.

  Example:
    >>> from se_vae import make_vae
    >>> model = make_vae((2, 2, 1), latent_dim=3, num_layers=1)
    >>> params = model.init(jax.random.key(0))
    >>> encoder_means(model, params, np.zeros((5, 2, 2, 1), np.uint8)).shape
    (5, 3)

  Raises:
    ArgumentError: unless there are images, of this dtype and rank.
  """
  if images.ndim != 4 or images.dtype != np.uint8 or not images.size:
    message = f'must be uint8 [N, H, W, C], at least one, got {images.dtype} {images.shape}'
    raise ArgumentError('images', message)
  mesh = sharding.data_mesh() if mesh is None else mesh
  params = sharding.replicate(mesh, params)
  encode = functools.partial(_encode_means, model, params)
  return sharding.map_batches(mesh, encode, images, sharding.fitting(batch_size, images))


def fit_probe(
  means: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  *,
  l2: float = 1.0,
  standardize: bool = False,
  max_iter: int = 5000,
) -> LinearProbe:
  """Fits a probe to convergence, in float64.

  The means are in units of the prior's standard deviation, and the penalty applies to weights in
  those units. Standardising each latent scales inactive latents, whose means hardly vary, up to the
  size of the active ones: clean accuracy rises a little, and small perturbations change the logits
  much more.

  Example:
    >>> means = np.array([[-1.0], [-0.9], [0.9], [1.0]])
    >>> probe = fit_probe(means, np.array([0, 0, 1, 1]), num_classes=2)
    >>> print(probe.logits(jnp.array([[-2.0], [2.0]])).argmax(axis=1))
    [0 1]

  Args:
    means: training encodings `[N, D]`.
    labels: `[N]` integers in [0, num_classes).
    num_classes: the number K of classes.
    l2: weight of the penalty l2 / 2 ||W||^2, added to the sum of the cross-entropies.
    standardize: whether to divide each latent by its standard deviation over the training set.
    max_iter: maximal number of L-BFGS iterations.

  Returns:
    The probe for means that are not standardised, since its weights include the division.

  Raises:
    ArgumentError: if shapes, dtypes or values do not fit, a class has no example, or the fit does
      not converge.
  """
  from sklearn.exceptions import ConvergenceWarning  # slow to import
  from sklearn.linear_model import LogisticRegression
  from threadpoolctl import threadpool_limits

  means, labels = np.asarray(means), np.asarray(labels)
  is_matrix = means.ndim == 2 and means.size > 0 and jnp.issubdtype(means.dtype, jnp.floating)
  if (
    not is_matrix or labels.shape != means.shape[:1] or not np.issubdtype(labels.dtype, np.integer)
  ):
    raise ArgumentError(
      ('means', 'labels'),
      f'must be floats [N, D] and integers [N], got {means.dtype} {means.shape} and '
      f'{labels.dtype} {labels.shape}',
    )
  check_counts(num_classes=num_classes, max_iter=max_iter)
  if num_classes < 2:
    raise ArgumentError('num_classes', f'must be >= 2, got {num_classes}')
  if not isinstance(l2, numbers.Real) or not 0.0 < l2 < np.inf:
    raise ArgumentError('l2', f'must be finite and > 0, got {l2}')
  if not np.isfinite(means).all():
    raise ArgumentError('means', 'must be finite: the encoder has diverged')
  classes, found = set(range(num_classes)), set(np.unique(labels).tolist())
  if found - classes:
    raise ArgumentError('labels', f'must lie in [0, {num_classes}), got {sorted(found - classes)}')
  missing = sorted(classes - found)
  if missing:
    raise ArgumentError('labels', f'no training example of class {", ".join(map(str, missing))}')
  means = means.astype(np.float64)
  center, scale = means.mean(axis=0), np.ones(means.shape[1])
  if standardize:
    deviation = means.std(axis=0)
    # A latent that varies by less than float32's resolution is constant up to rounding.
    scale = np.where(deviation > np.finfo(np.float32).eps * np.abs(center), deviation, 1.0)
  # For two classes scikit-learn fits the one vector w = W_1 - W_0. The best W has W_0 = -W_1, so
  # that ||W||^2 = ||w||^2 / 2.
  binary = num_classes == 2
  classifier = LogisticRegression(C=(2.0 if binary else 1.0) / l2, max_iter=max_iter, tol=1e-6)
  with warnings.catch_warnings():
    warnings.simplefilter('error', ConvergenceWarning)
    try:
      # One thread is faster for matrices this thin, and adds in the same order on every machine.
      with threadpool_limits(1):
        classifier.fit((means - center) / scale, labels)
    except ConvergenceWarning as error:
      message = f'one must be larger: the probe did not converge in {max_iter} iterations'
      raise ArgumentError(('l2', 'max_iter'), message) from error
  coefficients, intercept = classifier.coef_, classifier.intercept_
  if binary:
    coefficients = np.concatenate([-coefficients, coefficients]) / 2.0
    intercept = np.concatenate([-intercept, intercept]) / 2.0
  weights = (coefficients / scale).T
  bias = intercept - center @ weights
  return LinearProbe(jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32))


def accuracy(probe: LinearProbe, means: np.ndarray, labels: np.ndarray) -> float:
  """Share of examples `[N, D]` with finite logits, of which the label's is the largest."""
  correct = is_correct(probe.logits(jnp.asarray(means)), jnp.asarray(labels))
  return float(np.asarray(correct).mean())
