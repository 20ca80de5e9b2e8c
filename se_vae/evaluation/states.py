"""Files that hold what a computation has found so far, for when it is interrupted and run again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from se_vae.config import ArgumentError
from se_vae.data import examples
from se_vae.parallel import sharding
from se_vae.storage import atomic_files

# Seconds between two copies of a state on disk.
SAVE_EVERY = 10.0

# Outputs of one function differ by less than this share of the largest, on whatever devices.
_ROUNDING = 1e-4

_NO_OUTPUTS = np.zeros(0)


class StateError(ValueError):
  """A file that holds no state, or the state of another computation.

  Attributes:
    path: of the file.
  """

  def __init__(self, path: Path, reason: str) -> None:
    super().__init__(f'{path}: {reason}; remove it to start afresh')
    self.path = path


def check_path(state_path: str | Path | None) -> Path | None:
  """Returns the path; raises ArgumentError unless a file can be there."""
  path = None if state_path is None else Path(state_path)
  if path is not None and (path.is_dir() or not path.parent.is_dir()):
    raise ArgumentError('state_path', f'must be a file in a directory that exists, got {path}')
  return path


def fingerprint(settings: dict[str, Any], arrays: Any) -> str:
  """Returns a digest of the settings and of all arrays of a tree that a computation depends on.

  Functions have no digest. Their outputs on the clean images and on noise are part of the state.
  """
  digest = hashlib.sha256(repr(sorted(settings.items())).encode())
  for leaf in jax.tree.leaves(arrays):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def write(path: Path, fingerprint: str, arrays: dict[str, np.ndarray]) -> None:
  """Writes an npz file atomically; `fingerprint` identifies the computation."""
  content: dict[str, Any] = {'fingerprint': np.array(fingerprint), **arrays}
  with atomic_files.replacing(path) as file:
    np.savez(file, sha256=np.array(examples.sha256(content)), **content)


def read(
  path: Path, fingerprint: str, outputs: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
  """Returns the arrays that `write` wrote, for functions with these `outputs`.

  Args:
    path: of the file.
    fingerprint: of the computation.
    outputs: are compared with those in the file, up to rounding.
    names: of all arrays, `outputs` among them.

  Raises:
    StateError: if the file is damaged, or belongs to another computation.
  """
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      content = dict(arrays)
    if str(content.pop('sha256')) != examples.sha256(content):
      raise ValueError('its SHA-256 is not the one in it')
    stored = str(content.pop('fingerprint'))
    if content.keys() != set(names):
      raise ValueError(f'it has the arrays {", ".join(content)}')
  except Exception as error:  # NumPy and zipfile have errors of many types for damage
    raise StateError(path, f'is not a state: {" ".join(str(error).split())[:200]}') from error
  if stored != fingerprint or not _agree(content['outputs'], outputs):
    raise StateError(path, 'belongs to another computation')
  return content


def _agree(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether these are outputs of one function. Devices and batch sizes change only their rounding.

  A digest would not do, as it changes with the last bit.
  """
  return a.shape == b.shape and np.allclose(a, b, rtol=0.0, atol=_ROUNDING * np.abs(b).max())


class ValueLog:
  """The values of examples, one number each, in the order in which a computation asks for them.

  A computation that is run again asks for the same values in the same order. Those that the log
  holds are not computed again. The log is a context, which saves it when it ends.

  Args:
    path: npz file that keeps the log; None for a log that is not kept.
    fingerprint: of the computation.
    outputs: what its functions give on the clean images, and on noise where they may differ.

  Raises:
    StateError: for a file that is damaged or belongs to another computation.
  """

  def __init__(
    self, path: Path | None = None, fingerprint: str = '', outputs: np.ndarray = _NO_OUTPUTS
  ) -> None:
    self._path, self._fingerprint, self._outputs = path, fingerprint, outputs
    self._known = np.zeros(0, np.float32)
    if path is not None and path.exists():
      self._known = read(path, fingerprint, outputs, ('values', 'outputs'))['values']
    self._values = [self._known]
    self._saved = time.monotonic()

  def __enter__(self) -> ValueLog:
    return self

  def __exit__(self, *_: object) -> None:
    self._save()

  def map_batches(
    self,
    mesh: Mesh,
    function: Callable[[Any], jax.Array],
    arrays: Any,
    batch_size: int,
    progress: Callable[[int], Any] = lambda done: None,
  ) -> np.ndarray:
    """Returns `sharding.map_batches` of a function with values `[B]`, beginning with known values.

    `progress` is called with the number of rows that are done, before the first batch that is
    computed and after each one. It may raise to stop.
    """
    count = len(jax.tree.leaves(arrays)[0])
    known, self._known = np.split(self._known, [count])
    found, done = [known], len(known)
    if done < count:
      progress(done)
    for values in sharding.batches(mesh, function, arrays, batch_size, first=done):
      found.append(values)
      self._values.append(values)
      done += len(values)
      if time.monotonic() - self._saved > SAVE_EVERY:
        self._save()
      progress(done)
    return np.concatenate(found)

  def _save(self) -> None:
    if self._path is not None:
      arrays = {'values': np.concatenate(self._values), 'outputs': self._outputs}
      write(self._path, self._fingerprint, arrays)
    self._saved = time.monotonic()
