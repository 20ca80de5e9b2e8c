"""Work directories: checked, locked against other processes, and the files in them."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from etils import epy

from experiments.cli.flags import UsageError
from experiments.cli.messages import warn

with epy.lazy_imports():  # --help and wrong flags are answered without them
  from se_vae.storage import atomic_files, json_files, locks

Content = TypeVar('Content')

LOCK = '.lock'


def check_workdir(workdir: str | None, lock_name: str = LOCK) -> Path:
  """Returns the work directory as a path.

  Args:
    workdir: the value of --workdir.
    lock_name: the lock that no other process may hold.

  Raises:
    UsageError: unless it is or can become a writable directory in which no other process works.
  """
  if not workdir:
    raise UsageError('--workdir: is required; everything the run writes goes there')
  path = check_directory('--workdir', workdir)
  with _in_use_errors(path):
    locks.check_free(path / lock_name)
  return path


def check_directory(flag: str, directory: str) -> Path:
  """Returns a directory as a path.

  Args:
    flag: the flag that names the directory, for the error.
    directory: may be missing.

  Raises:
    UsageError: unless it is or can become a writable directory.
  """
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

  Args:
    workdir: the directory.
    *patterns: the names of the files that only the owner of the lock writes. Half-written ones
      that killed processes left are removed.
    name: the name of the lock.

  Yields:
    A function that raises FileNotFoundError once the directory has vanished, even if another one
    is in its place.

  Raises:
    UsageError: if another process works in the directory; the message names it.
  """
  atomic_files.make_directory(workdir)
  path = workdir / name
  with contextlib.ExitStack() as held:
    with _in_use_errors(workdir):
      file = held.enter_context(locks.hold(path))
    atomic_files.remove_leftovers(workdir, *patterns)

    def check_place() -> None:
      if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        raise FileNotFoundError(f'{workdir}: the work directory has vanished')

    yield check_place


@contextlib.contextmanager
def _in_use_errors(workdir: Path) -> Iterator[None]:
  try:
    yield
  except locks.InUseError as owner:
    raise UsageError(f'--workdir: {workdir} is in use by {owner}') from None


def read_json(
  path: Path, kind: type[Content], verify: Callable[[Content], object] = lambda content: None
) -> Content | None:
  """Returns what a JSON file holds; None if the file is missing or damaged.

  A damaged file gives a warning. It is no error, because a run can write it again.

  Args:
    path: the file.
    kind: what it must hold, as for `json_files.check`.
    verify: raises JsonError for content that is damaged in other ways.
  """
  try:
    content = json_files.read(path, kind)
    with json_files.naming(path):
      verify(content)
  except FileNotFoundError:
    return None
  except json_files.JsonError as error:
    warn(f'{error}; not used')
    return None
  return content


def write_json(path: Path, content: Any) -> None:
  """Writes a JSON file, whole or not at all."""
  atomic_files.write(path, f'{json_files.dumps(content, indent=2)}\n'.encode())


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
  """Writes a CSV file, whole or not at all."""
  text = io.StringIO(newline='')
  csv.writer(text).writerows(rows)
  atomic_files.write(path, text.getvalue().encode())
