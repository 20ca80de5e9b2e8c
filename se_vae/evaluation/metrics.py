"""Numbers that an evaluation reports: accuracy against radius, active latents, held-out bounds."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae import attacks, gaussians, objectives
from se_vae.data.transforms import pixels
from se_vae.models.vae import VAE, Params
from se_vae.parallel import sharding

# A latent is active if the variance of its mean over the data exceeds this (a common threshold for
# variational autoencoders; the prior's variance is 1).
_ACTIVE_VARIANCE = 0.01


@dataclasses.dataclass(frozen=True, repr=False)
class AdversarialAccuracy:
  """Which of N examples are classified correctly under attack, at each of R radii.

  Attributes:
    radii: `[R]`.
    correct: bool `[R, N]`: no attempt of any attack within radius r misleads the classifier on
      example n.
  """

  radii: np.ndarray
  correct: np.ndarray

  @property
  def accuracy(self) -> np.ndarray:
    """Adversarial accuracy at each radius, `[R]`, in [0, 1]."""
    return self.correct.mean(axis=1)

  def __repr__(self) -> str:
    pairs = zip(self.accuracy, self.radii, strict=True)
    accuracy = ', '.join(f'{value:.3f} at {radius:g}' for value, radius in pairs)
    return f'AdversarialAccuracy(n = {self.correct.shape[1]}: {accuracy})'

  def interval(self, confidence: float = 0.95) -> np.ndarray:
    """Wilson score interval of each accuracy, `[R, 2]`."""
    from scipy.stats import binomtest  # slow to import

    count = self.correct.shape[1]
    intervals = [
      binomtest(int(row.sum()), count).proportion_ci(confidence, method='wilson')
      for row in self.correct
    ]
    return np.array([(interval.low, interval.high) for interval in intervals])


def active_latents(means: np.ndarray) -> int:
  """Number of latents whose encoder mean `[N, D]` varies over the data, 0 to D."""
  return int(np.sum(np.var(means, axis=0) > _ACTIVE_VARIANCE))


def held_out(
  model: VAE,
  params: Params,
  key: jax.Array,
  images: np.ndarray,
  *,
  obs_var: float,
  mesh: Mesh,
  batch_size: int = 500,
) -> dict[str, float]:
  """Means over held-out images of the ELBO (Eq. 1), its terms, and the reconstruction error.

  Args:
    model: the model.
    params: its parameters.
    key: for one sample of z for each image.
    images: uint8 `[N, H, W, C]`.
    obs_var: observation noise variance, > 0.
    mesh: devices.
    batch_size: images at a time, or fewer if they are large; the result does not depend on it,
      beyond rounding.

  Returns:
    `elbo`, `log_likelihood` and `kl` in nats per image, and `squared_error` (of the decoder's mean
    at the encoder's mean, summed over pixels in [0, 1]).
  """
  params = sharding.replicate(mesh, params)

  def measure(batch: tuple[jax.Array, jax.Array]) -> tuple[objectives.ElboTerms, jax.Array]:
    return _bound_terms(model, params, key, *batch, jnp.float32(obs_var))

  index = np.arange(len(images), dtype=np.int32)
  batch_size = min(sharding.fitting(batch_size, images), len(images))
  terms, squared_error = sharding.map_batches(mesh, measure, (images, index), batch_size)
  columns = terms._asdict() | {'squared_error': squared_error}
  return {name: float(values.mean()) for name, values in columns.items()}


@functools.partial(jax.jit, static_argnames='model')
def _bound_terms(
  model: VAE,
  params: Params,
  key: jax.Array,
  images: jax.Array,
  index: jax.Array,
  obs_var: jax.Array,
) -> tuple[objectives.ElboTerms, jax.Array]:
  x = pixels(images)
  q = model.encode(params, x)
  z = gaussians.sample_each(q, attacks.example_keys(key, index))
  squared_error = objectives.squared_error(x, model.decode(params, q.mean))
  return objectives.elbo(x, model.decode(params, z), q, obs_var=obs_var), squared_error
