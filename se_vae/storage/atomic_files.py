"""Files that are written whole or not at all, even after a kill, a full disk or a power cut."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
  """Yields a file to write, which durably takes the place of `path` when the block ends.

  Readers see either the old content or all of the new one. If the block or the disk fails, the old
  content stays, and nothing else is left behind.

  Raises:
    OSError: if `path` cannot be written; the error names it.
  """
  # Processes of two hosts may have the same process id.
  temporary = path.with_name(_temporary(path.name, f'{os.getpid()}-{secrets.token_hex(4)}'))
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
  """Adds `path` to an OSError of the block, since the error of a write names no file."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write(path: Path, content: bytes) -> None:
  """Writes a file as `replacing` does.

  Raises:
    OSError: if `path` cannot be written; the error names it.
  """
  with replacing(path) as file:
    file.write(content)


def make_directory(path: Path) -> None:
  """Makes a directory and its missing parents, durably."""
  missing = [place for place in (path, *path.parents) if not place.exists()]
  path.mkdir(parents=True, exist_ok=True)
  for place in missing:
    _sync(place.parent)


def remove_leftovers(directory: Path, *patterns: str) -> None:
  """Removes half-written files that killed processes left.

  Args:
    directory: where they are.
    *patterns: glob patterns of the files' names. No other process may be writing such files.
  """
  for pattern in patterns:
    for path in directory.glob(_temporary(pattern, '*')):
      path.unlink(missing_ok=True)


def _temporary(name: str, writer: str) -> str:
  return f'.{name}.{writer}.tmp'


def _sync(directory: Path) -> None:
  """Writes the names in a directory to the disk."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
