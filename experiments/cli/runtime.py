"""What every binary does around its work: flags, devices, signals, errors, progress and files."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import functools
import importlib.metadata
import io
import json
import os
import platform
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from absl import app, flags, logging
from etils import epy
from tqdm import tqdm

from experiments.cli import settings
from experiments.cli.settings import UsageError, setting

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax

  from se_vae.parallel import sharding
  from se_vae.storage import atomic_files, checkpoints

LOCK = '.lock'

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'scikit-learn', 'se_vae')

# Below this many examples a CPU core's share of a batch is too small to be worth a device.
_SMALLEST_SHARE = 16


# The flags defined here belong to every binary, and are listed by its --help.
flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """The flags that every binary has; no result depends on them."""

  compilation_cache_dir: str | None = setting(
    None, 'Directory that keeps compiled programs for later runs on this host.'
  )


class Interrupted(Exception):
  """The user or the scheduler asked the process to stop.

  Attributes:
    signum: how.
    saved: whether finished work has been saved.
  """

  def __init__(self, signum: int, saved: bool = True) -> None:
    super().__init__(signal.Signals(signum).name)
    self.signum = signum
    self.saved = saved


def run(main: Callable[[], None]) -> None:
  """Runs a binary: 2 for a usage error, 1 for a failure, 130 or 143 when interrupted."""
  settings.define_flags(RuntimeConfig)
  app.run(functools.partial(_guarded, main), flags_parser=_parse_flags)


def _guarded(main: Callable[[], None], argv: list[str]) -> None:
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # JAX tells at length which platforms it did not find
  try:
    if len(argv) > 1:
      raise UsageError(f'unexpected argument {argv[1]!r}; settings are given as --flag=value')
    _use_compilation_cache(settings.from_flags(RuntimeConfig).compilation_cache_dir)
    main()
  except UsageError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except failures() as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(1)
  except Interrupted as interrupted:
    kept = 'saved. Run the same command again to go on.' if interrupted.saved else 'nothing is kept'
    print(f'{interrupted}: {kept}', file=sys.stderr)
    sys.exit(128 + interrupted.signum)


def failures() -> tuple[type[Exception], ...]:
  """What can go wrong with the machine or the numbers: told in a line, not in a traceback."""
  return (OSError, ArithmeticError, checkpoints.CheckpointError, sharding.OtherProcessError)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return list(flags.FLAGS(argv))
  except flags.Error as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(2)


def _use_compilation_cache(directory: str | None) -> None:
  """Keeps every compiled program in `directory`, however small, and looks for it there first.

  XLA compiles for the very CPU that it runs on: a directory is for one host.
  """
  if directory is None:
    return
  _check_directory('--compilation_cache_dir', directory)
  jax.config.update('jax_compilation_cache_dir', directory)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def use_all_cores(batch_size: int, num_devices: int | None = None) -> None:
  """Splits the host into one JAX device a core, as far as the batch allows, or into `num_devices`.

  XLA's CPU backend runs the small matrix products of this project faster side by side on several
  devices than each spread over all cores. Must run before JAX is first used; leaves accelerators
  alone, and any number of host devices that the user chose.
  """
  chosen: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
  if chosen > 0 or 'host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  jax.config.update('jax_num_cpu_devices', num_devices or _cores_worth(batch_size, num_cores()))


def num_cores() -> int:
  """How many cores this process may use."""
  affinity = getattr(os, 'sched_getaffinity', None)
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def mesh_for(batch_size: int, num_devices: int | None = None) -> Any:
  """The data mesh over `num_devices` devices of each process, or as many as divide the batch.

  Of CPU devices as many as have some examples each.

  Raises:
    UsageError: if they do not divide it, or are not there. Compiles nothing.
  """
  num_processes, most = jax.process_count(), jax.local_device_count()
  if batch_size % num_processes:
    raise UsageError(
      f'--batch_size: must be a multiple of the {num_processes} processes; got {batch_size}'
    )
  share = batch_size // num_processes
  if num_devices is None:
    split = _cores_worth if jax.default_backend() == 'cpu' else _even_split
    num_devices = split(share, most)
  elif num_devices > most:
    raise UsageError(f'--num_devices: must be <= {most}, the devices here; got {num_devices}')
  elif share % num_devices:
    raise UsageError(
      f'--batch_size, --num_devices: {batch_size} examples cannot be split evenly over '
      f'{num_processes * num_devices} devices'
    )
  return sharding.data_mesh(num_devices)


def warn_of_idle_devices(mesh: Any, batch_size: int) -> None:
  """Tells the user where a batch leaves accelerators without work."""
  if mesh.size < jax.device_count() and jax.default_backend() != 'cpu':
    warn(
      f'--batch_size: {batch_size} examples are shared by {mesh.size} of {jax.device_count()} '
      'devices, as many as divide them'
    )


def _even_split(batch_size: int, most: int) -> int:
  return next(count for count in range(most, 0, -1) if batch_size % count == 0)


def _cores_worth(batch_size: int, most: int) -> int:
  return _even_split(batch_size, max(1, min(most, batch_size // _SMALLEST_SHARE)))


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


class StopSignal:
  """Remembers a request to stop (Ctrl-C, SIGTERM), to be honoured at a point of one's choice.

  Args:
    saves: whether what is finished by then is saved.

  Attributes:
    signum: of the request; None if there is none.
    patience: seconds to wait for that point. The process ends without it afterwards, with what was
      saved before: a device at work cannot be interrupted.
  """

  def __init__(self, saves: bool = True) -> None:
    self.signum: int | None = None
    self.patience = 10.0
    self._saves = saves
    self._honoured = threading.Event()

  def requested(self) -> int | None:
    """The request, if there is one; who is told of it may take all the time that saving needs."""
    if self.signum is not None:
      self._honoured.set()
    return self.signum

  def check(self) -> None:
    """Raises Interrupted if a request has come in."""
    signum = self.requested()
    if signum is not None:
      raise Interrupted(signum, self._saves)

  @contextlib.contextmanager
  def listening(self) -> Iterator[StopSignal]:
    """Listens while the context is open; a second request kills the process at once."""

    def handler(signum: int, _: FrameType | None) -> None:
      self.signum = signum

    # Python runs handlers between two of its instructions, not while the device is waited for. The
    # interpreter writes the signal's number to the wakeup descriptor at once, for a thread to read.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer)
    watcher = threading.Thread(target=self._watch, args=(reader,), daemon=True)
    watcher.start()
    previous = {
      number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
      yield self
    finally:
      self._honoured.set()
      signal.set_wakeup_fd(wakeup)
      for number, old in previous.items():
        signal.signal(number, old)
      os.close(writer)  # the watcher reads the end of the file
      watcher.join()
      os.close(reader)

  def _watch(self, reader: int) -> None:
    """Ends the process for a second request, and for a first that is not honoured in time."""
    for signum in os.read(reader, 1):
      self.signum = signum
      again, _, _ = select.select([reader], [], [], self.patience)
      if not again and not self._honoured.is_set():
        print(
          f'\n{signal.Signals(signum).name}: a step takes longer than {self.patience:g} s and was '
          'not waited for; what was saved before stays. Run the same command again to go on.',
          file=sys.stderr,
          flush=True,
        )
        os._exit(128 + signum)
      for second in os.read(reader, 1):
        os._exit(128 + second)


def progress_bar(total: int, description: str, *, initial: int = 0, unit: str = 'step') -> Any:
  """A bar with rate and time left on a terminal, and a line every now and then in a log file."""
  terminal = sys.stderr.isatty()
  return tqdm(
    total=total,
    initial=initial,
    desc=description,
    unit=unit,
    file=sys.stderr if terminal else _Lines(),
    dynamic_ncols=terminal,
    bar_format=None if terminal else _LINE,
    mininterval=0.2 if terminal else 15.0,
    smoothing=0.1,
  )


_LINE = '{desc}: {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}'


class _Lines:
  """A file that puts every state of a bar into a line of its own, instead of over the last."""

  def write(self, text: str) -> None:
    line = text.strip('\r\n ')
    if line:
      sys.stderr.write(f'{line}\n')

  def flush(self) -> None:
    sys.stderr.flush()


def warn(message: str) -> None:
  """Tells the user of something that the run can go on without."""
  print(f'warning: {message}', file=sys.stderr)


def versions() -> dict[str, str]:
  """The versions that a result may depend on."""
  found = {'python': platform.python_version()}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def devices(mesh: Any = None) -> list[str]:
  """The kinds of a mesh's devices, or of all, of all processes."""
  found = jax.devices() if mesh is None else mesh.devices.flat
  return [device.device_kind for device in found]


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


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """The lines of a Markdown table."""
  header = list(header)
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def check_workdir(workdir: str | None, lock_name: str = LOCK) -> Path:
  """The work directory as a path, if it is or can become a writable directory that is free."""
  if not workdir:
    raise UsageError('--workdir: is required; everything the run writes goes there')
  path = _check_directory('--workdir', workdir)
  if (path / lock_name).exists():
    with (path / lock_name).open() as file:
      _lock_or_refuse(file, path, fcntl.LOCK_SH)
  return path


def _check_directory(flag: str, directory: str) -> Path:
  path = Path(directory)
  nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
  if not nearest.is_dir():
    raise UsageError(f'{flag}: {nearest} is not a directory')
  if not os.access(nearest, os.W_OK):
    raise UsageError(f'{flag}: {nearest} is not writable')
  return path
