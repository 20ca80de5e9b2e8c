"""The attack log of an evaluation: what misclassified each example, and at what cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from se_vae.evaluation import states


@dataclasses.dataclass(repr=False)
class AttackLog:
  """The result of every attack so far, for N examples; `evaluate` fills it in.

  Attributes:
    names: names of the attacks; the first is 'clean', the image as it is.
    done: number of finished attempts.
    next_row: the first example that the attempt under way has not attacked yet.
    radius: `[N]`, the smallest radius at which the example is misclassified; inf if there is none.
    attack: `[N]`, index into `names` of the attack that found it; -1 if none did.
    restart: `[N]`, which of the attack's attempts found it.
    forwards: `[N]`, forward passes spent on the example, without those that come with a gradient.
    gradients: `[N]`, gradients spent on the example.
    images: `[N, ...]`, the adversarial image; the clean image of a robust example.
    outputs: `[N + M, ...]`, the clean logits, with the representations if there are any, and after
      them those of M images of noise.
  """

  names: tuple[str, ...]
  done: int
  next_row: int
  radius: np.ndarray
  attack: np.ndarray
  restart: np.ndarray
  forwards: np.ndarray
  gradients: np.ndarray
  images: np.ndarray
  outputs: np.ndarray

  def __repr__(self) -> str:
    found = np.isfinite(self.radius).sum()
    return f'AttackLog({self.done} attempts, {found} of {len(self.radius)} misclassified)'

  @classmethod
  def empty(cls, names: tuple[str, ...], x: np.ndarray, outputs: np.ndarray) -> AttackLog:
    """The log of clean images `[N, ...]` and their outputs before the first attack."""
    count = len(x)
    restart, forwards, gradients = np.zeros((3, count), np.int64)
    radius, attack = np.full(count, np.inf), np.full(count, -1)
    return cls(names, 0, 0, radius, attack, restart, forwards, gradients, x.copy(), outputs)

  def robust(self, radii: np.ndarray) -> np.ndarray:
    """Whether each example is robust at each radius, bool `[R, N]`.

    An example that is misclassified at one radius counts as misclassified at every larger one.
    """
    return self.radius[None] > np.asarray(radii, np.float64)[:, None]

  def record(
    self, rows: np.ndarray, images: np.ndarray, *, radius: np.ndarray, attack: int, restart: int
  ) -> None:
    """Enters misclassified examples `rows` `[M]`, with their images and the radii `[M]`."""
    self.radius[rows] = radius
    self.attack[rows] = attack
    self.restart[rows] = restart
    self.images[rows] = images

  def save(self, path: Path, fingerprint: str) -> None:
    """Writes an npz file atomically; `fingerprint` identifies the evaluation."""
    states.write(path, fingerprint, {name: np.asarray(value) for name, value in vars(self).items()})

  @classmethod
  def load(cls, path: Path, fingerprint: str, outputs: np.ndarray) -> AttackLog:
    """Reads what `save` wrote, for a classifier that gives these `outputs`.

    Raises:
      StateError: if the file is damaged, or belongs to another evaluation.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    content: dict[str, Any] = states.read(path, fingerprint, outputs, names)
    content['names'] = tuple(map(str, content['names']))
    return cls(**content | {name: int(content[name]) for name in ('done', 'next_row')})
