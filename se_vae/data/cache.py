"""Decoded arrays in files, which later runs map into memory.

Mapped arrays are arrays like any others. The system keeps in memory what is used and has room, so
that a data set may be larger than the host's memory. The disk must hold it decoded.

An entry of the cache is a directory of .npy files and of a file with the SHA-256 over them, which
is written last.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from se_vae.data.examples import DataError, describe, sha256
from se_vae.storage import locks

Arrays = dict[str, np.ndarray]
Allocate = Callable[[str, tuple[int, ...]], np.ndarray]

_DIGEST = 'sha256'


def decode_once(
  decode: Callable[[Allocate], Arrays],
  cache_dir: str | None,
  name: str,
  directory: str,
  files: Iterable[Path] | None = None,
) -> Arrays:
  """Returns what `decode` gives, from the cache if it holds it for the same files.

  One process decodes, and the others that want the same entry wait for it.

  Args:
    decode: takes a function that allocates a uint8 array by name and shape; returns arrays by name.
    cache_dir: directory of the cache, which is made if need be; None decodes into memory.
    name: of the entry, for people; the entry also carries a digest of `directory`.
    directory: where the files are.
    files: whose names in `directory`, sizes and times identify what is decoded; all that are in it,
      at any depth, if None.

  Raises:
    DataError: if the cache cannot be used, a file in `directory` cannot be looked at, or whatever
      `decode` raises.
  """
  if cache_dir is None:
    return decode(lambda _, shape: np.empty(shape, np.uint8))
  entry = Path(cache_dir) / f'{name.replace("/", "-")}-{_fingerprint(directory, files)[:16]}'
  if (arrays := _read(entry)) is not None:
    return arrays
  with contextlib.ExitStack() as held:
    with _cache_errors(cache_dir):
      entry.parent.mkdir(parents=True, exist_ok=True)
      held.enter_context(locks.hold(entry.with_name(f'.{entry.name}.lock'), wait=True))
    if (arrays := _read(entry)) is None:  # another process may have decoded in the meantime
      try:
        decoded = decode(functools.partial(_allocate, entry))
        with _cache_errors(cache_dir):
          _finish(entry, decoded)
      except BaseException:
        shutil.rmtree(entry, ignore_errors=True)
        raise
      arrays = _map(entry)
  return arrays


def _allocate(entry: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns a new array in a file of the entry."""
  path = entry / f'{name}.npy'
  with _cache_errors(str(entry.parent)):
    entry.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)  # another process may have it mapped
    array = np.lib.format.open_memmap(path, 'w+', np.uint8, shape)
    if hasattr(os, 'posix_fallocate'):  # or else a full disk kills the process that writes a page
      with path.open('r+b') as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
  return array


def _finish(entry: Path, arrays: Mapping[str, np.ndarray]) -> None:
  for name, array in arrays.items():
    if isinstance(array, np.memmap):
      array.flush()
    else:
      np.save(entry / f'{name}.npy', array)
  (entry / _DIGEST).write_text(sha256(arrays))


def _map(entry: Path) -> Arrays:
  paths = sorted(entry.glob('*.npy'))
  return {path.stem: np.asarray(np.load(path, mmap_mode='r', allow_pickle=False)) for path in paths}


def _read(entry: Path) -> Arrays | None:
  """Returns the arrays of a good entry; None for a missing or a damaged one."""
  try:
    arrays = _map(entry)
    return arrays if (entry / _DIGEST).read_text() == sha256(arrays) else None
  except Exception:  # a file can be damaged in many ways
    return None


@contextlib.contextmanager
def _cache_errors(cache_dir: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise DataError('cache_dir', f'cannot use {cache_dir!r}: {describe(error)}') from error


def _fingerprint(directory: str, files: Iterable[Path] | None) -> str:
  if files is None:
    files = (Path(where, name) for where, _, names in os.walk(directory) for name in names)
  try:
    stats = sorted((str(path.relative_to(directory)), path.stat()) for path in files)
  except OSError as error:  # a broken link, or a file that is removed meanwhile
    message = f'{directory!r} has a file that cannot be read: {describe(error)}'
    raise DataError('data_dir', message) from error
  known = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
  return hashlib.sha256(repr(known).encode()).hexdigest()
