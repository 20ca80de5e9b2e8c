"""What every binary does around its work: flags, devices, signals, errors, progress and files."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from absl import app, flags, logging
from tqdm import tqdm

from experiments.settings import UsageError
from se_vae import checkpoints

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'scikit-learn', 'se_vae')

# Below this many examples a device's share of a batch is too small to be worth a device.
_SMALLEST_SHARE = 16


# What can go wrong with the machine or the numbers: told in a line, not in a traceback.
_FAILURES = (OSError, ArithmeticError, checkpoints.CheckpointError)


class Interrupted(Exception):
  """The user or the scheduler asked the process to stop; finished work has been saved."""

  def __init__(self, signum: int) -> None:
    super().__init__(signal.Signals(signum).name)
    self.signum = signum


def run(main: Callable[[], None]) -> None:
  """Runs a binary: 2 for a usage error, 1 for a failure, 130 or 143 when interrupted."""
  app.run(functools.partial(_guarded, main), flags_parser=_parse_flags)


def _guarded(main: Callable[[], None], argv: list[str]) -> None:
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # JAX tells at length which platforms it did not find
  try:
    if len(argv) > 1:
      raise UsageError(f'unexpected argument {argv[1]!r}; settings are given as --flag=value')
    main()
  except UsageError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except _FAILURES as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(1)
  except Interrupted as interrupted:
    print(f'{interrupted}: saved. Run the same command again to go on.', file=sys.stderr)
    sys.exit(128 + interrupted.signum)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return list(flags.FLAGS(argv))
  except flags.Error as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(2)


def use_all_cores(batch_size: int) -> None:
  """Splits the host into one JAX device a core, as far as the batch allows.

  XLA's CPU backend runs the small matrix products of this project faster side by side on several
  devices than each spread over all cores. Must run before JAX is first used; leaves accelerators
  alone, and any number of host devices that the user chose.
  """
  import jax

  chosen: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
  if chosen > 0 or 'host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  jax.config.update('jax_num_cpu_devices', _even_split(batch_size, cores))


def mesh_for(batch_size: int) -> Any:
  """The data mesh over as many local devices as divide the batch."""
  import jax

  from se_vae import sharding

  return sharding.data_mesh(_even_split(batch_size, jax.device_count()))


def _even_split(batch_size: int, most: int) -> int:
  most = max(1, min(most, batch_size // _SMALLEST_SHARE))
  return next(count for count in range(most, 0, -1) if batch_size % count == 0)


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Makes the directory if need be, and keeps every other process out of it.

  The system drops the lock of a process that dies, however it dies.

  Raises:
    UsageError: if another process is at work there; names it.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / '.lock').open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      owner = file.read().strip() or 'another process'
      raise UsageError(f'--workdir: {workdir} is in use by {owner}') from None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}')
    file.flush()
    yield


class StopSignal:
  """Remembers a request to stop (Ctrl-C, SIGTERM), to be honoured at a point of one's choice."""

  def __init__(self) -> None:
    self.signum: int | None = None

  def check(self) -> None:
    """Raises Interrupted if a request has come in."""
    if self.signum is not None:
      raise Interrupted(self.signum)

  @contextlib.contextmanager
  def listening(self) -> Iterator[StopSignal]:
    """Listens while the context is open; a second request kills the process at once."""

    def handler(signum: int, _: FrameType | None) -> None:
      if self.signum is not None:
        sys.exit(128 + signum)
      self.signum = signum

    previous = {
      number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
      yield self
    finally:
      for number, old in previous.items():
        signal.signal(number, old)


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


def devices() -> list[str]:
  """The kinds of the local devices."""
  import jax

  return [device.device_kind for device in jax.devices()]


def read_json(path: Path) -> Any:
  """The content of a JSON file."""
  return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
  """Writes a JSON file, whole or not at all."""
  write_atomically(
    path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + '\n')
  )


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
  """Lets `write` fill a temporary file, and puts that in the place of `path`."""
  temporary = path.with_name(
    f'.{os.getpid()}.{path.name}'
  )  # keeps the suffix, which names a format
  try:
    write(temporary)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def check_workdir(workdir: str | None) -> Path:
  """The work directory as a path, if it is or can become a writable directory."""
  if not workdir:
    raise UsageError('--workdir: is required; everything the run writes goes there')
  path = Path(workdir)
  nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
  if not nearest.is_dir():
    raise UsageError(f'--workdir: {nearest} is not a directory')
  if not os.access(nearest, os.W_OK):
    raise UsageError(f'--workdir: {nearest} is not writable')
  return path
