"""Randomised smoothing (Cohen, Rosenfeld and Kolter, 2019): certificates in l2 by sampling.

The smoothed classifier says for x the class that a base classifier gives most often to x with
Gaussian noise on all pixels. If that class has a probability of at least p > 1/2, then the smoothed
classifier says the same for every x' within sigma * Phi^-1(p) of x in l2 (their Theorem 1). The
probability is not known: p is a lower confidence bound from samples.

So this certificate differs from those of `certificates` in three ways. It is about another
classifier, the smoothed one. Each example's radius is wrong with a probability of at most alpha. It
needs nothing of the base classifier but its answers, so it holds for any network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae import attacks
from se_vae.attacks.losses import Model
from se_vae.config import ArgumentError, check_counts
from se_vae.evaluation import attacked_classifier
from se_vae.evaluation.metrics import AdversarialAccuracy


@dataclasses.dataclass(frozen=True, repr=False)
class SmoothedCertificate:
  """What is certified of N examples for the smoothed classifier.

  Attributes:
    predicted: `[N]`, the class of each example; -1 where the classifier abstains.
    radius: `[N]`, the l2 radius within which the smoothed classifier says the same; 0 where it
      abstains.
    curve: which examples are classified correctly within each radius, and the certified accuracy.
      An abstention counts as an error.
  """

  predicted: np.ndarray
  radius: np.ndarray
  curve: AdversarialAccuracy

  @property
  def abstentions(self) -> int:
    """The number of examples for which no class is certain enough."""
    return int(np.sum(self.predicted < 0))

  def __repr__(self) -> str:
    return f'SmoothedCertificate({self.curve}, {self.abstentions} abstentions)'


def smoothed_accuracy(
  logits_fn: Model,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  sigma: float,
  num_selection: int = 100,
  num_estimation: int = 1000,
  alpha: float = 0.001,
  bounds: tuple[float, float] = (0.0, 1.0),
  seed: int = 0,
  batch_size: int = 200,
  args: tuple[Any, ...] = (),
  mesh: Mesh | None = None,
  on_batch: Callable[[], Any] = lambda: None,
) -> SmoothedCertificate:
  """Returns the certified accuracy in l2 of the smoothed classifier.

  The most frequent class of the first samples is the prediction, and further samples bound its
  probability (their algorithm Certify). The noise is not clipped to the pixel range. Neither the
  batch size nor the number of devices changes the noise of an example.

  Example:
    >>> fn = lambda x: jnp.stack([x[:, 0], 1.0 - x[:, 0]], axis=1)
    >>> x, labels = np.float32([[0.9], [0.5]]), np.array([0, 1])
    >>> result = smoothed_accuracy(fn, x, labels, radii=(0.0, 0.1, 0.5), sigma=0.25)
    >>> print(result.predicted, result.curve.accuracy)
    [ 0 -1] [0.5 0.5 0. ]

  Args:
    logits_fn: the base classifier, images `[B, ...]` (and `args`) to logits `[B, K]`; hashable. A
      sample whose logits are not finite counts for no class.
    x: images `[N, ...]`, float, inside `bounds`.
    labels: `[N]` integers in [0, K).
    radii: l2 radii >= 0, in any order.
    sigma: standard deviation of the noise on each pixel, > 0.
    num_selection: samples for each example from which the class is chosen.
    num_estimation: further samples, from which its probability is bounded. They limit the radius:
      with 1,000 and alpha 0.001 it is at most 2.46 sigma.
    alpha: in (0, 1), the largest probability that an example's radius is too large.
    bounds: lowest and highest pixel value.
    seed: seed of the noise.
    batch_size: examples at a time.
    args: further arguments of `logits_fn`.
    mesh: devices to spread a batch over; all of them if None.
    on_batch: called after each batch; may raise to stop.

  Raises:
    ArgumentError: for an argument out of range, or clean logits that are not finite.
  """
  check_counts(num_selection=num_selection, num_estimation=num_estimation)
  if not 0.0 < sigma < np.inf:
    raise ArgumentError('sigma', f'must be finite and > 0, got {sigma}')
  if not 0.0 < alpha < 1.0:
    raise ArgumentError('alpha', f'must be in (0, 1), got {alpha}')
  classifier, _ = attacked_classifier.prepare(
    logits_fn,
    x,
    labels,
    radii=radii,
    seed=seed,
    norm='l2',
    bounds=bounds,
    batch_size=batch_size,
    args=args,
    mesh=mesh,
  )
  shape = num_selection, num_estimation, classifier.num_classes

  def count(batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    counts = _counts(logits_fn, shape, classifier.key, *batch, jnp.float32(sigma), classifier.args)
    on_batch()
    return counts

  index = np.arange(len(classifier.x), dtype=np.int32)
  selection, estimation = classifier.in_batches(count, (classifier.x, index))
  chosen = selection.argmax(axis=1)
  lower = lower_confidence_bound(estimation[index, chosen], num_estimation, alpha)
  radius = _radius(lower, sigma)
  predicted = np.where(lower > 0.5, chosen, -1)
  correct = predicted == classifier.labels
  limits = np.asarray(radii, np.float64)
  curve = AdversarialAccuracy(limits, correct[None] & (radius[None] >= limits[:, None]))
  return SmoothedCertificate(predicted, radius, curve)


def lower_confidence_bound(successes: np.ndarray, num_samples: int, alpha: float) -> np.ndarray:
  """Returns the one-sided lower bound of a probability (Clopper and Pearson, 1934).

  The bound exceeds the probability in a share of at most alpha of all experiments.

  Example:
    >>> lower_confidence_bound(np.array([0, 5, 10]), 10, 0.05).round(3)
    array([0.   , 0.222, 0.741])

  Args:
    successes: of any shape, in [0, num_samples].
    num_samples: of each experiment.
    alpha: in (0, 1).
  """
  from scipy.stats import beta  # slow to import

  some = np.maximum(successes, 1)
  bound = beta.ppf(alpha, some, num_samples - some + 1)
  return np.where(successes > 0, bound, 0.0)


def _radius(lower: np.ndarray, sigma: float) -> np.ndarray:
  """Returns `sigma * Phi^-1(p)` where p > 1/2, and 0 elsewhere."""
  from scipy.stats import norm  # slow to import

  return np.where(lower > 0.5, sigma * norm.ppf(np.maximum(lower, 0.5)), 0.0)


@functools.partial(jax.jit, static_argnames=('logits_fn', 'shape'))
def _counts(
  logits_fn: Model,
  shape: tuple[int, int, int],
  key: jax.Array,
  x: jax.Array,
  index: jax.Array,
  sigma: jax.Array,
  args: tuple[Any, ...],
) -> tuple[jax.Array, jax.Array]:
  """Returns how often each class is given, `[B, K]`, in the samples of either kind."""
  num_selection, num_estimation, num_classes = shape
  keys = attacks.example_keys(key, index)

  def sample(number: jax.Array, counts: jax.Array) -> jax.Array:
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(own)
    logits = logits_fn(x + sigma * noise, *args)
    given = jax.nn.one_hot(logits.argmax(axis=1), num_classes, dtype=jnp.int32)
    return counts + jnp.where(jnp.isfinite(logits).all(axis=1, keepdims=True), given, 0)

  none = jnp.zeros((len(x), num_classes), jnp.int32)
  selection = jax.lax.fori_loop(0, num_selection, sample, none)
  last = num_selection + num_estimation
  return selection, jax.lax.fori_loop(num_selection, last, sample, none)
