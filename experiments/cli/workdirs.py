"""Work directories: checked, locked against other processes, and the files in them."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from etils import epy

from experiments.cli.flags import UsageError
from experiments.cli.messages import warn

with epy.lazy_imports():  # --help and wrong flags are answered without them
  from se_vae.storage import atomic_files

LOCK = '.lock'


def check_workdir(workdir: str | None, lock_name: str = LOCK) -> Path:
  """The work directory as a path, if it is or can become a writable directory that is free."""
  if not workdir:
    raise UsageError('--workdir: is required; everything the run writes goes there')
  path = check_directory('--workdir', workdir)
  if (path / lock_name).exists():
    with (path / lock_name).open() as file:
      _lock_or_refuse(file, path, fcntl.LOCK_SH)
  return path


def check_directory(flag: str, directory: str) -> Path:
  """A directory as a path; raises UsageError unless it is or can become a writable one."""
  path = Path(directory)
  nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
  if not nearest.is_dir():
    raise UsageError(f'{flag}: {nearest} is not a directory')
  if not os.access(nearest, os.W_OK):
    raise UsageError(f'{flag}: {nearest} is not writable')
  return path


@contextlib.contextmanager
def lock(workdir: Path, *patterns: str, name: str = LOCK) -> Iterator[Callable[[], None]]:
  """Makes the directory if need be, and keeps every other process with this lock out of it.

  The system drops the lock of a process that dies, however it dies.

  Args:
    workdir: the directory.
    *patterns: of the files that the lock is for; what dead processes left of them is removed.
    name: of the lock.

  Yields:
    A function that raises FileNotFoundError once the directory has vanished, even where another one
    is in its place.

  Raises:
    UsageError: if another process is at work there; names it.
  """
  atomic_files.make_directory(workdir)
  path = workdir / name
  with path.open('a+') as file:
    _lock_or_refuse(file, workdir, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}')
    file.flush()
    atomic_files.remove_leftovers(workdir, *patterns)

    def check() -> None:
      if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        raise FileNotFoundError(f'{workdir}: the work directory has vanished')

    yield check


def _lock_or_refuse(file: TextIO, workdir: Path, mode: int) -> None:
  try:
    fcntl.flock(file, mode | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    owner = file.read().strip() or 'another process'
    raise UsageError(f'--workdir: {workdir} is in use by {owner}') from None


def read_json(path: Path, *names: str) -> dict[str, Any] | None:
  """The object in a JSON file, with these names in it; None if it is missing.

  None also if it is damaged, with a warning: what is written as JSON can be made again.
  """
  try:
    content = json.loads(path.read_bytes())
  except FileNotFoundError:
    return None
  except (ValueError, RecursionError):
    content = None
  if not isinstance(content, dict) or not content.keys() >= {*names}:
    warn(f'{path}: damaged, not used')
    return None
  return content


def write_json(path: Path, content: Any) -> None:
  """Writes a JSON file, whole or not at all."""
  atomic_files.write(path, f'{json.dumps(content, indent=2)}\n'.encode())


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
  """Writes a CSV file, whole or not at all."""
  text = io.StringIO(newline='')
  csv.writer(text).writerows(rows)
  atomic_files.write(path, text.getvalue().encode())
