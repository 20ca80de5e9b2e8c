"""What targeted attacks aim at: other classes, points of the representation, other images.

Each function `(targets, rows, attempt) -> Aim` says what one attempt of an attack on the examples
`rows` aims at. An attack names one of them as its `aim`.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from se_vae.attacks.losses import Aim

NUM_GREYS = 5

# All pairs of examples at once would not fit into memory.
_ROWS_AT_ONCE = 1000


@dataclasses.dataclass(eq=False)
class Targets:
  """The targets of N examples of C different classes, each found when it is first used.

  Attributes:
    x: images `[N, ...]`.
    labels: `[N]`, in [0, num_classes).
    latents: representations `[N, E]`; of a classifier that has none, the pixels.
    num_classes: K, how many classes the classifier knows; at least C.
    bounds: lowest and highest pixel value.
  """

  x: np.ndarray
  labels: np.ndarray
  latents: np.ndarray
  num_classes: int
  bounds: tuple[float, float]

  def __post_init__(self) -> None:
    self.latents = self.latents.reshape(len(self.x), -1)
    classes, self._own_class = np.unique(self.labels, return_inverse=True)
    self._members = [np.flatnonzero(self.labels == c) for c in classes]

  @functools.cached_property
  def centroids(self) -> np.ndarray:
    """Mean representation of each class, `[C, E]`, classes in ascending order."""
    return np.stack([self.latents[rows].mean(axis=0) for rows in self._members])

  @functools.cached_property
  def nearest_centroids(self) -> np.ndarray:
    """Rows of `centroids` of the other classes, nearest first, `[N, C - 1]`."""
    return self._other_classes(_squared_distances(self.latents, self.centroids))

  @functools.cached_property
  def nearest_examples(self) -> np.ndarray:
    """The nearest example of each other class, nearest first, `[N, C - 1]`."""
    shape = (len(self.x), len(self._members))
    distances, nearest = np.empty(shape), np.empty(shape, np.int64)
    for c, rows in enumerate(self._members):
      for start in range(0, len(self.x), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        squared = _squared_distances(self.latents[some], self.latents[rows])
        nearest[some, c] = rows[squared.argmin(axis=1)]
        distances[some, c] = squared.min(axis=1)
    return np.take_along_axis(nearest, self._other_classes(distances), axis=1)

  @functools.cached_property
  def greys(self) -> np.ndarray:
    """Uniform images, `[NUM_GREYS, ...]`."""
    levels = np.linspace(*self.bounds, NUM_GREYS, dtype=self.x.dtype)
    return np.stack([np.full(self.x.shape[1:], level, self.x.dtype) for level in levels])

  def _other_classes(self, distances: np.ndarray) -> np.ndarray:
    """Columns of distances `[N, C]` without that of each example's own class, nearest first."""
    distances[np.arange(len(distances)), self._own_class] = np.inf
    return distances.argsort(axis=1)[:, :-1]


def own_label(targets: Targets, rows: np.ndarray, attempt: int) -> Aim:
  """The true classes alone: an untargeted attack."""
  del attempt
  return Aim(targets.labels[rows])


def other_class(targets: Targets, rows: np.ndarray, attempt: int) -> Aim:
  """A class that is not the example's own, another one at each of K - 1 attempts."""
  labels = targets.labels[rows]
  return Aim(labels, target=(labels + 1 + attempt) % targets.num_classes)


def other_centroid(targets: Targets, rows: np.ndarray, attempt: int) -> Aim:
  """The mean representation of another class, the nearest first."""
  nearest = targets.nearest_centroids[rows, attempt]
  return Aim(targets.labels[rows], latent=targets.centroids[nearest])


def other_encoding(targets: Targets, rows: np.ndarray, attempt: int) -> Aim:
  """The representation of the nearest example of another class, the nearest class first."""
  nearest = targets.nearest_examples[rows, attempt]
  return Aim(targets.labels[rows], latent=targets.latents[nearest])


def own_encoding(targets: Targets, rows: np.ndarray, attempt: int) -> Aim:
  """The example's own representation, for an attack that leads away from it."""
  del attempt
  return Aim(targets.labels[rows], latent=targets.latents[rows])


def other_image(targets: Targets, rows: np.ndarray, attempt: int) -> Aim:
  """A uniform image at the first `NUM_GREYS` attempts, then the nearest example of a class."""
  if attempt < NUM_GREYS:
    image = np.broadcast_to(targets.greys[attempt], targets.x[rows].shape)
  else:
    image = targets.x[targets.nearest_examples[rows, attempt - NUM_GREYS]]
  return Aim(targets.labels[rows], image=image)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return (a**2).sum(1)[:, None] - 2.0 * a @ b.T + (b**2).sum(1)[None]
