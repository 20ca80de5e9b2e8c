"""Locks between processes, on files. The system drops the lock of a process that dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

# Seconds between attempts at a lock: `check_free` of another process holds it for a moment.
_PAUSES = (0.01, 0.05, 0.1, 0.0)


class InUseError(Exception):
  """Another process holds the lock. The message names the process and its host."""


@contextlib.contextmanager
def hold(path: Path, *, wait: bool = False) -> Iterator[TextIO]:
  """Holds the lock of a file while the context is open, and writes the owner's name into the file.

  Args:
    path: the file, which is made if it is missing and which stays.
    wait: whether to wait for another owner, or to raise an error.

  Yields:
    The open file.

  Raises:
    InUseError: if another process holds the lock and `wait` is False.
    OSError: if the file cannot be written.
  """
  with path.open('a+') as file:
    _lock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}')
    file.flush()
    yield file


@contextlib.contextmanager
def share(path: Path) -> Iterator[None]:
  """Keeps the lock of a file from being held, as several processes may at the same time."""
  with path.open('a+') as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    yield


def check_free(path: Path) -> None:
  """Raises InUseError if another process holds the lock of a file, which may be missing."""
  if path.exists():
    with path.open() as file:
      _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _lock(file: TextIO, mode: int) -> None:
  for pause in _PAUSES:
    try:
      fcntl.flock(file, mode)
      return
    except BlockingIOError:
      time.sleep(pause)
  file.seek(0)
  raise InUseError(file.read().strip() or 'another process')
