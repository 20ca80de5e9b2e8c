"""The attack log of an evaluation: what misclassified each example, and at what cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from se_vae.data import examples
from se_vae.storage import atomic_files


class AttackLogError(ValueError):
  """A file that is no attack log, or the log of another evaluation."""


@dataclasses.dataclass(repr=False)
class AttackLog:
  """The result of every attack so far, for N examples; `evaluate` fills it in.

  Attributes:
    names: names of the attacks; the first is 'clean', the image as it is.
    done: number of finished attempts.
    radius: `[N]`, the smallest radius at which the example is misclassified; inf if there is none.
    attack: `[N]`, index into `names` of the attack that found it; -1 if none did.
    restart: `[N]`, which of the attack's attempts found it.
    forwards: `[N]`, forward passes spent on the example, without those that come with a gradient.
    gradients: `[N]`, gradients spent on the example.
    images: `[N, ...]`, the adversarial image; the clean image of a robust example.
  """

  names: tuple[str, ...]
  done: int
  radius: np.ndarray
  attack: np.ndarray
  restart: np.ndarray
  forwards: np.ndarray
  gradients: np.ndarray
  images: np.ndarray

  def __repr__(self) -> str:
    misclassified = int(np.isfinite(self.radius).sum())
    return f'AttackLog({misclassified} of {len(self.radius)} examples misclassified)'

  @classmethod
  def empty(cls, names: tuple[str, ...], x: np.ndarray) -> AttackLog:
    """The log of clean images `[N, ...]` before the first attack."""
    count = len(x)
    restart, forwards, gradients = np.zeros((3, count), np.int64)
    radius, attack = np.full(count, np.inf), np.full(count, -1)
    return cls(names, 0, radius, attack, restart, forwards, gradients, x.copy())

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
    arrays: dict[str, Any] = {'fingerprint': np.array(fingerprint)}
    arrays |= {name: np.asarray(value) for name, value in vars(self).items()}
    with atomic_files.replacing(path) as file:
      np.savez(file, sha256=np.array(examples.sha256(arrays)), **arrays)

  @classmethod
  def load(cls, path: Path, fingerprint: str) -> AttackLog:
    """Reads what `save` wrote.

    Raises:
      AttackLogError: if the file is damaged, or belongs to another evaluation.
    """
    try:
      with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
        content = dict(arrays)
      if str(content.pop('sha256')) != examples.sha256(content):
        raise ValueError('its SHA-256 is not the one in it')
      stored = str(content.pop('fingerprint'))
      names = tuple(map(str, content.pop('names')))
      log = cls(names, int(content.pop('done')), **content)
    except Exception as error:  # NumPy and zipfile have errors of many types for damage
      reason = ' '.join(str(error).split())[:200]
      message = f'{path}: is not an attack log: {reason}; remove it to start afresh'
      raise AttackLogError(message) from error
    if stored != fingerprint:
      raise AttackLogError(f'{path}: belongs to another evaluation; remove it to start afresh')
    return log
