"""Who broke which example, at what radius, with which image, at what cost; kept across stops."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from se_vae.storage import atomic_files


class LedgerError(ValueError):
  """A file that is no ledger, or one of another evaluation."""


@dataclasses.dataclass
class Ledger:
  """Grows as an evaluation goes on.

  Attributes:
    names: of the attacks; the first is 'clean', the image as it is.
    done: tries that are finished.
    radius: `[N]`, the smallest broken radius; inf where none is.
    attack: `[N]`, index into `names` of what broke it first; -1 where nothing did.
    restart: `[N]`, which of its tries.
    forwards: `[N]`, forward passes spent on the example, without those that come with a gradient.
    gradients: `[N]`, gradients spent on it.
    images: `[N, ...]`, the adversarial image; the clean one where there is none.
  """

  names: tuple[str, ...]
  done: int
  radius: np.ndarray
  attack: np.ndarray
  restart: np.ndarray
  forwards: np.ndarray
  gradients: np.ndarray
  images: np.ndarray

  @classmethod
  def empty(cls, names: tuple[str, ...], x: np.ndarray) -> Ledger:
    """Nothing is attacked yet."""
    count = len(x)
    zeros = lambda: np.zeros(count, np.int64)  # noqa: E731
    nobody = np.full(count, -1)
    return cls(names, 0, np.full(count, np.inf), nobody, zeros(), zeros(), zeros(), x.copy())

  def survives(self, radii: np.ndarray) -> np.ndarray:
    """Bool `[R, N]`: a success at a small radius is one at every larger one."""
    return self.radius[None] > np.asarray(radii, np.float64)[:, None]

  def record(
    self, rows: np.ndarray, images: np.ndarray, *, radius: float, attack: int, restart: int
  ) -> None:
    """Enters broken examples."""
    self.radius[rows] = radius
    self.attack[rows] = attack
    self.restart[rows] = restart
    self.images[rows] = images

  def save(self, path: Path, fingerprint: str) -> None:
    """Writes an npz file, whole or not at all; `fingerprint` says what it belongs to."""
    with atomic_files.replacing(path) as file:
      np.savez(file, fingerprint=np.array(fingerprint), **vars(self))

  @classmethod
  def load(cls, path: Path, fingerprint: str) -> Ledger:
    """Reads what `save` wrote.

    Raises:
      LedgerError: if it is damaged, or belongs to another evaluation.
    """
    try:
      with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
        content = dict(arrays)
      stored = str(content.pop('fingerprint'))
      names = tuple(map(str, content.pop('names')))
      ledger = cls(names, int(content.pop('done')), **content)
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
      raise LedgerError(f'{path}: is not a ledger: {error}') from error
    if stored != fingerprint:
      raise LedgerError(f'{path}: belongs to another evaluation; remove it to start afresh')
    return ledger
