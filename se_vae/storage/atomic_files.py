"""Files that are there whole or not at all, whatever happens: a power cut, a kill, a full disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
  """A file to write, which takes the place of `path` when the block ends, and durably so.

  Readers see what was there before, or all that is new. Where the block or the disk fails, what
  was there before stays, and nothing else is left behind.

  Raises:
    OSError: naming `path`, where it cannot be written.
  """
  temporary = path.with_name(_temporary(path.name, os.getpid()))
  try:
    with naming(path):
      with open(temporary, 'wb') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
      _sync(path.parent)
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
  """Puts `path` into the OSError of a write, which knows no name."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write(path: Path, content: bytes) -> None:
  """`replacing` with what is known beforehand."""
  with replacing(path) as file:
    file.write(content)


def make_directory(path: Path) -> None:
  """Makes a directory and its parents where they are missing, durably."""
  missing = [place for place in (path, *path.parents) if not place.exists()]
  path.mkdir(parents=True, exist_ok=True)
  for place in missing:
    _sync(place.parent)


def remove_leftovers(directory: Path, *patterns: str) -> None:
  """Removes what killed writers left of the files that match; nobody else may be writing them."""
  for pattern in patterns:
    for path in directory.glob(_temporary(pattern, '*')):
      path.unlink(missing_ok=True)


def _temporary(name: str, process: int | str) -> str:
  return f'.{name}.{process}.tmp'


def _sync(directory: Path) -> None:
  """Makes the names in a directory survive a power cut."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
