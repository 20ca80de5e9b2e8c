"""Linear probes: multinomial logistic regression on frozen encoder means (paper Sec. 3 and 7)."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae.data.transforms import pixels
from se_vae.gaussians import DiagonalGaussian
from se_vae.models.vae import VAE, Params
from se_vae.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearProbe:
  """logits = mean @ weights + bias.

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
    """Encoder means `[B, D]` to unnormalised log-probabilities `[B, K]`.

    Raises:
      AssertionError: if `mean` has other dimensions than the probe was made for.
    """
    if mean.ndim != 2 or mean.shape[1] != len(self.weights):
      raise AssertionError(f'mean must be [B, {len(self.weights)}], got {mean.shape}')
    return mean @ self.weights + self.bias[None]


@dataclasses.dataclass(frozen=True)
class ProbedEncoder:
  """The classifier under attack: images, through the encoder's mean, to a probe's logits.

  Example:
    >>> from se_vae import make_vae
    >>> model = make_vae((2, 2, 1), latent_dim=3, num_layers=1)
    >>> params, probe = model.init(jax.random.key(0)), LinearProbe(jnp.eye(3), jnp.zeros(3))
    >>> ProbedEncoder(model)(jnp.zeros((5, 2, 2, 1)), params, probe).shape
    (5, 3)
  """

  model: VAE

  def __call__(self, x: jax.Array, params: Params, probe: LinearProbe) -> jax.Array:
    """Images `[B, H, W, C]` in [0, 1] to logits `[B, K]`."""
    return probe.logits(self.model.encode(params, x).mean)


@dataclasses.dataclass(frozen=True)
class GaussianLatents:
  """Means and standard deviations of an encoder, side by side: Euclid's distance is W2 (Eq. 12).

  Full covariances have no such coordinates: their means alone, a lower bound of W2.
  """

  model: VAE

  def __call__(self, x: jax.Array, params: Params, *_: Any) -> jax.Array:
    """Images `[B, H, W, C]` to `[B, 2 D]`, or `[B, D]`."""
    q = self.model.encode(params, x)
    if isinstance(q, DiagonalGaussian):
      return jnp.concatenate([q.mean, q.stddev], axis=-1)
    return q.mean


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """Images, through the encoder's mean and the decoder, to images."""

  model: VAE

  def __call__(self, x: jax.Array, params: Params, *_: Any) -> jax.Array:
    """`[B, H, W, C]` to `[B, H, W, C]`."""
    return self.model.decode(params, self.model.encode(params, x).mean)


@functools.partial(jax.jit, static_argnames='model')
def _encode_means(model: VAE, params: Params, images: jax.Array) -> jax.Array:
  return model.encode(params, pixels(images)).mean


def encoder_means(
  model: VAE, params: Params, images: np.ndarray, *, mesh: Mesh | None = None, batch_size: int = 512
) -> np.ndarray:
  """Means of q(z | x) for uint8 images `[N, H, W, C]`: float32 `[N, D]`.

  They are encoded `batch_size` at a time, or fewer that are large, on all devices unless `mesh`
  names some.

  Example:
    >>> from se_vae import make_vae
    >>> model = make_vae((2, 2, 1), latent_dim=3, num_layers=1)
    >>> params = model.init(jax.random.key(0))
    >>> encoder_means(model, params, np.zeros((5, 2, 2, 1), np.uint8)).shape
    (5, 3)
  """
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

  The means come in units of the prior's standard deviation, and the penalty applies to weights in
  those units. Standardising each latent instead lifts the latents that training has switched off,
  whose means hardly vary, to the size of the live ones: a little clean accuracy for an attacker's
  paradise.

  Example:
    >>> means = np.array([[-1.0], [-0.9], [0.9], [1.0]])
    >>> probe = fit_probe(means, np.array([0, 0, 1, 1]), num_classes=2)
    >>> print(probe.logits(jnp.array([[-2.0], [2.0]])).argmax(axis=1))
    [0 1]

  Args:
    means: training encodings `[N, D]`.
    labels: `[N]` integers in [0, num_classes).
    num_classes: K.
    l2: weight of the penalty l2 / 2 ||W||^2, added to the *sum* of the cross-entropies.
    standardize: divide each latent by its standard deviation over the training set first.
    max_iter: L-BFGS iterations allowed.

  Returns:
    The probe, for means as they are: any standardisation is folded into its weights.

  Raises:
    ValueError: if the means are not finite, a label is not in [0, num_classes), or a class has no
      example.
    RuntimeError: if the fit does not converge.
  """
  from sklearn.exceptions import ConvergenceWarning  # slow to import
  from sklearn.linear_model import LogisticRegression
  from threadpoolctl import threadpool_limits

  if not np.isfinite(means).all():
    raise ValueError('the encoder means are not finite: the encoder has diverged')
  classes, found = set(range(num_classes)), set(np.unique(labels).tolist())
  if found - classes:
    raise ValueError(f'labels must lie in [0, {num_classes}), got {sorted(found - classes)}')
  missing = sorted(classes - found)
  if missing:
    raise ValueError(f'no training example of class {", ".join(map(str, missing))}')
  means = means.astype(np.float64)
  center, scale = means.mean(axis=0), np.ones(means.shape[1])
  if standardize:
    deviation = means.std(axis=0)
    # A latent that varies by less than float32 can show is a constant, give or take rounding.
    scale = np.where(deviation > np.finfo(np.float32).eps * np.abs(center), deviation, 1.0)
  # Of two classes scikit-learn fits the one vector w = W_1 - W_0. The best W has W_0 = -W_1, so
  # that ||W||^2 = ||w||^2 / 2.
  binary = num_classes == 2
  classifier = LogisticRegression(C=(2.0 if binary else 1.0) / l2, max_iter=max_iter, tol=1e-6)
  with warnings.catch_warnings():
    warnings.simplefilter('error', ConvergenceWarning)
    try:
      # One thread: faster for matrices this thin, and the same sums in the same order everywhere.
      with threadpool_limits(1):
        classifier.fit((means - center) / scale, labels)
    except ConvergenceWarning as error:
      raise RuntimeError(f'the probe did not converge in {max_iter} iterations') from error
  coefficients, intercept = classifier.coef_, classifier.intercept_
  if binary:
    coefficients = np.concatenate([-coefficients, coefficients]) / 2.0
    intercept = np.concatenate([-intercept, intercept]) / 2.0
  weights = (coefficients / scale).T
  bias = intercept - center @ weights
  return LinearProbe(jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32))


def accuracy(probe: LinearProbe, means: np.ndarray, labels: np.ndarray) -> float:
  """Share of examples whose largest logit is their label's."""
  return float(np.mean(np.argmax(np.asarray(probe.logits(jnp.asarray(means))), axis=-1) == labels))
