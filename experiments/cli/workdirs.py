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

from experiments.cli.messages import warn
from se_vae.config import ArgumentError

with epy.lazy_imports():  # --help and wrong flags are answered without them
  from se_vae.storage import atomic_files, checkpoints, json_files, locks

Content = TypeVar('Content')


class InUseError(ArgumentError):
  """Another process works in a directory. `owner` says which, such as 'process 7 on host'."""

  def __init__(self, argument: str, directory: Path, owner: str) -> None:
    super().__init__(argument, f'{directory} is in use by {owner}')
    self.owner = owner


LOCK = '.lock'

PRETRAIN = 'experiments.pretrain'
SUPERVISED = 'experiments.supervised'
FIGURE1 = 'experiments.figure1'
SWEEP = 'experiments.sweep'

# Files that tell whose directory it is. A classifier's directory has neither of them.
_MARKS = {'figure1.json': FIGURE1, 'sweep.json': SWEEP, 'config.json': PRETRAIN}


def check_workdir(
  workdir: str | None,
  owner: str | None = None,
  *,
  argument: str = 'workdir',
  lock_name: str = LOCK,
) -> Path:
  """Returns the work directory as a path.

  Args:
    workdir: the work directory.
    owner: the binary whose directory it must be, unless it is empty; None for any.
    argument: names the directory, for errors.
    lock_name: the lock that no other process may hold.

  Raises:
    ArgumentError: unless it is or can become a writable directory of the owner in which no other
      process works.
  """
  path = check_directory(argument, workdir)
  with _in_use_errors(path, argument):
    locks.check_free(path / lock_name)
  if owner is not None:
    check_owner(argument, path, owner)
  return path


def check_directory(argument: str, directory: str | None) -> Path:
  """Returns a directory as a path.

  Args:
    argument: names the directory, for the error.
    directory: may be missing.

  Raises:
    ArgumentError: unless it is or can become a writable directory.
  """
  if not directory:
    raise ArgumentError(argument, 'is required; everything the run writes goes there')
  path = Path(directory)
  nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
  if not nearest.is_dir():
    raise ArgumentError(argument, f'{nearest} is not a directory')
  if not os.access(nearest, os.W_OK):
    raise ArgumentError(argument, f'{nearest} is not writable')
  return path


def check_owner(argument: str, directory: Path, owner: str) -> None:
  """Raises ArgumentError, naming the argument, if a directory holds the files of another binary."""
  found = _owner(directory)
  if found not in (owner, None):
    raise ArgumentError(
      argument, f'{directory} is a directory of {found}, not of {owner}; choose another one'
    )


def _owner(directory: Path) -> str | None:
  """Returns which binary, or which function of the library, has written to a directory."""
  for name, owner in _MARKS.items():
    if (directory / name).exists():
      return owner
  with contextlib.suppress(checkpoints.CheckpointError):
    found = checkpoints.load_latest(directory / 'checkpoints', on_damage=lambda _: None)
    if found is not None and 'config' not in found.metadata:
      return 'se_vae.save_model'
    if found is not None:
      return PRETRAIN if 'model' in found.metadata else SUPERVISED
  result = read_json(directory / 'result.json', dict[str, Any])
  return SUPERVISED if 'radii' in (result or {}) else None


@contextlib.contextmanager
def lock(
  workdir: Path, *patterns: str, name: str = LOCK, wait: bool = False
) -> Iterator[Callable[[], None]]:
  """Makes the directory if need be, and keeps every other process with this lock out of it.

  Args:
    workdir: the directory.
    *patterns: the names of the files that only the owner of the lock writes. Half-written ones
      that killed processes left are removed.
    name: the name of the lock.
    wait: whether to wait for another process; for locks that are held briefly.

  Yields:
    A function that raises FileNotFoundError once the directory has vanished, even if another one
    is in its place.

  Raises:
    ArgumentError: if another process works in the directory; the message names it.
  """
  atomic_files.make_directory(workdir)
  path = workdir / name
  with contextlib.ExitStack() as held:
    with _in_use_errors(workdir):
      file = held.enter_context(locks.hold(path, wait=wait))
    atomic_files.remove_leftovers(workdir, *patterns)

    def check_place() -> None:
      if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        raise FileNotFoundError(f'{workdir}: the work directory has vanished')

    yield check_place


@contextlib.contextmanager
def _in_use_errors(workdir: Path, argument: str = 'workdir') -> Iterator[None]:
  try:
    yield
  except locks.InUseError as owner:
    raise InUseError(argument, workdir, str(owner)) from None


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
